// int8 products of 32 x 32 results, unsigned a [32, K] x signed b [K, 32 tokens], laid out for AMX and for VNNI alike.
//
// a stands in tiles of 16 rows and 64 values, one tile after the other along K; b in panels of 16 tokens, each
// [K / 4][16 tokens][4]. So a tile of either is 1 KiB in one piece.
#pragma once

#include "vector.h"

namespace lowbit {

constexpr int STEP = 64;           // values of K that a tile holds
constexpr int BLOCK = 2 * LANES;   // rows and tokens of what `product` computes

#ifdef __AMX_INT8__

// A thread sets its tiles up before products and gives them back after: state that a switch of threads would save.
struct Tiles {
    Tiles() {
        static const struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// c[32][32] of two lots of 16 rows and, b0 and b1, of tokens; without b1, of 16 tokens: the rest of c stays as it is.
template <class Beside>
void product(
    const uint8_t* a0, const uint8_t* a1, const int8_t* b0, const int8_t* b1, int64_t K, int32_t* c, Beside beside) {
    asm volatile("" ::: "memory");  // the tile instructions of GCC 12 do not say that they read memory
    _tile_zero(0);
    _tile_zero(2);
    if (b1 == nullptr) {
        for (int64_t at = 0; at < K * LANES; at += STEP * LANES) {
            _tile_loadd(4, a0 + at, STEP);
            _tile_loadd(6, b0 + at, STEP);
            _tile_loadd(5, a1 + at, STEP);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(2, 5, 6);
            beside();
        }
    } else {
        _tile_zero(1);
        _tile_zero(3);
        for (int64_t at = 0; at < K * LANES; at += STEP * LANES) {
            _tile_loadd(4, a0 + at, STEP);
            _tile_loadd(6, b0 + at, STEP);
            _tile_loadd(5, a1 + at, STEP);
            _tile_loadd(7, b1 + at, STEP);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
            beside();
        }
        _tile_stored(1, c + LANES, BLOCK * 4);
        _tile_stored(3, c + LANES * BLOCK + LANES, BLOCK * 4);
    }
    _tile_stored(0, c, BLOCK * 4);
    _tile_stored(2, c + LANES * BLOCK, BLOCK * 4);
}

#else

struct [[maybe_unused]] Tiles {};

// Eight rows of a times 16 tokens.
inline void product_of_rows(const uint8_t* a, const int8_t* b, int64_t K, int32_t* c) {
    constexpr int ROWS = 8;
    Ints sums[ROWS] = {};
    for (int64_t k = 0; k < K; k += 4) {
        const Ints x = _mm512_load_si512(b + k * LANES);
        const uint8_t* codes = a + k / STEP * STEP * LANES + k % STEP;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            std::memcpy(&four, codes + r * STEP, 4);
            sums[r] = _mm512_dpbusd_epi32(sums[r], ints(four), x);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) _mm512_store_si512(c + r * BLOCK, sums[r]);
}

template <class Beside>
void product(
    const uint8_t* a0, const uint8_t* a1, const int8_t* b0, const int8_t* b1, int64_t K, int32_t* c, Beside beside) {
    for (int64_t k = 0; k < K; k += STEP) beside();
    for (int row = 0; row < BLOCK; row += 8) {
        const uint8_t* a = (row < LANES ? a0 : a1) + row % LANES * STEP;
        product_of_rows(a, b0, K, c + row * BLOCK);
        if (b1 != nullptr) product_of_rows(a, b1, K, c + row * BLOCK + LANES);
    }
}

#endif

inline void product(
    const uint8_t* a0, const uint8_t* a1, const int8_t* b0, const int8_t* b1, int64_t K, int32_t* c) {
    product(a0, a1, b0, b1, K, c, [] {});
}

}  // namespace lowbit
