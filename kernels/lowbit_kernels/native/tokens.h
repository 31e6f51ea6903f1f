// Tokens in lots of 16, and what takes each token for itself. Functions named `team_` are called by all threads of a
// parallel region, share the work and end with a barrier.
#pragma once

#include "product.h"

namespace lowbit {

// The rows of a tensor that are one lot.
struct Lot {
    int64_t row, count;
};

inline int64_t lots_of(int64_t M) { return (M + LANES - 1) / LANES; }
inline Lot lot_of(int64_t lot, int64_t M) { return {lot * LANES, std::min<int64_t>(LANES, M - lot * LANES)}; }

// Rows of K floats -> [K][16]; lanes past the last row repeat it. `see` is shown every vector.
template <class See>
void load_lot(const float* rows, int64_t stride, int64_t count, int64_t K, float* out, See see) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
        Ints words[4];
        transpose_words(rows + k, stride * 4, count, words);
        for (int i = 0; i < 4; i++) {
            _mm512_store_si512(out + (k + i) * LANES, words[i]);
            see(_mm512_castsi512_ps(words[i]));
        }
    }
    for (; k < K; k++) {
        for (int64_t lane = 0; lane < LANES; lane++) out[k * LANES + lane] = rows[std::min(lane, count - 1) * stride + k];
        see(_mm512_load_ps(out + k * LANES));
    }
}

inline void load_lot(const float* rows, int64_t stride, int64_t count, int64_t K, float* out) {
    load_lot(rows, stride, count, K, out, [](Floats) {});
}

inline Extremes load_lot(const float* rows, int64_t stride, int64_t count, int64_t K, float* out, bool symmetric) {
    Extremes seen{symmetric};
    load_lot(rows, stride, count, K, out, [&](Floats x) { seen.add(x); });
    return seen;
}

// The way back.
inline void store_lot(const float* x, int64_t K, float* rows, int64_t stride, int64_t count) {
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        for (int64_t lane = 0; lane < count; lane += 4) {
            Ints words[4];
            transpose_words(x + k * LANES + lane, LANES * 4, LANES, words);
            for (int64_t i = 0; i < std::min<int64_t>(4, count - lane); i++)
                _mm512_storeu_si512(rows + (lane + i) * stride + k, words[i]);
        }
    }
    for (; k < K; k++)
        for (int64_t lane = 0; lane < count; lane++) rows[lane * stride + k] = x[k * LANES + lane];
}

// Quantized tokens: panels for `product`, K values padded with zeros to `width`, a multiple of 64.
struct Codes {
    int64_t M, K, width;
    int8_t* q;      // of every lot, [width / 4][16][4]
    float* scale;   // [lots * 16]
    float* zero;    // zero points, or null for symmetric codes
    int32_t* sum;   // [lots * 16], of a token's codes

    int8_t* panel(int64_t lot) const { return q + lot * width * LANES; }
};

// Memory of codes.
struct CodesBuffer {
    Scratch<int8_t> q;
    Scratch<float> scale, zero;
    Scratch<int32_t> sum;

    Codes get(int64_t M, int64_t K, bool symmetric) {
        const int64_t width = round_up(K, STEP), rows = lots_of(M) * LANES;
        return {M, K, width, q.get(rows * width), scale.get(rows), symmetric ? nullptr : zero.get(rows), sum.get(rows)};
    }
};

// [K][16] -> a panel of `width` values; returns the sums of the codes.
template <bool SYMMETRIC>
Ints write_panel(const Quantizer& quantizer, const float* x, int64_t K, int64_t width, int8_t* panel) {
    const Ints ones = _mm512_set1_epi8(1);
    Ints sum = ints(0);
    const auto code = [&](int64_t k) { return k < K ? quantizer.code<SYMMETRIC>(_mm512_load_ps(x + k * LANES)) : ints(0); };
    const auto write = [&](int64_t k, Ints bytes) {
        sum = _mm512_dpbusd_epi32(sum, ones, bytes);
        _mm512_store_si512(panel + k * LANES, bytes);
    };
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
        const auto next = [&](int i) { return quantizer.code<SYMMETRIC>(_mm512_load_ps(x + (k + i) * LANES)); };
        write(k, saturated_bytes(next(0), next(1), next(2), next(3)));
    }
    for (; k < width; k += 4) write(k, saturated_bytes(code(k), code(k + 1), code(k + 2), code(k + 3)));
    return sum;
}

inline Ints write_panel(bool symmetric, const Quantizer& quantizer, const float* x, int64_t K, int64_t width, int8_t* panel) {
    const auto write = symmetric ? write_panel<true> : write_panel<false>;
    return write(quantizer, x, K, width, panel);
}

// [K][16] -> the codes of a lot.
inline void quantize_lot(const float* x, const Quantizer& quantizer, int64_t lot, const Codes& codes) {
    _mm512_store_ps(codes.scale + lot * LANES, quantizer.scale);
    if (codes.zero) _mm512_store_ps(codes.zero + lot * LANES, quantizer.zero);
    const Ints sum = write_panel(codes.zero == nullptr, quantizer, x, codes.K, codes.width, codes.panel(lot));
    _mm512_store_si512(codes.sum + lot * LANES, sum);
}

// Codes as callers have them, int8 [M, K] in rows; zero_point null for symmetric ones.
struct Rows {
    int64_t M, K;
    int8_t* q;
    float* scale;
    int32_t* zero_point;
    int64_t scale_stride = 1;  // 0: one for all, of scale and zero_point
};

// -> a lot of codes.
inline void take_lot(const Rows& rows, const Lot& from, int64_t lot, const Codes& codes) {
    const Ints ones = _mm512_set1_epi8(1);
    Ints sum = ints(0);
    int8_t* panel = codes.panel(lot);
    for (int64_t k = 0; k < codes.width; k += LANES) {
        Ints words[4];
        if (k + LANES <= rows.K) {
            transpose_words(rows.q + from.row * rows.K + k, rows.K, from.count, words);
        } else {
            alignas(64) int8_t padded[LANES * LANES] = {};
            for (int64_t r = 0; k < rows.K && r < from.count; r++)
                std::memcpy(padded + r * LANES, rows.q + (from.row + r) * rows.K + k, rows.K - k);
            transpose_words(padded, LANES, from.count, words);
        }
        for (int i = 0; i < 4; i++) {
            sum = _mm512_dpbusd_epi32(sum, ones, words[i]);
            _mm512_store_si512(panel + (k + 4 * i) * LANES, words[i]);
        }
    }
    _mm512_store_si512(codes.sum + lot * LANES, sum);
    for (int64_t lane = 0; lane < LANES; lane++) {
        const int64_t at = (from.row + std::min(lane, from.count - 1)) * rows.scale_stride;
        codes.scale[lot * LANES + lane] = rows.scale[at];
        if (codes.zero) codes.zero[lot * LANES + lane] = static_cast<float>(rows.zero_point[at]);
    }
}

// [K][16] -> codes in rows, of the lanes of a lot.
inline void quantize_lot(
    const float* x, const Quantizer& quantizer, const Lot& to, const Rows& rows, Scratch<int8_t>& scratch) {
    const int64_t width = round_up(rows.K, STEP);
    int8_t* panel = scratch.get(width * LANES);
    write_panel(rows.zero_point == nullptr, quantizer, x, rows.K, width, panel);
    for (int64_t k = 0; k < rows.K; k += STEP) {
        for (int64_t lane = 0; lane < to.count; lane += 4) {
            Ints words[4];
            transpose_words(panel + k * LANES + lane * 4, LANES * 4, LANES, words);
            for (int64_t i = 0; i < std::min<int64_t>(4, to.count - lane); i++) {
                const __mmask64 mask = rows.K - k >= STEP ? ~0ull : (1ull << (rows.K - k)) - 1;
                _mm512_mask_storeu_epi8(rows.q + (to.row + lane + i) * rows.K + k, mask, words[i]);
            }
        }
    }
    const __mmask16 lanes = first_lanes(to.count);
    _mm512_mask_storeu_ps(rows.scale + to.row, lanes, quantizer.scale);
    if (rows.zero_point) {
        const __mmask16 numbers = _mm512_cmp_ps_mask(quantizer.zero, quantizer.zero, _CMP_EQ_OQ);
        const Ints zero = _mm512_maskz_cvtps_epi32(numbers, quantizer.zero);
        _mm512_mask_storeu_epi32(rows.zero_point + to.row, lanes, zero);
    }
}

struct Norm {
    const float *weight, *bias;
    float eps;
};

// y = LayerNorm(x + residual), all [K][16]; residual may be null, y may be x.
inline Extremes layernorm_lot(
    const float* x, const float* residual, int64_t K, const Norm& norm, float* y, bool symmetric) {
    // Four sums each: one alone would wait for itself, and round more.
    Floats sum[4] = {}, squares[4] = {};
    for (int64_t k = 0; k < K; k++) {
        Floats v = _mm512_load_ps(x + k * LANES);
        if (residual) v = _mm512_add_ps(v, _mm512_load_ps(residual + k * LANES));
        _mm512_store_ps(y + k * LANES, v);
        sum[k % 4] = _mm512_add_ps(sum[k % 4], v);
    }
    const auto total = [](const Floats part[4]) {
        return _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
    };
    const Floats count = floats(static_cast<float>(K)), mean = _mm512_div_ps(total(sum), count);
    // From the centred values: the difference of sums of squares would cancel.
    for (int64_t k = 0; k < K; k++) {
        const Floats centred = _mm512_sub_ps(_mm512_load_ps(y + k * LANES), mean);
        squares[k % 4] = _mm512_fmadd_ps(centred, centred, squares[k % 4]);
    }
    const Floats variance = _mm512_add_ps(_mm512_div_ps(total(squares), count), floats(norm.eps));
    const Floats inverse = _mm512_div_ps(floats(1.0f), _mm512_sqrt_ps(variance));
    Extremes seen{symmetric};
    for (int64_t k = 0; k < K; k++) {
        const Floats normed = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(y + k * LANES), mean), inverse);
        const Floats result = _mm512_fmadd_ps(normed, floats(norm.weight[k]), floats(norm.bias[k]));
        _mm512_store_ps(y + k * LANES, result);
        seen.add(result);
    }
    return seen;
}

}  // namespace lowbit
