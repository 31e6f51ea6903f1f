// The two halves of an encoder layer. Both go through the batch in groups of a few hundred tokens, so that what one
// operation leaves for the next is still in cache.
#pragma once

#include <vector>

#include "attention.h"
#include "linear.h"

namespace lowbit {

// Sequences first..last-1, each beginning a lot of its own: `lots` of the group.
struct Group {
    int64_t first, last, first_lot, lots;
};

struct Batch {
    std::vector<Lot> lots;      // rows of the tensors
    std::vector<int64_t> lot;   // first lot of every sequence
    std::vector<Group> groups;
    int64_t most_lots = 0;      // of a group

    Batch(const int32_t* starts, int64_t B) {
        for (int64_t b = 0; b < B; b++) {
            const int64_t length = starts[b + 1] - starts[b], own = lots_of(length);
            if (groups.empty() || (groups.back().lots + own) * LANES > GROUP)
                groups.push_back({b, b, static_cast<int64_t>(lots.size()), 0});
            groups.back().last = b + 1;
            groups.back().lots += own;
            most_lots = std::max(most_lots, groups.back().lots);
            lot.push_back(static_cast<int64_t>(lots.size()));
            for (int64_t i = 0; i < own; i++) {
                const auto [row, count] = lot_of(i, length);
                lots.push_back({starts[b] + row, count});
            }
        }
    }
};

// What one group of tokens needs within the first half; made by one thread for all.
struct AttentionWork {
    Codes codes;
    float* projected;

    AttentionWork(const Batch& batch, int64_t K, bool symmetric, const Attention& op) {
        static thread_local CodesBuffer buffer;
        static thread_local Scratch<float> scratch;
        codes = buffer.get(batch.most_lots * LANES, K, symmetric);
        projected = scratch.get(batch.most_lots * LANES * 3 * op.H * op.D);
    }
};

// Codes [T, K] -> queries, keys and values, of a group at a time -> `op.out`. `op` has no inputs.
inline void team_attention_half(
    const Rows& x, const Product* products, int count, const Attention& op, const int32_t* starts, const Batch& batch, const AttentionWork& work) {
    static thread_local AttentionBuffers buffers;
    const int64_t head = op.D * LANES, width = op.H * head, stride = 3 * width;
    Codes codes = work.codes;
    float* projected = work.projected;
    for (const Group& group : batch.groups) {
        codes.M = group.lots * LANES;
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < group.lots; lot++) take_lot(x, batch.lots[group.first_lot + lot], lot, codes);
        team_linears(codes, products, count, NONE, projected, 3 * op.H * op.D);
        const int64_t sequences = group.last - group.first;
        // Heads in order, as their features were shared out: most of what a thread reads it has written.
#pragma omp for schedule(static)
        for (int64_t task = 0; task < sequences * op.H; task++) {
            const int64_t b = group.first + task % sequences, h = task / sequences, S = starts[b + 1] - starts[b];
            const float* query = projected + (batch.lot[b] - group.first_lot) * stride + h * head;
            if (S > 0) attend(op, {h, starts[b], S, query, query + width, query + 2 * width, stride}, buffers);
        }
    }
}

struct Rest {
    int64_t H, C;  // of the tokens and of the context, which has fewer values where a model has lost heads
    Product attention_output, ffn_input, ffn_output;
    Norm attention_norm, ffn_norm;
    int activation, bits;
    bool ffn_symmetric;
};

// What one group of tokens needs within the second half; made by one thread for all.
struct RestWork {
    Codes context, narrow, wide;
    float *sums, *normed;

    RestWork(const Rest& op, int64_t T, bool symmetric) {
        static thread_local CodesBuffer buffers[3];
        static thread_local Scratch<float> scratch[2];
        const int64_t M = std::min(T, GROUP), F = op.ffn_input.N;
        context = buffers[0].get(M, op.C, symmetric);
        narrow = buffers[1].get(M, op.H, symmetric);
        wide = buffers[2].get(M, F, op.ffn_symmetric);
        sums = scratch[0].get(lots_of(M) * LANES * std::max(op.H, F));
        normed = scratch[1].get(lots_of(M) * LANES * op.H);
    }
};

// Context [T, C] and tokens [T, H] -> tokens of the next layer, out [T, H], and their codes; `out` may be `tokens`.
inline void team_rest(
    const Rest& op, const float* context, const float* tokens, float* out, const Rows& codes, const RestWork& work) {
    static thread_local Scratch<float> scratch;
    static thread_local Scratch<int8_t> bytes;
    const int64_t H = op.H, C = op.C, lot_size = H * LANES;
    float *own = scratch.get(std::max(H, C) * LANES), *sums = work.sums, *normed = work.normed;
    Codes inner = work.context, narrow = work.narrow, wide = work.wide;
    for (int64_t start = 0; start < codes.M; start += GROUP) {
        const int64_t M = std::min(GROUP, codes.M - start), lots = lots_of(M);
        inner.M = narrow.M = wide.M = M;
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots; lot++) {
            const auto [row, count] = lot_of(lot, M);
            const Extremes seen = load_lot(context + (start + row) * C, C, count, C, own, inner.zero == nullptr);
            quantize_lot(own, seen.quantizer(op.bits), lot, inner);
        }
        team_linears(inner, &op.attention_output, 1, NONE, sums, H);
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots; lot++) {
            const auto [row, count] = lot_of(lot, M);
            float* y = normed + lot * lot_size;
            load_lot(tokens + (start + row) * H, H, count, H, own);
            const bool symmetric = narrow.zero == nullptr;
            const Extremes seen = layernorm_lot(sums + lot * lot_size, own, H, op.attention_norm, y, symmetric);
            quantize_lot(y, seen.quantizer(op.bits), lot, narrow);
        }
        team_linears(narrow, &op.ffn_input, 1, op.activation, sums, wide.K);
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots; lot++) {
            const float* x = sums + lot * wide.K * LANES;
            quantize_lot(x, quantizer_of(x, wide.K, op.bits, op.ffn_symmetric), lot, wide);
        }
        team_linears(wide, &op.ffn_output, 1, NONE, sums, H);
#pragma omp for schedule(static)
        for (int64_t lot = 0; lot < lots; lot++) {
            const auto [row, count] = lot_of(lot, M);
            const bool symmetric = codes.zero_point == nullptr;
            const float* residual = normed + lot * lot_size;
            const Extremes seen = layernorm_lot(sums + lot * lot_size, residual, H, op.ffn_norm, own, symmetric);
            store_lot(own, H, out + (start + row) * H, H, count);
            quantize_lot(own, seen.quantizer(op.bits), {start + row, count}, codes, bytes);
        }
    }
}

// The first row of every sequence, of x [T, K] -> out [B, K]; of an empty sequence some row, which nobody reads.
inline void team_first_rows(const float* x, int64_t T, int64_t K, const int32_t* starts, int64_t B, float* out) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++)
        std::copy_n(x + std::min<int64_t>(starts[b], T - 1) * K, K, out + b * K);
}

// All of one layer.
struct Layer {
    Product projections[3];
    Rest rest;
};

}  // namespace lowbit
