// What native.py calls. Pointers are to contiguous memory, unless strides (in elements) come with them; shapes are
// checked there.
#include <sys/syscall.h>
#include <unistd.h>

#include "embedding.h"
#include "layer.h"

using namespace lowbit;

namespace {

constexpr int64_t SMALL = 1 << 14;  // values that one thread takes sooner than two agree on

// LayerNorm(x + residual), both [K][16], -> rows y and, unless bits is 0, their codes. Residual may be null, x is lost.
void normalize_lot(
    float* x, const float* residual, const Lot& lot, const Norm& norm, int bits, float* y, const Rows& codes) {
    static thread_local Scratch<int8_t> scratch;
    const Extremes seen = layernorm_lot(x, residual, codes.K, norm, x, codes.zero_point == nullptr);
    store_lot(x, codes.K, y + lot.row * codes.K, codes.K, lot.count);
    if (bits) quantize_lot(x, seen.quantizer(bits), lot, codes, scratch);
}

// Products of tokens that `take` makes lots of codes of.
template <class Take>
void linears(
    int64_t M, int64_t K, bool symmetric, Take take, const Product* products, int count, float* out,
    int64_t features) {
    static thread_local CodesBuffer buffer;
    static thread_local Scratch<float> scratch;
    const int64_t most = std::min(M, GROUP);
    Codes codes = buffer.get(most, K, symmetric);
    float* sums = scratch.get(lots_of(most) * LANES * features);
#pragma omp parallel firstprivate(codes) if (M * K * features > 64 * SMALL)
    {
        Tiles tiles;
        for (int64_t start = 0; start < M; start += GROUP) {
            codes.M = std::min(GROUP, M - start);
            const int64_t lots = lots_of(codes.M);
#pragma omp for schedule(static)
            for (int64_t lot = 0; lot < lots; lot++) {
                const auto [row, taken] = lot_of(lot, codes.M);
                take({start + row, taken}, lot, codes);
            }
            team_linears(codes, products, count, NONE, sums, features);
#pragma omp for schedule(static)
            for (int64_t lot = 0; lot < lots; lot++) {
                const auto [row, taken] = lot_of(lot, codes.M);
                store_lot(sums + lot * features * LANES, features, out + (start + row) * features, features, taken);
            }
        }
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0, or an error. Linux hands out the large registers of AMX on request only, once for all threads of a process.
int lowbit_start() {
#ifdef __AMX_INT8__
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
#else
    return 0;
#endif
}

// x float [M, K] -> q int8 [M, K], scale [M], zero_point [M] or null for symmetric codes.
void lowbit_quantize(const float* x, int64_t M, int64_t K, int bits, int8_t* q, float* scale, int32_t* zero_point) {
    const Rows codes{M, K, q, scale, zero_point};
#pragma omp parallel if (M * K > SMALL)
    {
        static thread_local Scratch<float> scratch;
        static thread_local Scratch<int8_t> bytes;
        float* own = scratch.get(K * LANES);
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots_of(M); lot++) {
            const Lot rows = lot_of(lot, M);
            const Extremes seen = load_lot(x + rows.row * K, K, rows.count, K, own, zero_point == nullptr);
            quantize_lot(own, seen.quantizer(bits), rows, codes, bytes);
        }
    }
}

// y = LayerNorm(x + residual) float [M, K], and unless bits is 0 its codes as above. Residual may be null.
void lowbit_add_layernorm(
    const float* x, const float* residual, int64_t M, int64_t K, const Norm* norm, int bits, float* y, int8_t* q,
    float* scale, int32_t* zero_point) {
    const Rows codes{M, K, q, scale, zero_point};
#pragma omp parallel if (M * K > SMALL)
    {
        static thread_local Scratch<float> scratch;
        float* own = scratch.get(2 * K * LANES);
        float* more = residual ? own + K * LANES : nullptr;
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots_of(M); lot++) {
            const Lot rows = lot_of(lot, M);
            load_lot(x + rows.row * K, K, rows.count, K, own);
            if (residual) load_lot(residual + rows.row * K, K, rows.count, K, more);
            normalize_lot(own, more, rows, *norm, bits, y, codes);
        }
    }
}

// y = LayerNorm(sums of the embeddings of M tokens) float [M, K], and unless bits is 0 its codes as above. Returns 0
// and does nothing where an id is no row of its table.
int lowbit_embedding_layernorm(
    const Embeddings* op, int64_t M, const Norm* norm, int bits, float* y, int8_t* q, float* scale,
    int32_t* zero_point) {
    if (!op->words.valid() || !op->types.valid() || !op->positions.valid()) return 0;
    const int64_t K = op->K;
    const Rows codes{M, K, q, scale, zero_point};
#pragma omp parallel if (M * K > SMALL)
    {
        static thread_local Scratch<float> scratch;
        float* own = scratch.get(K * LANES);
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots_of(M); lot++) {
            const Lot rows = lot_of(lot, M);
            embed_lot(*op, rows, own);
            normalize_lot(own, nullptr, rows, *norm, bits, y, codes);
        }
    }
    return 1;
}

// x int8 [M, K] times `count` weights -> out float [M, features], the sum of their N.
void lowbit_linears(
    int8_t* x, int64_t M, int64_t K, float* scale, int64_t scale_stride, int32_t* zero_point, const Product* products,
    int count, float* out, int64_t features) {
    const Rows rows{M, K, x, scale, zero_point, scale_stride};
    const auto take = [&](const Lot& from, int64_t lot, const Codes& codes) { take_lot(rows, from, lot, codes); };
    linears(M, K, zero_point == nullptr, take, products, count, out, features);
}

// The same of x float [M, K], each token quantized by its own range.
void lowbit_dynamic_linears(
    const float* x, int64_t M, int64_t K, int bits, bool symmetric, const Product* products, int count,
    float* out, int64_t features) {
    const auto take = [&](const Lot& from, int64_t lot, const Codes& codes) {
        static thread_local Scratch<float> scratch;
        float* own = scratch.get(K * LANES);
        const Extremes seen = load_lot(x + from.row * K, K, from.count, K, own, symmetric);
        quantize_lot(own, seen.quantizer(bits), lot, codes);
    };
    linears(M, K, symmetric, take, products, count, out, features);
}

// Sequences of `starts` int32 [B + 1].
void lowbit_attention(const Attention* op, const int32_t* starts, int64_t B) {
#pragma omp parallel if (op->T * op->H > 64)
    {
        Tiles tiles;
        team_attention(*op, starts, B);
    }
}

// x int8 [T, K] -> projections -> attention: `op` without query, key, value.
void lowbit_attention_half(
    int8_t* x, int64_t K, float* scale, int32_t* zero_point, const Product* products, int count,
    const Attention* op, const int32_t* starts, int64_t B) {
    const Rows rows{op->T, K, x, scale, zero_point};
    const Batch batch(starts, B);
    const AttentionWork work(batch, K, zero_point == nullptr, *op);
#pragma omp parallel
    {
        Tiles tiles;
        team_attention_half(rows, products, count, *op, starts, batch, work);
    }
}

// context float [T, C], tokens float [T, H] -> out float [T, H] and its codes as above.
void lowbit_rest(
    const Rest* op, const float* context, const float* tokens, int64_t T, float* out, int8_t* q, float* scale,
    int32_t* zero_point) {
    const Rows codes{T, op->H, q, scale, zero_point};
    const RestWork work(*op, T, zero_point == nullptr);
#pragma omp parallel
    {
        Tiles tiles;
        team_rest(*op, context, tokens, out, codes, work);
    }
}

// Both, layer after layer, of layers that are alike in shape: `op` as for the first half, its output [T, C] is the
// context of each; x and tokens enter the first layer, out and its codes leave the last: with `first_only`, of the first
// token of each sequence [B], and out and codes have room for T of them or B, whichever is more.
void lowbit_layers(
    const Layer* layers, int count, bool first_only, const Attention* op, const int32_t* starts, int64_t B, int8_t* x,
    float* x_scale, int32_t* x_zero_point, const float* tokens, float* out, int8_t* q, float* scale,
    int32_t* zero_point) {
    static thread_local Scratch<float> scratch;
    const Rest& shape = layers->rest;
    const int64_t T = op->T, left = first_only ? B : T;
    const Rows entering{T, shape.H, x, x_scale, x_zero_point}, codes{T, shape.H, q, scale, zero_point};
    const Rows leaving{left, shape.H, q, scale, zero_point};
    const Batch batch(starts, B);
    const AttentionWork attention(batch, shape.H, zero_point == nullptr, *op);
    const RestWork rest(shape, std::max(T, left), zero_point == nullptr);
    Attention of_first = *op;
    of_first.queries = 1;
    float* first_context = scratch.get(B * (shape.C + shape.H));
    float* first_tokens = first_context + B * shape.C;
#pragma omp parallel
    {
        Tiles tiles;
        for (const Layer* layer = layers; layer != layers + count; layer++) {
            const bool begins = layer == layers, drops = first_only && layer + 1 == layers + count;
            const float *context = op->out, *own = begins ? tokens : out;
            team_attention_half(
                begins ? entering : codes, layer->projections, 3, drops ? of_first : *op, starts,
                batch, attention);
            if (drops) {
                team_first_rows(context, T, shape.C, starts, B, first_context);
                team_first_rows(own, T, shape.H, starts, B, first_tokens);
                context = first_context, own = first_tokens;
            }
            team_rest(layer->rest, context, own, out, drops ? leaving : codes, rest);
        }
    }
}

}  // extern "C"
#pragma GCC visibility pop
