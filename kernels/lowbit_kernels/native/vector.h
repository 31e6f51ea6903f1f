// Arithmetic on 16 tokens at a time, one in each lane of a register: no operation ever goes across lanes, so rows of any
// length are handled alike. Values that belong together lie as [feature][16 tokens].
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace lowbit {

using Floats = __m512;
using Ints = __m512i;

constexpr int LANES = 16;

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints bits_of(Floats x) { return _mm512_castps_si512(x); }
inline Floats from_bits(Ints x) { return _mm512_castsi512_ps(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// Of 1 to 16 lanes.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// e^x by 2^n * e^r with |r| <= ln(2)/2; error below 3 ulp, NaN stays NaN. For x up to 88.
inline Floats exponential(Floats x) {
    x = _mm512_max_ps(floats(-200.0f), x);  // less would be infinity times 0 below; e^-200 is 0 too
    const Floats n = rounded(_mm512_mul_ps(x, floats(1.44269504088896341f)));
    Floats r = _mm512_fmadd_ps(n, floats(-0.693359375f), x);  // ln(2) in two parts, the first exact in few bits
    r = _mm512_fmadd_ps(n, floats(2.12194440e-4f), r);
    Floats p = floats(1.0f / 720);  // of the Taylor series
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, floats(factor));
    return _mm512_scalef_ps(p, n);
}

// The normal distribution function as polynomials of degree 4 in t = x / WIDTH - i, for each integer i from -15 to 15 that
// x / WIDTH rounds to; their factors at [.][i mod 32]. They interpolate at Chebyshev nodes. Those of i = -15 and 15 are
// stretched, by 8e-8, so that they end at 0 and 1.
struct NormalTable {
    static constexpr float END = 5.25f, WIDTH = 0.339f;
    alignas(64) float factors[5][32] = {};

    NormalTable() {
        for (int i = -15; i <= 15; i++) {
            const double most = std::abs(i) == 15 ? std::erf(END * M_SQRT1_2) : 1.0;
            double a[5] = {};  // of Chebyshev polynomials of 2 * t
            for (int j = 0; j < 5; j++) {
                const double angle = (j + 0.5) * M_PI / 5, x = (i + std::cos(angle) / 2) * WIDTH;
                const double y = 0.5 + 0.5 * std::erf(x * M_SQRT1_2) / most;
                for (int m = 0; m < 5; m++) a[m] += (m ? 0.4 : 0.2) * y * std::cos(m * angle);
            }
            const double c[] = {a[0] - a[2] + a[4], 2 * (a[1] - 3 * a[3]), 8 * (a[2] - 4 * a[4]), 32 * a[3], 128 * a[4]};
            for (int m = 0; m < 5; m++) factors[m][i & 31] = static_cast<float>(c[m]);
        }
    }
};
inline const NormalTable normal;

// x times the normal distribution function: GELU as BERT defines it, error 9e-8 * |x| and rounding. One polynomial for
// all x would be of degree 13 for that; a division alone would take longer.
inline Floats gelu(Floats x) {
    constexpr int SMALLER = 2;  // of the magnitudes, with the sign of x
    const Floats z = _mm512_range_ps(x, floats(NormalTable::END), SMALLER), inverse = floats(1.0f / NormalTable::WIDTH);
    const Floats whole = floats(0x3p22f);  // at this size a float has no fraction, and its last bits are the integer's
    const Floats shifted = _mm512_fmadd_ps(z, inverse, whole);
    const Floats t = _mm512_fmsub_ps(z, inverse, _mm512_sub_ps(shifted, whole));
    const auto factor = [&](int m) {
        const float* of = normal.factors[m];
        return _mm512_permutex2var_ps(_mm512_load_ps(of), bits_of(shifted), _mm512_load_ps(of + LANES));
    };
    Floats p = factor(4);
    for (int m = 3; m >= 0; m--) p = _mm512_fmadd_ps(p, t, factor(m));
    return _mm512_mul_ps(x, p);
}

inline Floats gelu_tanh(Floats x) {
    const Floats cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, floats(0.044715f)));
    const Floats u = _mm512_mul_ps(floats(-1.59576912160573f), _mm512_add_ps(x, cube));  // -2 times tanh's argument
    const Floats bounded = _mm512_max_ps(floats(-87.0f), _mm512_min_ps(floats(87.0f), u));
    return _mm512_div_ps(x, _mm512_add_ps(floats(1.0f), exponential(bounded)));
}

// 16 bytes of each of 16 rows -> their first, second, third and fourth words side by side; rows past the last repeat it.
inline void transpose_words(const void* first, int64_t stride, int64_t rows, Ints words[4]) {
    const auto row = [&](int64_t r) {
        const char* at = static_cast<const char*>(first) + std::min(r, rows - 1) * stride;
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    Ints four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        four[i] = _mm512_castsi128_si512(row(i));
        four[i] = _mm512_inserti32x4(four[i], row(i + 4), 1);
        four[i] = _mm512_inserti32x4(four[i], row(i + 8), 2);
        four[i] = _mm512_inserti32x4(four[i], row(i + 12), 3);
    }
    const Ints low0 = _mm512_unpacklo_epi32(four[0], four[1]), high0 = _mm512_unpackhi_epi32(four[0], four[1]);
    const Ints low1 = _mm512_unpacklo_epi32(four[2], four[3]), high1 = _mm512_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm512_unpacklo_epi64(low0, low1);
    words[1] = _mm512_unpackhi_epi64(low0, low1);
    words[2] = _mm512_unpacklo_epi64(high0, high1);
    words[3] = _mm512_unpackhi_epi64(high0, high1);
}

// Ranges of 16 rows, found by integers that order like the floats: one operation a value, and NaN is beyond infinity.
struct Range {
    Ints low = ints(INT32_MAX), high = ints(INT32_MIN);

    static Ints ordered(Ints bits) {
        return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    }
    void add(Floats x) {
        const Ints value = ordered(bits_of(x));
        low = _mm512_min_epi32(low, value);
        high = _mm512_max_epi32(high, value);
    }
    Floats lowest() const { return from_bits(ordered(low)); }
    Floats highest() const { return from_bits(ordered(high)); }
};

// Ranges -> scales, their inverses and zero points, as `_scale_and_zero_torch` in quantize/cpu.py, to the last bit.
struct Quantizer {
    Floats scale, inverse, zero;  // the zero point, an integer
    Ints shift;                   // the same
    int least, most;              // codes

    Quantizer(Floats low, Floats high, int bits, bool symmetric) {
        const Floats tiny = floats(0x1p-126f), none = floats(0.0f);
        const int levels = (1 << (bits - 1)) - 1;
        const Floats magnitude = _mm512_max_ps(high, _mm512_sub_ps(none, low));
        most = levels;
        least = symmetric ? -levels : -levels - 1;
        if (symmetric) {
            scale = _mm512_div_ps(magnitude, floats(static_cast<float>(levels)));
        } else {
            scale = _mm512_div_ps(_mm512_sub_ps(high, low), floats(2.0f * static_cast<float>(levels) + 1.0f));
            const Floats flat = _mm512_max_ps(_mm512_mul_ps(magnitude, floats(0x1p-30f)), tiny);
            scale = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(scale, flat, _CMP_LT_OQ), scale, magnitude);
        }
        const __mmask16 small = _mm512_cmp_ps_mask(scale, tiny, _CMP_LT_OQ);
        scale = _mm512_mask_blend_ps(small, scale, none);
        // Infinity and NaN, of the scale or the ends of the range, become NaN.
        const Floats poison = _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high));
        scale = _mm512_add_ps(scale, _mm512_add_ps(_mm512_sub_ps(scale, scale), poison));
        inverse = _mm512_mask_blend_ps(small, _mm512_div_ps(floats(1.0f), scale), none);
        const Floats lowest = rounded(_mm512_mul_ps(low, inverse));
        zero = symmetric ? none : _mm512_sub_ps(floats(static_cast<float>(least)), lowest);
        shift = _mm512_cvtps_epi32(zero);
    }

    // Codes as integers. Symmetric ones are in their range: |x| / scale rounds to `most` at most. With a zero point, both
    // may round away from the middle.
    template <bool SYMMETRIC>
    Ints code(Floats x) const {
        const Ints q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
        if (SYMMETRIC) return q;
        return _mm512_max_epi32(ints(least), _mm512_min_epi32(ints(most), _mm512_add_epi32(q, shift)));
    }
};

// What a quantizer has to know of values: their range, or for symmetric codes their largest magnitude.
struct Extremes {
    bool symmetric;
    Range range;
    Ints magnitude = ints(0);

    void add(Floats x) {
        if (symmetric) magnitude = _mm512_max_epi32(magnitude, _mm512_and_si512(ints(0x7fffffff), bits_of(x)));
        else range.add(x);
    }
    Quantizer quantizer(int bits) const {
        if (symmetric) return Quantizer(floats(0.0f), from_bits(magnitude), bits, true);
        return Quantizer(range.lowest(), range.highest(), bits, false);
    }
};

// Of [K][16 tokens].
inline Extremes extremes_of(const float* x, int64_t K, bool symmetric) {
    Extremes seen{symmetric};
    for (int64_t k = 0; k < K; k++) seen.add(_mm512_load_ps(x + k * LANES));
    return seen;
}

inline Quantizer quantizer_of(const float* x, int64_t K, int bits, bool symmetric) {
    return extremes_of(x, K, symmetric).quantizer(bits);
}

// Four integers of each lane as the bytes of its word, saturated.
inline Ints saturated_bytes(Ints a, Ints b, Ints c, Ints d) {
    const Ints bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const Ints order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(bytes, order);
}

// Likewise their last bytes.
inline Ints last_bytes(Ints a, Ints b, Ints c, Ints d) {
    const Ints byte = ints(255);
    const Ints low = _mm512_or_si512(_mm512_and_si512(a, byte), _mm512_slli_epi32(_mm512_and_si512(b, byte), 8));
    const Ints high = _mm512_or_si512(_mm512_and_si512(c, byte), _mm512_slli_epi32(d, 8));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Memory of a thread that grows and stays, aligned to cache lines.
template <typename T>
struct Scratch {
    T* data = nullptr;
    int64_t size = 0;

    T* get(int64_t count) {
        if (count > size) {
            std::free(data);
            data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
            if (data == nullptr) std::abort();
            size = count;
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace lowbit
