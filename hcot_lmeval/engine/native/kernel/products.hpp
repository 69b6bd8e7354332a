// Rows of weights times tokens, in one thread.

#pragma once

#include <cstddef>

#include "numbers.hpp"

// How a vector of weights meets a vector of activations: the type of the activations, and one multiply-add.
template <class T> struct Product {
    using operand = real;
    using Factor = Vector;
    static constexpr int WIDTH = LANES;
    template <class P> static Factor get(const P* p) { return load(p); }
    static void add(Vector& total, Factor w, Factor x) { total = fused(total, w, x); }
};
#if defined(__AVX512BF16__)
template <> struct Product<bfloat16> {
    using operand = bfloat16;
    using Factor = __m512bh;
    static constexpr int WIDTH = 32;
    static Factor get(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void add(Vector& total, Factor w, Factor x) { total = (Vector)_mm512_dpbf16_ps((__m512)total, w, x); }
};
#endif
using operand = Product<weight>::operand;

struct Matrix {
    const weight* rows;  // [out, in]
    const real* bias;    // [out] or null
    int out, in;
};

// What a matrix is multiplied with, and how.
struct Input {
    const operand* x;  // [tokens, in]
    int tokens;
    int far;  // a single token meets one row after the other, fetched so many bytes ahead; 0: several side by side
};

// Without an instruction for their type, weights that meet several strips of tokens are brought into the type of the
// activations once and not by every strip: a piece of some rows that stays in the nearest cache, for MANY tokens.
constexpr bool WIDENS = !std::is_same<weight, operand>::value;
constexpr int PIECE = 256, MANY = 64;

// Memory to fetch while computing: `lines` cache lines of 64 bytes for every `span` numbers of a row, a power of two.
// Spread evenly, or the processor's few places for lines under way are full, and computing waits.
struct Ahead {
    const char* from;
    int lines, span;
};

// y[n] = rows[n] . x, of which totals[n] holds what whole vectors gave.
template <int ROWS, class Row>
static inline void finish(const Row* rows, const operand* x, int in, const Vector totals[ROWS], real y[ROWS]) {
    sums<ROWS>(totals, y);
    for (int n = 0; n < ROWS; n++)
        for (int k = in - in % Product<weight>::WIDTH; k < in; k++)
            y[n] += number(rows[(size_t)n * in + k]) * number(x[k]);
}

// totals[t][n] += rows[n] . x[t] over the whole vectors of `count` numbers, for ROWS rows of weights, `stride` apart,
// and TOKENS tokens.
template <int ROWS, int TOKENS, class Row>
static inline void accumulate(const Row* rows, int stride, const operand* x, int in, int count,
                              Vector totals[TOKENS][ROWS], Ahead& ahead) {
    using P = Product<weight>;
    Vector held[TOKENS][ROWS];  // in registers, as the rest is
    const int lines = ahead.lines, span = ahead.span;
    const char* from = ahead.from;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) held[t][n] = totals[t][n];
    for (int k = 0; k + P::WIDTH <= count; k += P::WIDTH) {
        if ((k & (span - 1)) == 0)
            for (int i = 0; i < lines; i++, from += 64) __builtin_prefetch(from, 0, 2);
        typename P::Factor factors[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) factors[t] = P::get(x + (size_t)t * in + k);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            typename P::Factor w = P::get(rows + (size_t)n * stride + k);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) P::add(held[t][n], w, factors[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) totals[t][n] = held[t][n];
    ahead.from = from;
}

// What whole vectors give of row . x, summed in the order in which they are accumulated: bit for bit the same.
static inline Vector dot(const weight* row, const operand* x, int in, int far) {
    using P = Product<weight>;
    constexpr int STEPS = 4, SPAN = STEPS * P::WIDTH;
    Vector total = {};
    int k = 0;
    for (; k + SPAN <= in; k += SPAN) {
#pragma GCC unroll 8
        for (int i = 0; i < SPAN * (int)sizeof(weight); i += 64)
            __builtin_prefetch((const char*)(row + k) + far + i, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < SPAN; i += P::WIDTH) P::add(total, P::get(row + k + i), P::get(x + k + i));
    }
    for (; k + P::WIDTH <= in; k += P::WIDTH) P::add(total, P::get(row + k), P::get(x + k));
    return total;
}

// y[n] = rows[n] . x for ROWS rows of weights and a single token, read in the order of addresses: some memories are
// faster so than with several rows side by side, while those hide the latency of the sums.
template <int ROWS> static inline void dots(const weight* rows, const Input& input, int in, real y[ROWS]) {
    Vector totals[ROWS];
    for (int n = 0; n < ROWS; n++) totals[n] = dot(rows + (size_t)n * in, input.x, in, input.far);
    finish<ROWS>(rows, input.x, in, totals, y);
}

// What becomes of products with the rows from n on: they are stored at y, or added to what is there.
template <bool ADD, int ROWS> static inline void keep(const Matrix& m, int n, const real products[ROWS], real* y) {
    for (int i = 0; i < ROWS; i++) {
        real value = m.bias ? products[i] + m.bias[n + i] : products[i];
        y[n + i] = ADD ? y[n + i] + value : value;
    }
}

// What is fetched while `tokens` meet ROWS rows from n on: the rows after the next, their last byte being before `end`.
template <int ROWS> struct Fetch {
    Ahead ahead;
    const char* end;

    Fetch(const Matrix& m, int n, int tokens) {
        constexpr int STEP = Product<weight>::WIDTH, LINES = (ROWS * STEP * (int)sizeof(weight) + 63) / 64;
        int count = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
        ahead = {(const char*)(m.rows + ((size_t)n + 2 * ROWS) * m.in), (LINES + count - 1) / count, STEP};
        while (2 * ahead.span * LINES <= count * STEP) ahead.span *= 2;
        end = ahead.from + (size_t)ROWS * m.in * sizeof(weight);
    }
    Ahead& now() {
        if (ahead.from >= end) ahead.lines = 0;
        return ahead;
    }
};

// The tokens meet ROWS rows in strips, which share the work of fetching.
template <bool ADD, int ROWS>
static inline void strips(const Matrix& m, int n, const Input& input, real* y, int width) {
    const weight* rows = m.rows + (size_t)n * m.in;
    Fetch<ROWS> fetch(m, n, input.tokens);
    in_strips(input.tokens, [&](auto size, int first) {
        constexpr int TOKENS = size.value;
        const operand* x = input.x + (size_t)first * m.in;
        Vector totals[TOKENS][ROWS] = {};
        accumulate<ROWS, TOKENS>(rows, m.in, x, m.in, m.in, totals, fetch.now());
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            real out[ROWS];
            finish<ROWS>(rows, x + (size_t)t * m.in, m.in, totals[t], out);
            keep<ADD, ROWS>(m, n, out, y + (size_t)(first + t) * width);
        }
    });
}

// The same for MANY tokens at most, piece by piece of the rows, each of them widened first.
template <bool ADD, int ROWS>
static inline void widened_strips(const Matrix& m, int n, const Input& input, real* y, int width) {
    const weight* rows = m.rows + (size_t)n * m.in;
    Fetch<ROWS> fetch(m, n, input.tokens);
    Vector totals[MANY][ROWS];
    operand wide[ROWS * PIECE];
    for (int t = 0; t < input.tokens; t++)
        for (int i = 0; i < ROWS; i++) totals[t][i] = Vector{};
    for (int from = 0; from < m.in; from += PIECE) {
        int count = m.in - from < PIECE ? m.in - from : PIECE;
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < count; k++) put(wide + i * PIECE + k, number(rows[(size_t)i * m.in + from + k]));
        in_strips(input.tokens, [&](auto size, int t) {
            const operand* x = input.x + (size_t)t * m.in + from;
            accumulate<ROWS, size.value>(wide, PIECE, x, m.in, count, totals + t, fetch.now());
        });
    }
    for (int t = 0; t < input.tokens; t++) {
        real out[ROWS];
        finish<ROWS>(rows, input.x + (size_t)t * m.in, m.in, totals[t], out);
        keep<ADD, ROWS>(m, n, out, y + (size_t)t * width);
    }
}

// y[t][n..] (+)= rows[n..] . x[t] for ROWS rows and all tokens.
template <bool ADD, int ROWS>
static inline void multiply_rows(const Matrix& m, int n, const Input& input, real* y, int width) {
    if (input.tokens == 1 && input.far) {
        real out[ROWS];
        dots<ROWS>(m.rows + (size_t)n * m.in, input, m.in, out);
        keep<ADD, ROWS>(m, n, out, y);
    } else if (WIDENS && input.tokens > MOST_TOKENS) {
        for (int t = 0; t < input.tokens; t += MANY) {
            int count = input.tokens - t < MANY ? input.tokens - t : MANY;
            Input some{input.x + (size_t)t * m.in, count, input.far};
            widened_strips<ADD, ROWS>(m, n, some, y + (size_t)t * width, width);
        }
    } else {
        strips<ADD, ROWS>(m, n, input, y, width);
    }
}
