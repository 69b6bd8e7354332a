// Attention of the queries of one token over the keys and values of its slot.

#pragma once

#include <cstddef>

#include "numbers.hpp"

// The keys and values that one head of one slot holds: `seen` of them, `stride` apart.
struct Context {
    const stored *keys, *values;
    int seen, stride, dim;
};
constexpr int BLOCK = 64;  // keys or values that stay in the nearest cache while all queries of a group use them

// One of several queries that use the same keys and values, and take turns at fetching those of the next block.
struct Turn {
    int index, count;
};

static inline void fetch_next(const Context& c, const stored* row) {
    const char* at = (const char*)(row + (size_t)BLOCK * c.stride);
    for (int i = 0; i < c.dim * (int)sizeof(stored); i += 64) __builtin_prefetch(at + i, 0, 2);
}

// scores[j] = query . key[j] for j in [from, to)
static void score(const Context& c, const real* query, int from, int to, real* scores, Turn turn) {
    int j = from;
    for (; j + 4 <= to; j += 4) {
        const stored* key = c.keys + (size_t)j * c.stride;
        if (j / 4 % turn.count == turn.index)
            for (int i = 0; i < 4; i++) fetch_next(c, key + (size_t)i * c.stride);
        Vector totals[4] = {Vector{}, Vector{}, Vector{}, Vector{}};
        int k = 0;
        for (; k + LANES <= c.dim; k += LANES) {
            Vector q = load(query + k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) totals[i] = fused(totals[i], q, load(key + (size_t)i * c.stride + k));
        }
        sums(totals[0], totals[1], totals[2], totals[3], scores + j);
        for (; k < c.dim; k++)
            for (int i = 0; i < 4; i++) scores[j + i] += query[k] * number(key[(size_t)i * c.stride + k]);
    }
    for (; j < to; j++) {
        scores[j] = 0;
        for (int k = 0; k < c.dim; k++) scores[j] += query[k] * number(c.keys[(size_t)j * c.stride + k]);
    }
}

static void softmax(real* scores, int count) {
    real highest = scores[0], total = 0;
#pragma omp simd reduction(max : highest)
    for (int j = 1; j < count; j++) highest = scores[j] > highest ? scores[j] : highest;
    for (int j = 0; j < count; j++) scores[j] -= highest;
    exponentials(scores, count);
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < count; j++) total += scores[j];
    for (int j = 0; j < count; j++) scores[j] /= total;
}

// out += sum of scores[j] * value[j] for j in [from, to), for MANY vectors of columns from k on
template <int MANY>
static void blend_columns(const Context& c, const real* scores, int from, int to, real* out, int k, Turn turn) {
    Vector parts[MANY];
    for (int i = 0; i < MANY; i++) parts[i] = load(out + k + i * LANES);
    for (int j = from; j < to; j++) {
        const stored* value = c.values + (size_t)j * c.stride;
        if (k == 0 && j % turn.count == turn.index) fetch_next(c, value);
        Vector share = splat(scores[j]);
#pragma GCC unroll 4
        for (int i = 0; i < MANY; i++) parts[i] = fused(parts[i], share, load(value + k + i * LANES));
    }
    for (int i = 0; i < MANY; i++) store(out + k + i * LANES, parts[i]);
}

static void blend(const Context& c, const real* scores, int from, int to, real* out, Turn turn) {
    int k = 0;
    for (; k + 4 * LANES <= c.dim; k += 4 * LANES) blend_columns<4>(c, scores, from, to, out, k, turn);
    for (; k + LANES <= c.dim; k += LANES) blend_columns<1>(c, scores, from, to, out, k, turn);
    for (; k < c.dim; k++)
        for (int j = from; j < to; j++) out[k] += scores[j] * number(c.values[(size_t)j * c.stride + k]);
}

// Attention of `count` queries [count, dim] that share keys and values; scores [count, seen], out [count, dim].
static void attend(const Context& c, const real* queries, int count, real* scores, real* out) {
    auto end = [&](int from) { return from + BLOCK < c.seen ? from + BLOCK : c.seen; };
    for (int from = 0; from < c.seen; from += BLOCK)
        for (int g = 0; g < count; g++)
            score(c, queries + (size_t)g * c.dim, from, end(from), scores + (size_t)g * c.seen, {g, count});
    for (int g = 0; g < count; g++) softmax(scores + (size_t)g * c.seen, c.seen);
    for (int i = 0; i < count * c.dim; i++) out[i] = 0;
    for (int from = 0; from < c.seen; from += BLOCK)
        for (int g = 0; g < count; g++)
            blend(c, scores + (size_t)g * c.seen, from, end(from), out + (size_t)g * c.dim, {g, count});
}
