// Rows of weights times tokens, in one thread.

#pragma once

#include <cstddef>

#include "numbers.hpp"
#include "packed.hpp"

// How a vector of weights meets a vector of activations: the type of the activations, and one multiply-add.
template <class T> struct Product {
    using operand = real;
    using Factor = Vector;
    static constexpr int WIDTH = LANES;
    template <class P> static Factor get(const P* p) { return load(p); }
    static void add(Vector& total, Factor w, Factor x) { total = fused(total, w, x); }
};
#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
template <> struct Product<bfloat16> {
    using operand = bfloat16;
    using Factor = __m512bh;
    static constexpr int WIDTH = 32;
    static Factor get(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void add(Vector& total, Factor w, Factor x) { total = (Vector)_mm512_dpbf16_ps((__m512)total, w, x); }
};
#endif
using operand = Product<weight>::operand;

// The weights, and copies of them in fewer bits that have the same values, if there are any.
struct Matrix {
    const weight* rows;      // [out, in]
    const real* bias;        // [out] or null
    int out, in;
    const bfloat16* narrow;  // [out, in] or null
    const uint32_t* blocks;  // [out / SIDE, in / LANES, BLOCK_WORDS] or null: packed rows
    const uint8_t* bases;    // [out / SIDE, in / LANES]
};

// What a matrix is multiplied with, and how.
struct Input {
    const operand* x;  // [tokens, in]
    int tokens;
    int far;  // a single token meets one row (packed: SIDE) after the other, so many bytes ahead; 0: several side by side
};

// Tokens that meet some rows one strip after the other: activations of more would leave the nearer caches in between.
constexpr int MANY = 66;

// Without an instruction for their type, weights that meet several strips of tokens are brought into the type of the
// activations once and not by every strip: a piece of some rows that stays in the nearest cache.
template <class Row> constexpr bool WIDENS = !std::is_same<Row, operand>::value;
constexpr int PIECE = 256;

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

// Has a factor in a register of its own. Compilers rather load it anew for each product.
template <class Factor> static inline void hold([[maybe_unused]] Factor& factor) {
#if defined(__AVX__) && VECTOR_BYTES <= REGISTER_BYTES
    asm("" : "+v"(factor));
#endif
}

// totals[t][n] += rows[n] . x[t] over the whole vectors of `count` numbers, for ROWS rows of weights, `stride` apart,
// and TOKENS tokens. HOLD: factors are held, since loads would be the limit, and not the memory.
template <int ROWS, int TOKENS, bool HOLD, class Row>
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
        for (int t = 0; t < TOKENS; t++) {
            factors[t] = P::get(x + (size_t)t * in + k);
            if constexpr (HOLD) hold(factors[t]);
        }
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            typename P::Factor w = P::get(rows + (size_t)n * stride + k);
            if constexpr (HOLD) hold(w);
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

// The same over whole rows, with all registers to itself: elsewhere some of what it holds would go through memory.
template <int ROWS, int TOKENS, class Row>
__attribute__((noinline)) static void accumulate_apart(const Row* rows, const operand* x, int in,
                                                       Vector totals[TOKENS][ROWS], Ahead& ahead) {
    accumulate<ROWS, TOKENS, true>(rows, in, x, in, in, totals, ahead);
}

// What whole vectors give of row . x, summed in the order in which they are accumulated: bit for bit the same.
template <class Row> static inline Vector dot(const Row* row, const operand* x, int in, int far) {
    using P = Product<weight>;
    constexpr int STEPS = 4, SPAN = STEPS * P::WIDTH;
    Vector total = {};
    int k = 0;
    for (; k + SPAN <= in; k += SPAN) {
#pragma GCC unroll 8
        for (int i = 0; i < SPAN * (int)sizeof(Row); i += 64)
            __builtin_prefetch((const char*)(row + k) + far + i, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < SPAN; i += P::WIDTH) P::add(total, P::get(row + k + i), P::get(x + k + i));
    }
    for (; k + P::WIDTH <= in; k += P::WIDTH) P::add(total, P::get(row + k), P::get(x + k));
    return total;
}

// y[n] = rows[n] . x for ROWS rows of weights and a single token, read in the order of addresses: some memories are
// faster so than with several rows side by side, while those hide the latency of the sums.
template <int ROWS, class Row> static inline void dots(const Row* rows, const Input& input, int in, real y[ROWS]) {
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

// What is fetched while `tokens` meet ROWS rows: the rows after the next, their last byte being before `end`.
template <int ROWS, class Row> struct Fetch {
    Ahead ahead;
    const char* end;

    Fetch(const Row* rows, int in, int tokens) {
        constexpr int STEP = Product<weight>::WIDTH, LINES = (ROWS * STEP * (int)sizeof(Row) + 63) / 64;
        int count = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
        ahead = {(const char*)(rows + (size_t)2 * ROWS * in), (LINES + count - 1) / count, STEP};
        while (2 * ahead.span * LINES <= count * STEP) ahead.span *= 2;
        end = ahead.from + (size_t)ROWS * in * sizeof(Row);
    }
    Ahead& now() {
        if (ahead.from >= end) ahead.lines = 0;
        return ahead;
    }
};

// The tokens meet ROWS rows in strips, which share the work of fetching.
template <bool ADD, int ROWS, class Row>
static inline void strips(const Matrix& m, const Row* rows, int n, const Input& input, real* y, int width) {
    Fetch<ROWS, Row> fetch(rows, m.in, input.tokens);
    in_strips(input.tokens, [&](auto size, int first) {
        constexpr int TOKENS = size.value;
        const operand* x = input.x + (size_t)first * m.in;
        Vector totals[TOKENS][ROWS] = {};
        if (TOKENS > 2 || input.tokens > 2 * MOST_TOKENS)
            accumulate_apart<ROWS, TOKENS>(rows, x, m.in, totals, fetch.now());
        else
            accumulate<ROWS, TOKENS, false>(rows, m.in, x, m.in, m.in, totals, fetch.now());
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            real out[ROWS];
            finish<ROWS>(rows, x + (size_t)t * m.in, m.in, totals[t], out);
            keep<ADD, ROWS>(m, n, out, y + (size_t)(first + t) * width);
        }
    });
}

// The same piece by piece of the rows, each of them widened first.
template <bool ADD, int ROWS, class Row>
static inline void widened_strips(const Matrix& m, const Row* rows, int n, const Input& input, real* y, int width) {
    Fetch<ROWS, Row> fetch(rows, m.in, input.tokens);
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
            accumulate<ROWS, size.value, true>(wide, PIECE, x, m.in, count, totals + t, fetch.now());
        });
    }
    for (int t = 0; t < input.tokens; t++) {
        real out[ROWS];
        finish<ROWS>(rows, input.x + (size_t)t * m.in, m.in, totals[t], out);
        keep<ADD, ROWS>(m, n, out, y + (size_t)t * width);
    }
}

// y[t][n..] (+)= rows . x[t] for the ROWS rows from n on, which begin at `rows`, and MANY tokens at most.
template <bool ADD, int ROWS, class Row>
static inline void multiply_rows(const Matrix& m, const Row* rows, int n, const Input& input, real* y, int width) {
    if (input.tokens == 1 && input.far) {
        real out[ROWS];
        dots<ROWS>(rows, input, m.in, out);
        keep<ADD, ROWS>(m, n, out, y);
    } else if (WIDENS<Row> && input.tokens > MOST_TOKENS) {
        widened_strips<ADD, ROWS>(m, rows, n, input, y, width);
    } else {
        strips<ADD, ROWS>(m, rows, n, input, y, width);
    }
}

// The same for the rows [n, stop), of all of which `all` has the first.
template <bool ADD, class Row>
static inline void multiply_range(const Matrix& m, const Row* all, int n, int stop, const Input& input, real* y,
                                  int width) {
    auto rows = [&] { return all + (size_t)n * m.in; };
    if (2 * input.tokens <= MOST_TOKENS)  // the sums of 8 rows fit into registers, too
        for (; n + 8 <= stop; n += 8) multiply_rows<ADD, 8>(m, rows(), n, input, y, width);
    for (; n + 4 <= stop; n += 4) multiply_rows<ADD, 4>(m, rows(), n, input, y, width);
    for (; n < stop; n++) multiply_rows<ADD, 1>(m, rows(), n, input, y, width);
}

// A single token meets the packed rows from n on, a multiple of SIDE; returns the first that is left.
template <bool ADD> static inline int multiply_packed(const Matrix& m, int n, int stop, const Input& input, real* y) {
    const size_t across = m.in / LANES, first = n / SIDE * across;
    const uint32_t* block = m.blocks + first * BLOCK_WORDS;
    const uint8_t* base = m.bases + first;
    for (; n + SIDE <= stop; n += SIDE) {
        const weight* rows = m.rows + (size_t)n * m.in;
        Vector totals[SIDE] = {};
        for (int k = 0; k + LANES <= m.in; k += LANES, block += BLOCK_WORDS, base++) {
#pragma GCC unroll 8
            for (size_t i = 0; i < BLOCK_WORDS * 4; i += 64) __builtin_prefetch((const char*)block + input.far + i, 0, 2);
            Vector x = load(input.x + k);
            if (__builtin_expect(*base == MARK, 0))
                for (int i = 0; i < SIDE; i++) totals[i] = fused(totals[i], load(rows + (size_t)i * m.in + k), x);
            else unpack(block, *base, [&](int i, Vector w) { totals[i] = fused(totals[i], w, x); });
        }
        real out[SIDE];
        finish<SIDE>(rows, input.x, m.in, totals, out);
        keep<ADD, SIDE>(m, n, out, y);
    }
    return n;
}

// For more tokens than FEW arithmetic is the limit, and the fewer bytes of narrow rows do not pay for widening them.
constexpr int FEW = MOST_TOKENS > 4 ? MOST_TOKENS : 4;

// The same for the rows [n, stop), of the copy that serves so many tokens best.
template <bool ADD>
static inline void multiply_rows(const Matrix& m, int n, int stop, const Input& input, real* y, int width) {
    if constexpr (std::is_same<weight, float>::value) {
        if (m.narrow && input.tokens <= FEW) return multiply_range<ADD>(m, m.narrow, n, stop, input, y, width);
        if (m.blocks && input.tokens == 1) n = multiply_packed<ADD>(m, n, stop, input, y);
    }
    for (int t = 0; t < input.tokens; t += MANY) {
        int tokens = input.tokens - t < MANY ? input.tokens - t : MANY;
        Input some{input.x + (size_t)t * m.in, tokens, input.far};
        multiply_range<ADD>(m, m.rows, n, stop, some, y + (size_t)t * width, width);
    }
}
