// Attention of the queries of one token over the keys and values of its slot.

#pragma once

#include <cstddef>

#include "numbers.hpp"

// The keys and values that one head of one slot holds: `seen` of them, `stride` apart.
struct Context {
    const stored *keys, *values;
    int seen, stride, dim;
    const stored* next;  // the keys that are needed afterwards, or null
};
constexpr int BLOCK = 64;  // values that stay in the nearest cache while all queries use them
constexpr int AHEAD = 16;  // rows to fetch ahead
constexpr int WIDTH = 4;   // vectors of columns of a value that are blended at a time

// Fetches `bytes` of what follows AHEAD rows behind row j: behind the last row come those of `next`.
static inline void fetch_ahead(const Context& c, const stored* rows, const stored* next, int j, size_t offset,
                               int bytes) {
    int ahead = j + AHEAD;
    if (ahead >= c.seen) {
        if (!next) return;
        rows = next, ahead -= c.seen > AHEAD ? c.seen : AHEAD;
    }
    const char* at = (const char*)(rows + (size_t)ahead * c.stride + offset);
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// scores[q][j..] = queries[q] . keys[j..] for KEYS keys and QUERIES queries
template <int KEYS, int QUERIES>
static inline void score_tile(const Context& c, const real* queries, int j, real* scores) {
    const stored* keys = c.keys + (size_t)j * c.stride;
    Vector totals[QUERIES][KEYS] = {};
    int k = 0;
    for (; k + LANES <= c.dim; k += LANES) {
        Vector factors[QUERIES];
#pragma GCC unroll 8
        for (int q = 0; q < QUERIES; q++) factors[q] = load(queries + (size_t)q * c.dim + k);
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; i++) {
            Vector key = load(keys + (size_t)i * c.stride + k);
#pragma GCC unroll 8
            for (int q = 0; q < QUERIES; q++) totals[q][i] = fused(totals[q][i], factors[q], key);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; q++) {
        real* out = scores + (size_t)q * c.seen + j;
        sums<KEYS>(totals[q], out);
        for (int rest = k; rest < c.dim; rest++)
            for (int i = 0; i < KEYS; i++)
                out[i] += queries[(size_t)q * c.dim + rest] * number(keys[(size_t)i * c.stride + rest]);
    }
}

template <int KEYS>
static inline void score_keys(const Context& c, const real* queries, int count, int j, real* scores) {
    for (int i = 0; i < KEYS; i++) fetch_ahead(c, c.keys, c.values, j + i, 0, c.dim * sizeof(stored));
    in_strips(count, [&](auto many, int q) {
        score_tile<KEYS, many.value>(c, queries + (size_t)q * c.dim, j, scores + (size_t)q * c.seen);
    });
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

// out[q][k..] += sum of scores[q][j] * values[j][k..] over j in [from, to), for MANY vectors of columns
template <int MANY, int QUERIES>
static inline void blend_tile(const Context& c, const real* scores, int from, int to, real* out, int k, bool fetches) {
    Vector parts[QUERIES][MANY];
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
        for (int i = 0; i < MANY; i++) parts[q][i] = load(out + (size_t)q * c.dim + k + i * LANES);
    for (int j = from; j < to; j++) {
        const stored* value = c.values + (size_t)j * c.stride + k;
        if (fetches) fetch_ahead(c, c.values, c.next, j, k, MANY * LANES * sizeof(stored));
        Vector columns[MANY];
#pragma GCC unroll 8
        for (int i = 0; i < MANY; i++) columns[i] = load(value + i * LANES);
#pragma GCC unroll 8
        for (int q = 0; q < QUERIES; q++) {
            Vector share = splat(scores[(size_t)q * c.seen + j]);
#pragma GCC unroll 8
            for (int i = 0; i < MANY; i++) parts[q][i] = fused(parts[q][i], share, columns[i]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; q++)
#pragma GCC unroll 8
        for (int i = 0; i < MANY; i++) store(out + (size_t)q * c.dim + k + i * LANES, parts[q][i]);
}

template <int QUERIES>
static inline void blend(const Context& c, const real* scores, int from, int to, real* out, bool fetches) {
    int k = 0;
    for (; k + WIDTH * LANES <= c.dim; k += WIDTH * LANES)
        blend_tile<WIDTH, QUERIES>(c, scores, from, to, out, k, fetches);
    for (; k + LANES <= c.dim; k += LANES) blend_tile<1, QUERIES>(c, scores, from, to, out, k, fetches);
    for (; k < c.dim; k++)
        for (int q = 0; q < QUERIES; q++) {
            real& sum = out[(size_t)q * c.dim + k];
            for (int j = from; j < to; j++)
                sum += scores[(size_t)q * c.seen + j] * number(c.values[(size_t)j * c.stride + k]);
        }
}

// The keys and values of the head that lies `further` behind.
static inline Context head(const Context& c, int further) {
    size_t at = (size_t)further * c.dim;
    return {c.keys + at, c.values + at, c.seen, c.stride, c.dim, c.next ? c.next + at : nullptr};
}

// Attention to `heads` heads of keys and values that lie side by side, of `count` queries each: queries and out
// [heads, count, dim], scores [heads, count, seen]. All heads of some keys are read before the next keys.
static void attend(const Context& c, int heads, const real* queries, int count, real* scores, real* out) {
    const size_t wide = (size_t)count * c.dim, long_ = (size_t)count * c.seen;  // of a head
    auto score = [&](auto keys, int j) {
        for (int h = 0; h < heads; h++)
            score_keys<keys.value>(head(c, h), queries + h * wide, count, j, scores + h * long_);
    };
    int j = 0;
    for (; j + 4 <= c.seen; j += 4) score(Constant<4>{}, j);
    for (; j < c.seen; j++) score(Constant<1>{}, j);
    for (int q = 0; q < heads * count; q++) softmax(scores + (size_t)q * c.seen, c.seen);
    for (size_t i = 0; i < heads * wide; i++) out[i] = 0;
    for (int from = 0; from < c.seen; from += BLOCK)
        for (int h = 0; h < heads; h++) {
            int to = from + BLOCK < c.seen ? from + BLOCK : c.seen;
            in_strips(count, [&](auto many, int q) {
                const real* some = scores + h * long_ + (size_t)q * c.seen;
                blend<many.value>(head(c, h), some, from, to, out + h * wide + (size_t)q * c.dim, q == 0);
            });
        }
}
