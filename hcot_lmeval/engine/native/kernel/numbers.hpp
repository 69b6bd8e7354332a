// Types, vectors of numbers, and what is done with them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__FMA__)
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

#if defined(__AVX512F__)
#define REGISTER_BYTES 64
#elif defined(__AVX__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif
#ifndef VECTOR_BYTES  // may be given: compilers make wider vectors of several registers, so any host runs any width
#define VECTOR_BYTES REGISTER_BYTES
#endif
constexpr int BYTES = VECTOR_BYTES;
static_assert(BYTES == 16 || BYTES == 32 || BYTES == 64, "VECTOR_BYTES is 16, 32 or 64");
constexpr int MOST_TOKENS = BYTES == 64 ? 6 : BYTES == 32 ? 3 : 4;  // x 4 rows: sums and factors fit in registers
template <int N> using Constant = std::integral_constant<int, N>;
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

static inline Vector splat(real x) {
    Vector v;
    for (int i = 0; i < LANES; i++) v[i] = x;
    return v;
}

#if defined(__FMA__) && !defined(__AVX512F__) && VECTOR_BYTES == 64
static inline __m256 fused(__m256 total, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, total); }
static inline __m256d fused(__m256d total, __m256d a, __m256d b) { return _mm256_fmadd_pd(a, b, total); }
#endif

// total + a * b, rounded once where the processor can. Nothing is contracted unless it says so here: compilers would do
// it in one copy of a loop and not in another, and results would depend on what runs beside. A loop over std::fma
// becomes a single instruction for short code only.
static inline Vector fused(Vector total, Vector a, Vector b) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
    if constexpr (sizeof(real) == 4) return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
    else return (Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)total);
#elif defined(__FMA__) && VECTOR_BYTES == 64
    typedef real Half __attribute__((vector_size(32), may_alias));
    Half *sums = (Half*)&total, *left = (Half*)&a, *right = (Half*)&b;
    for (int i = 0; i < 2; i++) sums[i] = fused(sums[i], left[i], right[i]);
    return total;
#elif defined(__FMA__) && VECTOR_BYTES == 32
    if constexpr (sizeof(real) == 4) return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
    else return (Vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)total);
#elif defined(__FMA__)
    if constexpr (sizeof(real) == 4) return (Vector)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)total);
    else return (Vector)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)total);
#elif defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; i++) total[i] = std::fma(a[i], b[i], total[i]);
    return total;
#else
    return total + a * b;
#endif
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
#if VECTOR_BYTES >= 32
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
typedef int32_t Lanes __attribute__((vector_size(BYTES)));
#endif
typedef float Floats __attribute__((vector_size(BYTES)));
// A tree that halves four vectors together takes a third of the instructions of four separate sums.
static inline void sums(Floats a, Floats b, Floats c, Floats d, float out[4]) {
#if VECTOR_BYTES == 64
    Floats ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Floats cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Floats all = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all += SHUFFLE(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    all = SHUFFLE(all, all, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#else
    Floats ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    Floats cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    Floats all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6);  // a, a, c, c, b, b, d, d
    all = SHUFFLE(all, all, 0, 4, 2, 6, 0, 4, 2, 6);
#endif
    memcpy(out, &all, 4 * sizeof(float));
}
#endif

template <int COUNT> static inline void sums(const Vector* v, real* out) {
    if constexpr (COUNT % 4 == 0) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i += 4) sums(v[i], v[i + 1], v[i + 2], v[i + 3], out + i);
    } else {
        for (int i = 0; i < COUNT; i++) out[i] = sum(v[i]);
    }
}

// Calls work(size, start) for strips of [0, count) of even sizes, MOST_TOKENS at most; `size` is a constant.
template <class Work> static inline void in_strips(int count, Work work) {
    int start = 0;
    for (int left = (count + MOST_TOKENS - 1) / MOST_TOKENS; left; left--) {
        int size = (count - start + left - 1) / left;
        switch (size) {
            case 1: work(Constant<1>{}, start); break;
            case 2: work(Constant<2>{}, start); break;
            case 3: if constexpr (MOST_TOKENS >= 3) work(Constant<3>{}, start); break;
            case 4: if constexpr (MOST_TOKENS >= 4) work(Constant<4>{}, start); break;
            case 5: if constexpr (MOST_TOKENS >= 5) work(Constant<5>{}, start); break;
            default: if constexpr (MOST_TOKENS >= 6) work(Constant<6>{}, start); break;
        }
        start += size;
    }
}

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
