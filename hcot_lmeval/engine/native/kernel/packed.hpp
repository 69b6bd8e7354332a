// Rows of float weights in 28 bits a number, without loss: the exponents of weights that lie together differ little.
//
// A matrix is cut into blocks of SIDE rows and LANES columns, which lie in memory as they are read. If the exponents of
// a block differ by less than 16, a number is its sign, what its exponent is above the block's base, and its
// mantissa. So the words of seven rows have four bits to spare each, and there the numbers of the eighth are. Other
// blocks are marked, and read from the rows themselves.
// (Exponents of bfloat16 in codes of varying length, for other processors: arXiv 2504.11651.)

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "numbers.hpp"

constexpr int SIDE = 8, MANTISSA = 23;
constexpr uint8_t MARK = 255;
constexpr uint32_t SIGN = 0x80000000, SPARE = 0x78000000, REST = 0x07ffffff;  // REST: what is above the base, mantissa
constexpr size_t BLOCK_WORDS = (SIDE - 1) * LANES;

// Calls use(row, vector) for the rows of a block.
template <class Use, class V = Vector> static inline void unpack(const uint32_t* block, uint8_t base, Use use) {
    typedef uint32_t Loaded __attribute__((vector_size(LANES * 4), aligned(4)));
    const Words above = Words{} + ((uint32_t)base << MANTISSA);
    Words last = {};
#pragma GCC unroll 8
    for (int i = 0; i < SIDE - 1; i++) {
        Words w = *(const Loaded*)(block + i * LANES);
        last |= (w & SPARE) >> 4 * (SIDE - 2 - i);
        use(i, (V)((w & (SIGN | REST)) + above));
    }
    last = ((last << 1) & SIGN) | ((last >> 3) & REST);  // 28 bits, from the fourth on
    use(SIDE - 1, (V)(last + above));
}

// Packs the block at `rows`; returns its base, or MARK.
static uint8_t pack_block(const float* rows, int in, uint32_t* block) {
    uint32_t words[SIDE * LANES];
    int least = 255, most = 0;
    for (int i = 0; i < SIDE; i++) memcpy(words + i * LANES, rows + (size_t)i * in, LANES * sizeof(float));
    for (uint32_t word : words) {
        int exponent = word >> MANTISSA & 255;
        least = exponent < least ? exponent : least, most = exponent > most ? exponent : most;
    }
    if (most - least > 15) return MARK;
    int base = least < 240 ? least : 240;
    for (uint32_t& word : words) word -= (uint32_t)base << MANTISSA;
    for (int i = 0; i < SIDE - 1; i++)
        for (int k = 0; k < LANES; k++) {
            uint32_t last = words[(SIDE - 1) * LANES + k], whole = (last & REST) | (last & SIGN) >> 4;
            block[i * LANES + k] = words[i * LANES + k] | (whole >> 4 * i & 15) << 27;
        }
    return (uint8_t)base;
}
