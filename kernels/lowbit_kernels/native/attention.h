// Attention on 8- or 4-bit query, key, value and probabilities, within each sequence of a batch without padding.
//
//     scores = scaling * query_scale * key_scale * (query codes . key codes) + bias        the products are exact
//     probs  = softmax(scores), quantized per query and head
//     out    = probs_scale * sum_k (probs codes[q, k] - zero_point[q]) * value_scale[k] * value codes[k, d]
//
// The scale of a value stands inside of the last sum, so it is multiplied into the probabilities first; these are
// rounded to 24 bits of the largest of their row, as float32 would, and enter the product byte by byte. Lanes are
// queries.
#pragma once

#include "tokens.h"

namespace lowbit {

constexpr int BYTES = 3;
constexpr int WIDE = 127 << 16;  // its upper byte, rounded, is at most 127
constexpr int OFFSET = 128;  // what makes codes of keys and values unsigned

struct Attention {
    const float *query, *key, *value;                // [T, H, D]; heads follow each other, D side by side
    int64_t query_stride, key_stride, value_stride;  // between tokens
    int64_t T, H, D;
    int64_t queries;  // of each sequence, from its first token on; or all, where it has fewer
    float scaling;
    int bits;
    bool probs_symmetric;
    const float* bias;  // [h, q, k] by its strides, or null
    int64_t bias_head, bias_query, bias_key;
    float* out;         // [T, H, D]
    float* lse;         // [H, T], or null
    float* importance;  // [H, T], zeros at first, or null
    bool first_query_only;
};

// One head of one sequence: S tokens from row `start` on; inputs in lots of [D][16], `stride` floats apart.
struct Head {
    int64_t h, start, S;
    const float *query, *key, *value;
    int64_t stride;
};

struct AttentionBuffers {
    Scratch<uint8_t> keys, values;
    Scratch<int8_t> panels;
    Scratch<float> lots, scales, scores, out;
};

// Keys [D][16] -> a tile for every 64 of D; and their scales.
inline void expand_keys(const float* x, int64_t D, int64_t K, int bits, uint8_t* tiles, float* scale, int8_t* panel) {
    const Quantizer quantizer = quantizer_of(x, D, bits, true);
    _mm512_store_ps(scale, quantizer.scale);
    write_panel<true>(quantizer, x, D, K, panel);
    const Ints offset = _mm512_set1_epi8(static_cast<char>(OFFSET));
    for (int64_t k = 0; k < K; k += STEP, panel += STEP * LANES) {
        for (int64_t lane = 0; lane < LANES; lane += 4) {
            Ints words[4];
            transpose_words(panel + lane * 4, LANES * 4, LANES, words);
            for (int i = 0; i < 4; i++, tiles += STEP) _mm512_store_si512(tiles, _mm512_xor_si512(words[i], offset));
        }
    }
}

// Values [D][16] of lot `lot` -> 16 bytes of each row of tiles that have `keys` columns; and their scales.
inline void expand_values(const float* x, int64_t D, int64_t keys, int bits, int64_t lot, uint8_t* tiles, float* scale) {
    const Quantizer quantizer = quantizer_of(x, D, bits, true);
    _mm512_store_ps(scale, quantizer.scale);
    const __m128i offset = _mm_set1_epi8(static_cast<char>(OFFSET));
    const int64_t place = lot * LANES / STEP * STEP * LANES + lot * LANES % STEP;
    for (int64_t d = 0; d < D; d++) {
        const __m128i codes = _mm512_cvtsepi32_epi8(quantizer.code<true>(_mm512_load_ps(x + d * LANES)));
        uint8_t* row = tiles + d / LANES * LANES * keys + d % LANES * STEP + place;
        _mm_store_si128(reinterpret_cast<__m128i*>(row), _mm_xor_si128(codes, offset));
    }
}

// What `attend` does with the scores [S][32] of 16 queries, from lane 0 on.
struct Queries {
    const Attention& op;
    const Head& head;
    int64_t first, count, keys;
    float* scores;

    // Exponentials in place of the scores; then probabilities, a panel for each of their bytes, which are `size` apart.
    // Returns the factor of their product and, in `sums`, the sums of the bytes.
    Floats softmax(const float* value_scale, int8_t* panels, int64_t size, Ints sums[BYTES]) const {
        const int64_t S = head.S;
        Floats highest = floats(-INFINITY), sum[2] = {}, least = floats(1.0f);
        __mmask16 numbers = 0xffff;
        for (int64_t k = 0; k < S; k++) {
            const Floats score = _mm512_load_ps(scores + k * BLOCK);
            highest = _mm512_max_ps(score, highest);  // of those that are not NaN
            numbers &= _mm512_cmp_ps_mask(score, score, _CMP_ORD_Q);
        }
        for (int64_t k = 0; k < S; k++) {
            const Floats e = exponential(_mm512_sub_ps(_mm512_load_ps(scores + k * BLOCK), highest));
            _mm512_store_ps(scores + k * BLOCK, e);
            sum[k % 2] = _mm512_add_ps(sum[k % 2], e);
            least = _mm512_min_ps(e, least);  // NaN does not count here; it is in the sum
        }
        const Floats total = _mm512_add_ps(sum[0], sum[1]), inverse = _mm512_div_ps(floats(1.0f), total);
        // Without any key, all hidden by a bias, the sum is NaN too, but lse is that of nothing.
        const __mmask16 nothing = numbers & _mm512_cmp_ps_mask(highest, floats(-INFINITY), _CMP_EQ_OQ);
        report(highest, _mm512_mask_blend_ps(nothing, total, floats(1.0f)), inverse);
        // The largest exponential is 1.
        const Quantizer quantizer(_mm512_mul_ps(least, inverse), inverse, op.bits, op.probs_symmetric);
        const Floats limit = _mm512_sub_ps(floats(static_cast<float>(quantizer.most)), quantizer.zero);
        const Ints magnitude = ints(0x7fffffff);
        Ints most = ints(0);
        for (int64_t k = 0; k < S; k++) {
            const Floats p = _mm512_mul_ps(_mm512_load_ps(scores + k * BLOCK), inverse);
            // Code minus zero point; the lower end needs no limit, the lowest rounds to it.
            const Floats code = _mm512_min_ps(limit, rounded(_mm512_mul_ps(p, quantizer.inverse)));
            const Floats value = _mm512_mul_ps(code, floats(value_scale[k]));  // not negative
            _mm512_store_ps(scores + k * BLOCK, value);
            most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, bits_of(value)));  // NaN is beyond all
        }
        const Floats largest = from_bits(most), wide = floats(static_cast<float>(WIDE));
        const __mmask16 some = _mm512_cmp_ps_mask(largest, floats(0.0f), _CMP_GT_OQ);
        write_bytes(_mm512_maskz_div_ps(some, wide, largest), panels, size, sums);
        return _mm512_mul_ps(quantizer.scale, _mm512_div_ps(largest, wide));
    }

    void write_bytes(Floats inverse, int8_t* panels, int64_t size, Ints sums[BYTES]) const {
        const Ints ones = _mm512_set1_epi8(1), half = ints(128);
        std::fill(sums, sums + BYTES, ints(0));
        for (int64_t k = 0; k < keys; k += 4) {
            Ints rest[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Floats value = k + i < head.S ? _mm512_load_ps(scores + (k + i) * BLOCK) : floats(0.0f);
                rest[i] = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
            }
#pragma GCC unroll 3
            for (int byte = 0; byte < BYTES; byte++) {
                // A last byte counts as signed, and what is above it makes up for that.
                const Ints bytes = last_bytes(rest[0], rest[1], rest[2], rest[3]);
                _mm512_store_si512(panels + byte * size + k * LANES, bytes);
                sums[byte] = _mm512_dpbusd_epi32(sums[byte], ones, bytes);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) rest[i] = _mm512_srai_epi32(_mm512_add_epi32(rest[i], half), 8);
            }
        }
    }

    // lse and importance, where asked for.
    void report(Floats highest, Floats total, Floats inverse) const {
        if (op.lse) {
            alignas(64) float base[LANES], sum[LANES];
            _mm512_store_ps(base, highest);
            _mm512_store_ps(sum, total);
            float* lse = op.lse + head.h * op.T + head.start + first;
            for (int64_t lane = 0; lane < count; lane++) lse[lane] = base[lane] + std::log(sum[lane]);
        }
        if (op.importance && (first == 0 || !op.first_query_only)) {
            const __mmask16 lanes = first_lanes(op.first_query_only ? 1 : count);
            float* received = op.importance + head.h * op.T + head.start;
            for (int64_t k = 0; k < head.S; k++)
                received[k] += _mm512_mask_reduce_add_ps(lanes, _mm512_mul_ps(_mm512_load_ps(scores + k * BLOCK), inverse));
        }
    }

    void add_bias() const {
        const float* bias = op.bias + head.h * op.bias_head + first * op.bias_query;
        for (int64_t k = 0; k < head.S; k++)
            for (int64_t lane = 0; lane < count; lane++)
                scores[k * BLOCK + lane] += bias[lane * op.bias_query + k * op.bias_key];
    }
};

inline void attend(const Attention& op, const Head& head, AttentionBuffers& buffers) {
    const int64_t S = head.S, D = op.D, Q = std::min(S, op.queries), keys = round_up(S, STEP);
    const int64_t K = round_up(D, STEP), V = round_up(D, BLOCK);
    uint8_t* key_tiles = buffers.keys.get(round_up(S, BLOCK) * K);
    uint8_t* value_tiles = buffers.values.get(keys * V);
    const int64_t size = 2 * LANES * keys;  // of the panels of a byte of the probabilities
    int8_t* query_panels = buffers.panels.get(2 * LANES * K + BYTES * size);
    int8_t* panels = query_panels + 2 * LANES * K;
    float* key_scale = buffers.scales.get(2 * keys);
    float* value_scale = key_scale + keys;
    float* scores = buffers.scores.get(round_up(S, BLOCK) * BLOCK);
    float* out = buffers.out.get(D * LANES);
    for (int64_t lot = 0; lot < lots_of(S); lot++) {
        uint8_t* tiles = key_tiles + lot * LANES * K;
        expand_keys(head.key + lot * head.stride, D, K, op.bits, tiles, key_scale + lot * LANES, query_panels);
        expand_values(head.value + lot * head.stride, D, keys, op.bits, lot, value_tiles, value_scale + lot * LANES);
    }

    alignas(64) int32_t c[BYTES][BLOCK * BLOCK];
    for (int64_t lot = 0; lot < lots_of(Q); lot += 2) {
        const bool pair = lot + 1 < lots_of(Q);
        Floats query_scale[2], factor[2];
        Ints query_sum[2], sums[2][BYTES];
        for (int side = 0; side <= pair; side++) {
            const float* query = head.query + (lot + side) * head.stride;
            const Quantizer quantizer = quantizer_of(query, D, op.bits, true);
            query_scale[side] = _mm512_mul_ps(quantizer.scale, floats(op.scaling));
            const Ints sum = write_panel<true>(quantizer, query, D, K, query_panels + side * LANES * K);
            query_sum[side] = _mm512_mullo_epi32(ints(OFFSET), sum);
        }
        for (int64_t k = 0; k < S; k += BLOCK) {
            const uint8_t* tiles = key_tiles + k * K;
            const uint8_t* more = k + LANES < S ? tiles + LANES * K : tiles;
            product(tiles, more, query_panels, pair ? query_panels + LANES * K : nullptr, K, c[0]);
            for (int64_t j = 0; j < std::min<int64_t>(BLOCK, S - k); j++) {
                const Floats scale = floats(key_scale[k + j]);
                for (int side = 0; side <= pair; side++) {
                    const Ints exact = _mm512_sub_epi32(_mm512_load_si512(c[0] + j * BLOCK + side * LANES), query_sum[side]);
                    const Floats score = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), query_scale[side]), scale);
                    _mm512_store_ps(scores + (k + j) * BLOCK + side * LANES, score);
                }
            }
        }
        for (int side = 0; side <= pair; side++) {
            const Lot rows = lot_of(lot + side, Q);
            const Queries queries{op, head, rows.row, rows.count, keys, scores + side * LANES};
            if (op.bias) queries.add_bias();
            factor[side] = queries.softmax(value_scale, panels + side * LANES * keys, size, sums[side]);
            for (Ints& sum : sums[side]) sum = _mm512_mullo_epi32(ints(OFFSET), sum);
        }
        for (int64_t d = 0; d < D; d += BLOCK) {
            const uint8_t *tiles = value_tiles + d * keys, *more = tiles + LANES * keys;
            for (int byte = 0; byte < BYTES; byte++) {
                const int8_t* own = panels + byte * size;
                product(tiles, more, own, pair ? own + LANES * keys : nullptr, keys, c[byte]);
            }
            const int64_t columns = std::min<int64_t>(BLOCK, D - d);
            for (int side = 0; side <= pair; side++) {
                for (int64_t j = 0; j < columns; j++) {
                    Floats y = floats(0.0f);
                    for (int byte = BYTES - 1; byte >= 0; byte--) {
                        const Ints sum = _mm512_load_si512(c[byte] + j * BLOCK + side * LANES);
                        const Floats exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, sums[side][byte]));
                        y = _mm512_fmadd_ps(y, floats(256.0f), exact);
                    }
                    _mm512_store_ps(out + j * LANES, _mm512_mul_ps(y, factor[side]));
                }
                const Lot rows = lot_of(lot + side, Q);
                store_lot(out, columns, op.out + ((head.start + rows.row) * op.H + head.h) * D + d, op.H * D, rows.count);
            }
        }
    }
}

// All heads of the sequences that begin at `starts` [B + 1].
inline void team_attention(const Attention& op, const int32_t* starts, int64_t B) {
    static thread_local AttentionBuffers buffers;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * op.H; task++) {
        const int64_t start = starts[task / op.H], S = starts[task / op.H + 1] - start, h = task % op.H;
        if (S == 0) continue;
        const int64_t lots = lots_of(S), stride = op.D * LANES;
        float* query = buffers.lots.get(3 * lots * stride);
        float *key = query + lots * stride, *value = key + lots * stride;
        for (int64_t lot = 0; lot < lots; lot++) {
            const auto [row, count] = lot_of(lot, S);
            const int64_t token = start + row, head = h * op.D;
            load_lot(op.query + token * op.query_stride + head, op.query_stride, count, op.D, query + lot * stride);
            load_lot(op.key + token * op.key_stride + head, op.key_stride, count, op.D, key + lot * stride);
            load_lot(op.value + token * op.value_stride + head, op.value_stride, count, op.D, value + lot * stride);
        }
        attend(op, {h, start, S, query, key, value, stride}, buffers);
    }
}

}  // namespace lowbit
