// The sums of embedding/op.py and fused_embedding/op.py: (word + token type) + position, rounded after each addition.
#pragma once

#include "tokens.h"

namespace lowbit {

// Ids of rows of a table, for the tokens one after the other; fewer ones repeat. native.py has the same.
struct Ids {
    const int64_t* ids;
    int64_t count, rows;

    int64_t of(int64_t token) const { return ids[token % count]; }
    bool valid() const {
        return std::all_of(ids, ids + count, [&](int64_t id) { return id >= 0 && id < rows; });
    }
};

// native.py has the same.
struct Embeddings {
    Ids words, types, positions;
    const uint8_t* packed;  // [words.rows, row_bytes]
    int64_t row_bytes, K;
    int bits;  // 1, 2 or 8
    const float* scale;
    const float* second;   // scale of a pair's second plane, or null
    int64_t scale_stride;  // 0: one for all rows
    const float *type_table, *position_table;  // [rows, K]
};

// What the codes 0 to 3 of 2 bits, or 0 and 1 of one, stand for in a row; again in the lanes after them.
inline Floats values_of(const Embeddings& op, int64_t row) {
    const Ints one = ints(1), code = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const auto sign = [&](int bit) {
        const Ints set = _mm512_and_si512(_mm512_srli_epi32(code, bit), one);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(set, set), one));
    };
    const Floats scale = floats(op.scale[row * op.scale_stride]);
    if (op.second) {
        const Floats second = floats(op.second[row * op.scale_stride]);
        return _mm512_add_ps(_mm512_mul_ps(sign(1), scale), _mm512_mul_ps(sign(0), second));
    }
    return _mm512_mul_ps(op.bits == 1 ? sign(0) : _mm512_cvtepi32_ps(_mm512_sub_epi32(code, one)), scale);
}

// `put` gets the values of a packed row from column k0 to k1, 16 at a time; VALUES of them lie in a byte.
template <int VALUES, class Put>
void unpack_row(const uint8_t* packed, Floats values, int64_t k0, int64_t k1, Put put) {
    for (int64_t byte = k0 / VALUES; byte / 32 * 32 * VALUES < k1; byte += LANES) {
        const Ints bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + byte)));
        const int64_t first = byte / 32 * 32 * VALUES + byte % 32;
#pragma GCC unroll 8
        for (int i = 0; i < VALUES; i++) {
            const int64_t k = first + 32 * i;
            // Only the last four bits of an index count, and values repeat: no mask.
            const Ints code = _mm512_srli_epi32(bytes, VALUES == 8 ? i : 6 - 2 * i);
            if (k < k1) put(k, _mm512_permutexvar_ps(code, values));
        }
    }
}

// Sums of one token -> out [k1 - k0], k0 a multiple of the columns in a block of the layout.
inline void embed(const Embeddings& op, int64_t token, int64_t k0, int64_t k1, float* out) {
    const int64_t row = op.words.of(token), K = op.K;
    const float* type = op.type_table + op.types.of(token) * K;
    const float* position = op.position_table + op.positions.of(token) * K;
    const uint8_t* packed = op.packed + row * op.row_bytes;
    const auto lanes = [&](int64_t k) { return first_lanes(std::min<int64_t>(LANES, k1 - k)); };
    const auto put = [&](int64_t k, Floats word) {
        const __mmask16 mask = lanes(k);
        const Floats sum = _mm512_add_ps(word, _mm512_maskz_loadu_ps(mask, type + k));
        _mm512_mask_storeu_ps(out + k - k0, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, position + k)));
    };
    if (op.bits == 2) return unpack_row<4>(packed, values_of(op, row), k0, k1, put);
    if (op.bits == 1) return unpack_row<8>(packed, values_of(op, row), k0, k1, put);
    const Floats scale = floats(op.scale[row * op.scale_stride]);
    for (int64_t k = k0; k < k1; k += LANES) {
        const Ints codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(k), packed + k));
        put(k, _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale));
    }
}

// Sums of a lot -> [K][16].
inline void embed_lot(const Embeddings& op, const Lot& lot, float* out) {
    constexpr int64_t COLUMNS = 256;  // a whole number of blocks of every layout
    alignas(64) float rows[LANES * COLUMNS];
    for (int64_t k = 0; k < op.K; k += COLUMNS) {
        const int64_t end = std::min(op.K, k + COLUMNS);
        for (int64_t i = 0; i < lot.count; i++) embed(op, lot.row + i, k, end, rows + i * COLUMNS);
        load_lot(rows, COLUMNS, lot.count, end - k, out + k * LANES);
    }
}

}  // namespace lowbit
