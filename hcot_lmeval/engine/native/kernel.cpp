// One decoding step of a Llama-like model on the CPU: embedding, all layers, logits, over the slots of a KV pool.
//
// Compiled at first use with WEIGHT = float, double or bfloat16 and CACHE, the type of keys and values, the same or
// bfloat16, for the processor at hand. Weights are read where the
// model has them, row-major [out, in], never copied or repacked. What makes it fast: one parallel region for the whole
// step; an output is a dot product along a row of weights: for one token one row after the other, as they lie in memory,
// for more tokens several rows by several tokens at a time in registers; the weights needed next are prefetched;
// attention reads exactly what is live. Vectors are those of GCC and Clang, so that nothing but the bfloat16
// instruction is bound to one family of processors.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>

#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef WEIGHT
#define WEIGHT float
#endif
#ifndef CACHE
#define CACHE WEIGHT
#endif

struct bfloat16 {
    uint16_t bits;
};
template <class T> struct Compute {
    using type = T;
};
template <> struct Compute<bfloat16> {
    using type = float;
};
using weight = WEIGHT;               // weights in memory
using stored = CACHE;                // keys and values in memory
using real = Compute<weight>::type;  // activations and sums

// ------------------------------------------------------------------------------------------------------------ numbers

#if defined(__AVX512F__)
constexpr int BYTES = 64, MOST_TOKENS = 6;  // 4 rows of weights x MOST_TOKENS sums, and their factors, fit in registers
#elif defined(__AVX__)
constexpr int BYTES = 32, MOST_TOKENS = 2;
#else
constexpr int BYTES = 16, MOST_TOKENS = 4;
#endif
constexpr int LANES = BYTES / sizeof(real);

typedef real Vector __attribute__((vector_size(BYTES)));
typedef real Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(real))));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

static inline Vector load(const real* p) { return *(const Unaligned*)p; }
static inline void store(real* p, Vector v) { *(Unaligned*)p = v; }
template <class T, class V = Vector> static inline V load(const T* p) {  // a bfloat16 is the upper half of a float
    return (V)(__builtin_convertvector(*(const Halves*)p, Words) << 16);
}

static inline real number(real x) { return x; }
static inline real number(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline void put(real* p, real x) { *p = x; }
static inline void put(bfloat16* p, real x) {  // to the nearest, ties to even; NaN stays NaN
    float value = (float)x;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    p->bits = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline real sum(Vector v) {
    real total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

template <class V> static inline void sums(V a, V b, V c, V d, real out[4]) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
#if defined(__AVX512F__)
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Lanes16){__VA_ARGS__})
typedef int32_t Lanes16 __attribute__((vector_size(64)));
#endif
typedef float Float16 __attribute__((vector_size(64)));
// A tree that halves four vectors together takes a third of the instructions of four separate sums.
static inline void sums(Float16 a, Float16 b, Float16 c, Float16 d, float out[4]) {
    Float16 ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Float16 cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Float16 all = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all += SHUFFLE(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    all = SHUFFLE(all, all, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    memcpy(out, &all, 4 * sizeof(float));
}
#endif

// exp by 2^n * 2^f with |f| <= 1/2 and the Taylor polynomial of 2^f, whose error is below a rounding of float.
static inline void exponentials(float* x, int count) {
#pragma omp simd
    for (int i = 0; i < count; i++) {
        float y = x[i] * 1.44269504088896341f;
        y = y < -126.f ? -126.f : y > 127.f ? 127.f : y;
        float n = __builtin_rintf(y), f = (y - n) * 0.69314718055994531f;
        float p = 1.f / 5040;
        p = p * f + 1.f / 720, p = p * f + 1.f / 120, p = p * f + 1.f / 24, p = p * f + 1.f / 6;
        p = p * f + .5f, p = p * f + 1.f, p = p * f + 1.f;
        int32_t scale = ((int32_t)n + 127) << 23;
        float power;
        memcpy(&power, &scale, 4);
        x[i] = p * power;
    }
}
static inline void exponentials(double* x, int count) {
    for (int i = 0; i < count; i++) x[i] = std::exp(x[i]);
}

// ---------------------------------------------------------------------------------------------------- matrix products

// How a vector of weights meets a vector of activations: the type of the activations, and one multiply-add.
template <class T> struct Product {
    using operand = real;
    using Factor = Vector;
    static constexpr int WIDTH = LANES;
    template <class P> static Factor get(const P* p) { return load(p); }
    static void add(Vector& total, Factor w, Factor x) { total += w * x; }
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

// Memory to fetch while computing: `lines` cache lines of 64 bytes for every step along a row.
struct Ahead {
    const char* from;
    int lines;
};

// y[n] = rows[n] . x, of which totals[n] holds what whole vectors gave.
template <int ROWS>
static inline void finish(const weight* rows, const operand* x, int in, const Vector totals[ROWS], real y[ROWS]) {
    if constexpr (ROWS % 4 == 0) {
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n += 4) sums(totals[n], totals[n + 1], totals[n + 2], totals[n + 3], y + n);
    } else {
        for (int n = 0; n < ROWS; n++) y[n] = sum(totals[n]);
    }
    for (int n = 0; n < ROWS; n++)
        for (int k = in - in % Product<weight>::WIDTH; k < in; k++) y[n] += number(rows[(size_t)n * in + k]) * number(x[k]);
}

// y[t][n] = rows[n] . x[t] for ROWS rows of weights and TOKENS tokens.
template <int ROWS, int TOKENS>
static inline void tile(const weight* rows, const operand* x, int in, real y[TOKENS][ROWS], Ahead ahead) {
    using P = Product<weight>;
    Vector totals[TOKENS][ROWS] = {};
    for (int k = 0; k + P::WIDTH <= in; k += P::WIDTH) {
        for (int i = 0; i < ahead.lines; i++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
        P::Factor factors[TOKENS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) factors[t] = P::get(x + (size_t)t * in + k);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            P::Factor w = P::get(rows + (size_t)n * in + k);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) P::add(totals[t][n], w, factors[t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) finish<ROWS>(rows, x + (size_t)t * in, in, totals[t], y[t]);
}

// What whole vectors give of row . x, summed in the order in which a tile does it: bit for bit the same.
static inline Vector dot(const weight* row, const operand* x, int in) {
    using P = Product<weight>;
    constexpr int STEPS = 4, SPAN = STEPS * P::WIDTH;
    constexpr int FAR = 2560;  // bytes; 2 to 3 KiB were the best of 0 to 32 on a Zen 4, by up to a third
    Vector total = {};
    int k = 0;
    for (; k + SPAN <= in; k += SPAN) {
#pragma GCC unroll 8
        for (int i = 0; i < SPAN * (int)sizeof(weight); i += 64)
            __builtin_prefetch((const char*)(row + k) + FAR + i, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < SPAN; i += P::WIDTH) P::add(total, P::get(row + k + i), P::get(x + k + i));
    }
    for (; k + P::WIDTH <= in; k += P::WIDTH) P::add(total, P::get(row + k), P::get(x + k));
    return total;
}

// y[n] = rows[n] . x for ROWS rows of weights and a single token. Here the memory is all that matters, and it is faster
// in the order of addresses than with several rows side by side.
template <int ROWS> static inline void dots(const weight* rows, const operand* x, int in, real y[ROWS]) {
    Vector totals[ROWS];
    for (int n = 0; n < ROWS; n++) totals[n] = dot(rows + (size_t)n * in, x, in);
    finish<ROWS>(rows, x, in, totals, y);
}

// What becomes of products with the rows from n on: they are stored at y, or added to what is there.
template <bool ADD, int ROWS> static inline void keep(const Matrix& m, int n, const real products[ROWS], real* y) {
    for (int i = 0; i < ROWS; i++) {
        real value = m.bias ? products[i] + m.bias[n + i] : products[i];
        y[n + i] = ADD ? y[n + i] + value : value;
    }
}

template <bool ADD, int ROWS, int TOKENS>
static inline void strip(const Matrix& m, int n, const operand* x, real* y, int width, Ahead ahead) {
    real out[TOKENS][ROWS];
    tile<ROWS, TOKENS>(m.rows + (size_t)n * m.in, x, m.in, out, ahead);
    for (int t = 0; t < TOKENS; t++) keep<ADD, ROWS>(m, n, out[t], y + (size_t)t * width);
}

template <bool ADD, int ROWS> static inline void single(const Matrix& m, int n, const operand* x, real* y) {
    real out[ROWS];
    dots<ROWS>(m.rows + (size_t)n * m.in, x, m.in, out);
    keep<ADD, ROWS>(m, n, out, y);
}

// The tokens meet ROWS rows of weights in strips, and the strips share the work of fetching the rows after the next.
template <bool ADD, int ROWS>
static inline void strips(const Matrix& m, int n, const operand* x, int tokens, real* y, int width) {
    if (tokens == 1) return single<ADD, ROWS>(m, n, x, y);
    constexpr int LINES = (ROWS * Product<weight>::WIDTH * (int)sizeof(weight) + 63) / 64;
    int count = (tokens + MOST_TOKENS - 1) / MOST_TOKENS, lines = (LINES + count - 1) / count;
    const char* next = (const char*)(m.rows + ((size_t)n + 2 * ROWS) * m.in);
    const char* end = next + (size_t)ROWS * m.in * sizeof(weight);
    for (int t = 0; t < tokens;) {
        const operand* from = x + (size_t)t * m.in;
        real* to = y + (size_t)t * width;
        int left = tokens - t, many = left < MOST_TOKENS ? left : MOST_TOKENS;
        Ahead ahead{next, next < end ? lines : 0};
        switch (many) {
            case 1: strip<ADD, ROWS, 1>(m, n, from, to, width, ahead); break;
            case 2: strip<ADD, ROWS, 2>(m, n, from, to, width, ahead); break;
            case 3: if constexpr (MOST_TOKENS >= 3) strip<ADD, ROWS, 3>(m, n, from, to, width, ahead); break;
            case 4: if constexpr (MOST_TOKENS >= 4) strip<ADD, ROWS, 4>(m, n, from, to, width, ahead); break;
            case 5: if constexpr (MOST_TOKENS >= 5) strip<ADD, ROWS, 5>(m, n, from, to, width, ahead); break;
            default: if constexpr (MOST_TOKENS >= 6) strip<ADD, ROWS, 6>(m, n, from, to, width, ahead); break;
        }
        next += (size_t)lines * (m.in / Product<weight>::WIDTH) * 64;
        t += many;
    }
}

// ------------------------------------------------------------------------------------------------------------ threads

// A part of some work: blocks that were taken, and those of them that are done.
struct alignas(64) Part {
    std::atomic<int> taken, done;
};

// One thread's view of a step. Work is split into a part for every thread, and parts into blocks; who is through with
// its own part goes on with those of the others. So a thread that the system has put aside delays the others by the
// block it holds and no more; at a barrier, all of them would wait for it.
class Team {
  public:
    Team(Part* parts, int rank, int size) : rank(rank), size(size), parts(parts) {}

    // Calls work(from, to) on blocks of [0, count), until all are taken. All threads call with the same numbers.
    template <class Work> void share(int count, int block, Work work) {
        int blocks = (count + block - 1) / block;
        totals[next % MOST] = blocks;
        Part* mine = parts + (size_t)next++ * size;
        for (int other = 0; other < size; other++) {
            int owner = (rank + other) % size, first = start(blocks, owner), last = start(blocks, owner + 1);
            for (int i; (i = first + mine[owner].taken.fetch_add(1, std::memory_order_relaxed)) < last;) {
                work(i * block, (i + 1) * block < count ? (i + 1) * block : count);
                mine[owner].done.fetch_add(1, std::memory_order_release);
            }
        }
    }

    // Waits until all that was shared so far is done.
    void together() {
        for (; waited < next; waited++)
            for (int owner = 0; owner < size; owner++) {
                int blocks = totals[waited % MOST], all = start(blocks, owner + 1) - start(blocks, owner);
                std::atomic<int>& done = parts[(size_t)waited * size + owner].done;
                for (int looks = 0; done.load(std::memory_order_acquire) < all;)
                    if (++looks > PATIENCE) std::this_thread::yield();
            }
    }

    const int rank, size;

  private:
    static constexpr int MOST = 4, PATIENCE = 1000;  // shares between two waits; looks before the processor is offered
    int start(int blocks, int owner) const { return (int)((long)blocks * owner / size); }
    Part* parts;
    int next = 0, waited = 0, totals[MOST];
};

// y[t][n] (+)= m.rows[n] . x[t] + m.bias[n]; y has rows of `width`.
template <bool ADD> static void multiply(Team& team, const Matrix& m, const operand* x, int tokens, real* y, int width) {
    int block = (m.out / (4 * team.size) + 7) / 8 * 8;
    team.share(m.out, block < 16 ? 16 : block, [&](int n, int stop) {
        if (tokens <= 3)
            for (; n + 8 <= stop; n += 8) strips<ADD, 8>(m, n, x, tokens, y, width);
        for (; n + 4 <= stop; n += 4) strips<ADD, 4>(m, n, x, tokens, y, width);
        for (; n < stop; n++) strips<ADD, 1>(m, n, x, tokens, y, width);
    });
}

// -------------------------------------------------------------------------------------------------------- parts of a layer

// x * weight / sqrt(mean(x^2) + eps) (arXiv 1910.07467)
template <class To> static void rms_norm(const real* x, const real* scale, int size, real eps, To* out) {
    Vector squares{};
    int k = 0;
    for (; k + LANES <= size; k += LANES) squares += load(x + k) * load(x + k);
    real total = sum(squares);
    for (; k < size; k++) total += x[k] * x[k];
    real factor = 1 / std::sqrt(total / size + eps);
    for (k = 0; k < size; k++) put(out + k, x[k] * factor * scale[k]);
}

// Rotary embedding, halves rotated against each other (arXiv 2104.09864, layout of GPT-NeoX).
static void rotate(real* x, const real* cosine, const real* sine, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        real low = x[i], high = x[i + half];
        x[i] = low * cosine[i] - high * sine[i];
        x[i + half] = high * cosine[i + half] + low * sine[i + half];
    }
}

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
            for (int i = 0; i < 4; i++) totals[i] += q * load(key + (size_t)i * c.stride + k);
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
#pragma GCC unroll 4
        for (int i = 0; i < MANY; i++) parts[i] += scores[j] * load(value + k + i * LANES);
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

// --------------------------------------------------------------------------------------------------------------- a step

extern "C" {

struct Layer {
    Matrix query, key, value, output, gate, up, down;
    const real *attention_norm, *mlp_norm;  // [hidden]
    const real *query_norm, *key_norm;      // [dim] or null
    stored *keys, *values;                  // of the pool: [slots x length, kv_heads, dim]
};

struct Model {
    const Layer* layers;
    const weight* embedding;  // [vocabulary, hidden]
    const real* norm;         // [hidden]
    Matrix head;
    int count, hidden, inner, heads, kv_heads, dim;
    double eps, scaling;
};

struct Step {
    int tokens, outputs, threads;
    const int64_t *ids, *positions;  // [tokens]
    const int64_t *first, *row;      // [tokens]: first row of the token's slot in the pool, and the token's own
    const int64_t* wanted;           // [outputs]: tokens whose logits are asked for
    const real *cosine, *sine;       // [positions, dim]
    real* logits;                    // [outputs, vocabulary]
    char* scratch;                   // scratch_bytes
};

// Bytes of scratch for steps of up to `tokens` tokens that see up to `seen` keys.
size_t scratch_bytes(const Model* model, int tokens, int seen, int threads);
void decode(const Model* model, const Step* step);
}

namespace {

size_t shares(const Model& m) { return (size_t)m.count * 12 + 3; }  // of the layers and around them

struct Scratch {
    Part* parts;  // [shares, threads]
    real *hidden, *query, *key, *value, *gate, *up, *mixed, *scores;
    operand* input;
};

char* take(char*& at, size_t bytes) {
    char* here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
}

// With `at` null, the pointers are offsets and the end is the size.
char* lay_out(Scratch& s, char* at, const Model& m, size_t tokens, size_t seen, size_t threads) {
    auto reals = [&](size_t count) { return (real*)take(at, count * sizeof(real)); };
    size_t group = m.heads / m.kv_heads, widest = m.inner > m.heads * m.dim ? m.inner : m.heads * m.dim;
    if ((size_t)m.hidden > widest) widest = m.hidden;
    s.parts = (Part*)take(at, shares(m) * threads * sizeof(Part));
    s.hidden = reals(tokens * m.hidden);
    s.query = reals(tokens * m.heads * m.dim);
    s.key = reals(tokens * m.kv_heads * m.dim);
    s.value = reals(tokens * m.kv_heads * m.dim);
    s.gate = reals(tokens * m.inner);
    s.up = reals(tokens * m.inner);
    s.mixed = reals(threads * group * m.dim);
    s.scores = reals(threads * group * seen);
    s.input = (operand*)take(at, tokens * widest * sizeof(operand));
    return at;
}

void norm_rows(Team& team, const Model& m, const real* x, const real* scale, int tokens, operand* out) {
    team.share(tokens, 1, [&](int t, int) {
        rms_norm(x + (size_t)t * m.hidden, scale, m.hidden, (real)m.eps, out + (size_t)t * m.hidden);
    });
}

// Turns a head's query or key: norm, rotation.
void turn(const Model& m, const Step& step, int token, const real* norm, real* x) {
    if (norm) rms_norm(x, norm, m.dim, (real)m.eps, x);
    size_t at = (size_t)step.positions[token] * m.dim;
    rotate(x, step.cosine + at, step.sine + at, m.dim);
}

// Queries are turned where they are; keys and values go to the pool.
void write_head(const Model& m, const Layer& layer, const Step& step, const Scratch& s, int token, int head) {
    if (head < m.heads) {
        real* query = s.query + ((size_t)token * m.heads + head) * m.dim;
        turn(m, step, token, layer.query_norm, query);
        for (int i = 0; i < m.dim; i++) query[i] *= (real)m.scaling;
        return;
    }
    head -= m.heads;
    size_t from = ((size_t)token * m.kv_heads + head) * m.dim;
    size_t to = ((size_t)step.row[token] * m.kv_heads + head) * m.dim;
    turn(m, step, token, layer.key_norm, s.key + from);
    for (int i = 0; i < m.dim; i++) put(layer.keys + to + i, s.key[from + i]);
    for (int i = 0; i < m.dim; i++) put(layer.values + to + i, s.value[from + i]);
}

void write_heads(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s) {
    int each = m.heads + m.kv_heads, units = step.tokens * each;
    team.share(units, units / (2 * team.size) + 1, [&](int unit, int stop) {
        for (; unit < stop; unit++) write_head(m, layer, step, s, unit / each, unit % each);
    });
}

// Attention of `count` query heads of one token, from `unit` on, that share a head of keys.
void mix_heads(const Model& m, const Layer& layer, const Step& step, const Scratch& s, int unit, int count,
               real* scores, real* mixed) {
    int token = unit / m.heads, group = m.heads / m.kv_heads, stride = m.kv_heads * m.dim;
    size_t at = (size_t)step.first[token] * stride + (size_t)(unit % m.heads / group) * m.dim;
    Context context{layer.keys + at, layer.values + at, (int)(step.row[token] - step.first[token]) + 1, stride, m.dim};
    attend(context, s.query + (size_t)unit * m.dim, count, scores, mixed);
    for (int i = 0; i < count * m.dim; i++) put(s.input + (size_t)unit * m.dim + i, mixed[i]);
}

// A block is a group of heads, or a single head where there are fewer groups than threads.
void mix(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s, int longest) {
    int group = m.heads / m.kv_heads;
    real *scores = s.scores + (size_t)team.rank * group * longest, *mixed = s.mixed + (size_t)team.rank * group * m.dim;
    team.share(step.tokens * m.heads, step.tokens * m.kv_heads < team.size ? 1 : group, [&](int unit, int stop) {
        mix_heads(m, layer, step, s, unit, stop - unit, scores, mixed);
    });
}

// silu(gate) * up for the columns [from, stop) of a token.
void activate_part(const Model& m, const Scratch& s, int token, int from, int stop) {
    real parts[64];
    for (int n = from; n < stop; n += 64) {
        int many = stop - n < 64 ? stop - n : 64;
        size_t at = (size_t)token * m.inner + n;
        for (int i = 0; i < many; i++) parts[i] = -s.gate[at + i];
        exponentials(parts, many);
        for (int i = 0; i < many; i++) put(s.input + at + i, s.gate[at + i] / (1 + parts[i]) * s.up[at + i]);
    }
}

void activate(Team& team, const Model& m, int tokens, const Scratch& s) {
    team.share(m.inner, (m.inner / team.size + 64) / 64 * 64, [&](int from, int stop) {
        for (int t = 0; t < tokens; t++) activate_part(m, s, t, from, stop);
    });
}

void run_layer(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s, int longest) {
    int tokens = step.tokens, wide = m.heads * m.dim, narrow = m.kv_heads * m.dim;
    norm_rows(team, m, s.hidden, layer.attention_norm, tokens, s.input);
    team.together();
    multiply<false>(team, layer.query, s.input, tokens, s.query, wide);
    multiply<false>(team, layer.key, s.input, tokens, s.key, narrow);
    multiply<false>(team, layer.value, s.input, tokens, s.value, narrow);
    team.together();
    write_heads(team, m, layer, step, s);
    team.together();
    mix(team, m, layer, step, s, longest);
    team.together();
    multiply<true>(team, layer.output, s.input, tokens, s.hidden, m.hidden);
    team.together();
    norm_rows(team, m, s.hidden, layer.mlp_norm, tokens, s.input);
    team.together();
    multiply<false>(team, layer.gate, s.input, tokens, s.gate, m.inner);
    multiply<false>(team, layer.up, s.input, tokens, s.up, m.inner);
    team.together();
    activate(team, m, tokens, s);
    team.together();
    multiply<true>(team, layer.down, s.input, tokens, s.hidden, m.hidden);
    team.together();
}

void read_embedding(const Model& m, const Step& step, const Scratch& s, int token) {
    const weight* from = m.embedding + (size_t)step.ids[token] * m.hidden;
    real* to = s.hidden + (size_t)token * m.hidden;
    for (int i = 0; i < m.hidden; i++) to[i] = number(from[i]);
}

void run(Team& team, const Model& m, const Step& step, const Scratch& s, int longest) {
    team.share(step.tokens, 1, [&](int t, int) { read_embedding(m, step, s, t); });
    team.together();
    for (int i = 0; i < m.count; i++) run_layer(team, m, m.layers[i], step, s, longest);
    team.share(step.outputs, 1, [&](int t, int) {
        rms_norm(s.hidden + (size_t)step.wanted[t] * m.hidden, m.norm, m.hidden, (real)m.eps,
                 s.input + (size_t)t * m.hidden);
    });
    team.together();
    multiply<false>(team, m.head, s.input, step.outputs, step.logits, m.head.out);
    team.together();
}

int most_seen(const Step& step) {
    int most = 1;
    for (int t = 0; t < step.tokens; t++) {
        int seen = (int)(step.row[t] - step.first[t]) + 1;
        if (seen > most) most = seen;
    }
    return most;
}

}  // namespace

size_t scratch_bytes(const Model* model, int tokens, int seen, int threads) {
    Scratch s;
    return (size_t)lay_out(s, nullptr, *model, tokens, seen, threads);
}

void decode(const Model* model, const Step* step) {
    Scratch s;
    int longest = most_seen(*step);
    lay_out(s, step->scratch, *model, step->tokens, longest, step->threads);
    for (size_t i = 0; i < shares(*model) * step->threads; i++) new (s.parts + i) Part{{0}, {0}};
#pragma omp parallel num_threads(step->threads)
    {
        Team team(s.parts, omp_get_thread_num(), omp_get_num_threads());
        run(team, *model, *step, s, longest);
    }
}
