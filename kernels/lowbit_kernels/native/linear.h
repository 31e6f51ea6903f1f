// y[m, n] = act(x_scale[m] * scale[n] * (sum_k x[m, k] w[n, k] - x_zero_point[m] * w_sum[n]) + bias[n])
//
// and with an offset of the weights, x_scale[m] * offset[n] * (sum_k x[m, k] - K x_zero_point[m]) more.
//
// Packed weights are expanded, 32 rows of them at a time, to bytes that the matrix instructions take, used for up to
// 256 tokens and forgotten: in memory a weight stays at its bits. Layouts and their codes: packing.py.
#pragma once

#include "tokens.h"

namespace lowbit {

constexpr int64_t GROUP = 256;  // tokens that share an expansion, which then costs a tenth of their products

// Of packed weights; CODES and CODES_SPLIT: -1, 0 and 1, a byte each, as training has them ([N, K], [2, N, K]). TERNARY
// takes the code 2, too.
enum Layout { TERNARY, BINARY, SPLIT, CODES, CODES_SPLIT, INT8, INT4 };
enum Activation { NONE, GELU, GELU_TANH };

constexpr bool is_pair(int layout) { return layout == SPLIT || layout == CODES_SPLIT; }

// Codes in a byte.
constexpr int values_of(int layout) {
    return layout == BINARY ? 8 : layout == TERNARY || layout == SPLIT ? 4 : layout == INT4 ? 2 : 1;
}

// What is added to codes so that none is negative, as a power of two; binary ones are doubled besides.
constexpr int shift_of(int layout) { return layout == INT8 ? 7 : layout == INT4 ? 3 : 0; }

// Weights of a linear; native.py has the same.
struct Product {
    const uint8_t* packed;
    int64_t row_bytes, N;
    const float* scale;  // [N], of a pair [2, N]
    const float* w_sum;  // likewise; null where no zero point meets them
    const float* bias;   // [N] or null
    const float* offset; // of the weights, [N] or null
    int64_t layout;
};

// Codes of 16 rows -> tiles; rows past the last repeat it. Of a pair, codes 2 * b1 + b2, those of one plane.
template <int VALUES>
void expand(const uint8_t* packed, int64_t row_bytes, int64_t rows, int plane, bool split, uint8_t* tiles) {
    constexpr int BITS = 8 / VALUES;
    constexpr int TILES = VALUES / 2;  // that 32 bytes of a row go to, half of a row from each shift
    const Ints mask = _mm512_set1_epi8(split ? 1 : (1 << BITS) - 1);
    const int more = split && plane == 0 ? 1 : 0;
    Ints shifts[TILES];
    for (int t = 0; t < TILES; t++) {
        const auto shift = [&](int i) { return _mm256_set1_epi16(static_cast<short>((VALUES == 8 ? i : 8 - BITS - BITS * i) + more)); };
        shifts[t] = _mm512_inserti64x4(_mm512_castsi256_si512(shift(2 * t)), shift(2 * t + 1), 1);
    }
    for (int64_t byte = 0; byte < row_bytes; byte += 32) {
        uint8_t* out = tiles + byte * VALUES * LANES;
        for (int64_t row = 0; row < LANES; row++, out += STEP) {
            const uint8_t* in = packed + std::min(row, rows - 1) * row_bytes + byte;
            const Ints bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#pragma GCC unroll 4
            for (int t = 0; t < TILES; t++)
                _mm512_store_si512(out + t * STEP * LANES, _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts[t]), mask));
        }
    }
}

// The same of 16 rows of codes in bytes, to which `more` is added.
inline void expand_bytes(const uint8_t* codes, int64_t K, int64_t rows, int more, uint8_t* tiles) {
    const Ints added = _mm512_set1_epi8(static_cast<char>(more));
    for (int64_t k = 0; k < K; k += STEP) {
        const __mmask64 mask = K - k >= STEP ? ~0ull : (1ull << (K - k)) - 1;
        for (int64_t row = 0; row < LANES; row++, tiles += STEP) {
            const Ints bytes = _mm512_maskz_loadu_epi8(mask, codes + std::min(row, rows - 1) * K + k);
            _mm512_store_si512(tiles, _mm512_add_epi8(bytes, added));
        }
    }
}

// 16 rows from `n0` on of either kind, for a pair of the first or second plane.
template <int LAYOUT>
void expand_rows(const Product& w, int64_t n0, int64_t rows, int plane, uint8_t* tiles) {
    const uint8_t* first = w.packed + n0 * w.row_bytes;
    if constexpr (values_of(LAYOUT) == 1) {
        const int64_t skipped = LAYOUT == CODES_SPLIT ? plane * w.N * w.row_bytes : 0;
        expand_bytes(first + skipped, w.row_bytes, rows, 1 << shift_of(LAYOUT), tiles);
    } else {
        expand<values_of(LAYOUT)>(first, w.row_bytes, rows, plane, LAYOUT == SPLIT, tiles);
    }
}

template <int ACTIVATION>
inline Floats activated(Floats y) {
    return ACTIVATION == GELU ? gelu(y) : ACTIVATION == GELU_TANH ? gelu_tanh(y) : y;
}

// Sums of 32 rows (of a pair, 16 and 16) and of one or two lots -> results [n][16], a few at a time: beside the next
// product, whose matrix instructions leave the other units free.
template <int LAYOUT, int ACTIVATION, bool ZERO>
struct Finish {
    const Codes& x;
    const Product& w;
    int64_t features;
    float* out;
    const int32_t* c = nullptr;
    int64_t lot = 0, lots = 0, n0 = 0, column = 0, columns = 0;

    void next(const int32_t* sums, int64_t first_lot, int64_t count, int64_t first, int64_t width) {
        c = sums, lot = first_lot, lots = count, n0 = first, column = 0, columns = width;
    }

    // Up to `count` columns.
    void some(int64_t count) {
        for (const int64_t end = std::min(columns, column + count); column < end; column++)
            for (int64_t side = 0; side < lots; side++) one(column, side);
    }

    void one(int64_t j, int64_t side) const {
        const int64_t n = n0 + j, own = lot + side;
        const Ints x_sum = _mm512_load_si512(x.sum + own * LANES);
        const Floats zero = ZERO ? _mm512_load_ps(x.zero + own * LANES) : floats(0.0f);
        const auto scaled = [&](const int32_t* sums, int64_t of) {
            Ints exact = _mm512_load_si512(sums + side * LANES);  // codes are w + 1 (8, 128), or (w + 1) / 2
            if (LAYOUT == BINARY || LAYOUT == SPLIT) exact = _mm512_slli_epi32(exact, 1);
            Floats sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(exact, _mm512_slli_epi32(x_sum, shift_of(LAYOUT))));
            if (ZERO) sum = _mm512_sub_ps(sum, _mm512_mul_ps(zero, floats(w.w_sum[of])));
            return _mm512_mul_ps(sum, floats(w.scale[of]));
        };
        Floats y = scaled(c + j * BLOCK, n);
        if (is_pair(LAYOUT)) y = _mm512_add_ps(y, scaled(c + (LANES + j) * BLOCK, w.N + n));
        if (!is_pair(LAYOUT) && w.offset) {
            Floats sum = _mm512_cvtepi32_ps(x_sum);
            if (ZERO) sum = _mm512_sub_ps(sum, _mm512_mul_ps(zero, floats(static_cast<float>(x.K))));
            y = _mm512_add_ps(y, _mm512_mul_ps(sum, floats(w.offset[n])));
        }
        y = _mm512_fmadd_ps(y, _mm512_load_ps(x.scale + own * LANES), floats(w.bias ? w.bias[n] : 0.0f));
        _mm512_store_ps(out + (own * features + n) * LANES, activated<ACTIVATION>(y));
    }
};

// Memory that is wanted soon, in time; past the end of an array it does no harm.
inline void fetch(const uint8_t* first, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(first + at, _MM_HINT_T1);
}

template <int LAYOUT, int ACTIVATION, bool ZERO>
void team_linear(const Codes& x, const Product& w, float* out, int64_t features) {
    constexpr int WIDTH = is_pair(LAYOUT) ? LANES : BLOCK;
    constexpr int64_t LOTS = GROUP / LANES;
    const int64_t tile_bytes = round_up(w.row_bytes * values_of(LAYOUT), STEP) * LANES, lots = lots_of(x.M);
    const int64_t blocks = (w.N + WIDTH - 1) / WIDTH, groups = (lots + LOTS - 1) / LOTS;
    const int64_t steps = x.width / STEP;
    const int64_t share = steps ? (WIDTH + steps - 1) / steps : 0;
    static thread_local Scratch<uint8_t> scratch;
    uint8_t* first = scratch.get(2 * tile_bytes);
    uint8_t* second = first + tile_bytes;
    alignas(64) int32_t sums[2][BLOCK * BLOCK];
    int turn = 0;
    Finish<LAYOUT, ACTIVATION, ZERO> finish{x, w, features, out};
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t n0 = block * WIDTH, columns = std::min<int64_t>(WIDTH, w.N - n0);
            const int64_t next = is_pair(LAYOUT) ? 0 : std::min<int64_t>(LANES, columns - 1);
            expand_rows<LAYOUT>(w, n0, columns, 0, first);
            expand_rows<LAYOUT>(w, n0 + next, columns - next, 1, second);
            fetch(w.packed + (n0 + WIDTH) * w.row_bytes, WIDTH * w.row_bytes);
            const int64_t end = std::min(lots, (group + 1) * LOTS);
            for (int64_t lot = group * LOTS; lot < end; lot += 2, turn = 1 - turn) {
                const bool pair = lot + 1 < end;
                const int8_t* more = pair ? x.panel(lot + 1) : nullptr;
                product(first, second, x.panel(lot), more, x.width, sums[turn], [&] { finish.some(share); });
                finish.some(WIDTH);  // of inputs without values, which have no steps
                finish.next(sums[turn], lot, 1 + pair, n0, columns);
            }
        }
    }
    finish.some(WIDTH);
}

template <int LAYOUT, int ACTIVATION>
void team_linear(const Codes& x, const Product& w, float* out, int64_t features) {
    if (x.zero) return team_linear<LAYOUT, ACTIVATION, true>(x, w, out, features);
    team_linear<LAYOUT, ACTIVATION, false>(x, w, out, features);
}

template <int LAYOUT>
void team_linear(const Codes& x, const Product& w, int activation, float* out, int64_t features) {
    if (activation == GELU) return team_linear<LAYOUT, GELU>(x, w, out, features);
    if (activation == GELU_TANH) return team_linear<LAYOUT, GELU_TANH>(x, w, out, features);
    team_linear<LAYOUT, NONE>(x, w, out, features);
}

// Linears on one input -> lots of [features][16], one result after the other.
inline void team_linears(
    const Codes& x, const Product* products, int count, int activation, float* out, int64_t features) {
    for (const Product* w = products; w != products + count; out += w->N * LANES, w++) {
        switch (w->layout) {
            case TERNARY: team_linear<TERNARY>(x, *w, activation, out, features); break;
            case BINARY: team_linear<BINARY>(x, *w, activation, out, features); break;
            case SPLIT: team_linear<SPLIT>(x, *w, activation, out, features); break;
            case INT8: team_linear<INT8>(x, *w, activation, out, features); break;
            case INT4: team_linear<INT4>(x, *w, activation, out, features); break;
            case CODES: team_linear<CODES, NONE>(x, *w, out, features); break;
            case CODES_SPLIT: team_linear<CODES_SPLIT, NONE>(x, *w, out, features); break;
        }
    }
#pragma omp barrier
}

}  // namespace lowbit
