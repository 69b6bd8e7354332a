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

// What a matrix is multiplied with, and what one thread needs for it.
struct Input {
    const operand* x;  // [tokens, in]
    int tokens;
    int far;     // a single token meets one row after the other, fetched so many bytes ahead; 0: several side by side
    real* wide;  // [WIDE_ROWS, in]
};

// Without an instruction for their type, rows that meet several strips of tokens are brought into the type of the
// activations once, not by every strip.
constexpr bool WIDENS = !std::is_same<weight, operand>::value;
constexpr int WIDE_ROWS = WIDENS ? 4 : 0;

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
        for (int k = in - in % Product<weight>::WIDTH; k < in; k++) y[n] += number(rows[(size_t)n * in + k]) * number(x[k]);
}

// y[t][n] = rows[n] . x[t] for ROWS rows of weights and TOKENS tokens.
template <int ROWS, int TOKENS, class Row>
static inline void tile(const Row* rows, const operand* x, int in, real y[TOKENS][ROWS], Ahead ahead) {
    using P = Product<weight>;
    Vector totals[TOKENS][ROWS] = {};
    for (int k = 0; k + P::WIDTH <= in; k += P::WIDTH) {
        if ((k & (ahead.span - 1)) == 0)
            for (int i = 0; i < ahead.lines; i++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
        typename P::Factor factors[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) factors[t] = P::get(x + (size_t)t * in + k);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            typename P::Factor w = P::get(rows + (size_t)n * in + k);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) P::add(totals[t][n], w, factors[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) finish<ROWS>(rows, x + (size_t)t * in, in, totals[t], y[t]);
}

// What whole vectors give of row . x, summed in the order in which a tile does it: bit for bit the same.
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

// y[n] = rows[n] . x for ROWS rows of weights and a single token, read in the order of addresses: some memories are faster
// so than with several rows side by side, while those hide the latency of the sums.
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

template <bool ADD, int ROWS, int TOKENS, class Row>
static inline void strip(const Matrix& m, int n, const Row* rows, const operand* x, real* y, int width, Ahead ahead) {
    real out[TOKENS][ROWS];
    tile<ROWS, TOKENS>(rows, x, m.in, out, ahead);
    for (int t = 0; t < TOKENS; t++) keep<ADD, ROWS>(m, n, out[t], y + (size_t)t * width);
}

// The tokens meet ROWS rows in strips, which share the work of fetching the rows after the next.
template <bool ADD, int ROWS, class Row>
static inline void strips(const Matrix& m, int n, const Row* rows, const Input& input, real* y, int width) {
    constexpr int STEP = Product<weight>::WIDTH, LINES = (ROWS * STEP * (int)sizeof(weight) + 63) / 64;
    int count = (input.tokens + MOST_TOKENS - 1) / MOST_TOKENS, lines = (LINES + count - 1) / count, span = STEP;
    while (2 * span * LINES <= count * STEP) span *= 2;
    const char* next = (const char*)(m.rows + ((size_t)n + 2 * ROWS) * m.in);
    const char* end = next + (size_t)ROWS * m.in * sizeof(weight);
    in_strips(input.tokens, [&](auto size, int t) {
        Ahead ahead{next, next < end ? lines : 0, span};
        strip<ADD, ROWS, size.value>(m, n, rows, input.x + (size_t)t * m.in, y + (size_t)t * width, width, ahead);
        next += (size_t)lines * (m.in / span) * 64;
    });
}

// y[t][n..] (+)= rows[n..] . x[t] for ROWS rows and all tokens.
template <bool ADD, int ROWS>
static inline void multiply_rows(const Matrix& m, int n, const Input& input, real* y, int width) {
    const weight* rows = m.rows + (size_t)n * m.in;
    if (input.tokens == 1 && input.far) {
        real out[ROWS];
        dots<ROWS>(rows, input, m.in, out);
        return keep<ADD, ROWS>(m, n, out, y);
    }
    if constexpr (WIDENS && ROWS <= WIDE_ROWS) {
        if (input.tokens > MOST_TOKENS) {
            for (int i = 0; i < ROWS * m.in; i++) input.wide[i] = number(rows[i]);
            return strips<ADD, ROWS>(m, n, input.wide, input, y, width);
        }
    }
    strips<ADD, ROWS>(m, n, rows, input, y, width);
}
