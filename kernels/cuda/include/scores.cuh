// From products of queries and keys to weights, for results of mma.sync: a lane has rows group and group + 8, and of every
// eight keys two.
#pragma once
#include "attention_block.cuh"

constexpr float kLog2e = 1.44269504088896340736f;

// cap * tanh(score / cap), exact to about cap * 2^-22.
__device__ __forceinline__ float capped(float score, float cap) {
    const float e = ptx::exp2_approximate(score * (2.0f * kLog2e / cap));
    return cap - __fdividef(2.0f * cap, e + 1.0f);
}

// What scores are to be multiplied with to be in units of log2: products are not yet scaled, unless rules needed that.
__device__ __forceinline__ float score_factor(const AttentionParams& p) {
    return p.soft_cap > 0.0f || p.slopes ? 1.0f : p.scale * kLog2e;
}

// Products of a lane's rows, the first of which is `row` of the block, with the keys from `key` on become scores.
template <int tiles>
__device__ __forceinline__ void apply_rules(float (&scores)[tiles][4], const AttentionParams& p, const Block& block,
                                            int row, int key, int part) {
    if (p.soft_cap > 0.0f) {
#pragma unroll
        for (int i = 0; i < 4 * tiles; ++i)
            scores[i / 4][i % 4] = capped(scores[i / 4][i % 4] * p.scale, p.soft_cap) * kLog2e;
    } else if (p.slopes) {
#pragma unroll
        for (int i = 0; i < 4 * tiles; ++i) scores[i / 4][i % 4] *= p.scale * kLog2e;
    }
    if (p.slopes) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int there = min(row + 8 * half, block.rows - 1);
            const float slope = p.slopes[block.head(there)] * kLog2e;
            const int distance = key + 2 * part - block.position(there);
#pragma unroll
            for (int n = 0; n < tiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) scores[n][2 * half + i] += slope * float(distance + 8 * n + i);
        }
    }
}

// Scores of keys that a row does not see become nothing.
template <int tiles>
__device__ __forceinline__ void mask(float (&scores)[tiles][4], const AttentionParams& p, const Block& block, int row,
                                     int key, int part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int position = block.position(min(row + 8 * half, block.rows - 1));
        const int from = first_visible(p, position) - key - 2 * part, to = position - key - 2 * part;
#pragma unroll
        for (int n = 0; n < tiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (8 * n + i < from || 8 * n + i > to) scores[n][2 * half + i] = -INFINITY;
    }
}

// The largest score of one of a lane's two rows; the four lanes of a row have the same.
template <int tiles> __device__ __forceinline__ float row_highest(const float (&scores)[tiles][4], int half) {
    float highest = -INFINITY;
#pragma unroll
    for (int n = 0; n < tiles; ++n) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    return fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
}

// The running softmax of a lane's two rows (Milakov and Gimelshein 2018).
struct Softmax {
    float highest[2] = {-INFINITY, -INFINITY};
    float total[2] = {};  // the lane's own part of the sum

    // Scores become weights. Answers what to multiply older sums with.
    template <int tiles>
    __device__ __forceinline__ void add(float (&scores)[tiles][4], float factor, float (&keep)[2]) {
        const float largest[2] = {row_highest(scores, 0), row_highest(scores, 1)};
        add_below(scores, factor, largest, keep);
    }

    // The same where others have scores of the row as well, and the largest of all is known.
    template <int tiles>
    __device__ __forceinline__ void add_below(float (&scores)[tiles][4], float factor, const float (&largest)[2],
                                              float (&keep)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float now = fmaxf(highest[half], largest[half]);
            // A row that has seen nothing yet has no finite score.
            const float base = now == -INFINITY ? 0.0f : now * factor;
            keep[half] = ptx::exp2_approximate(highest[half] * factor - base);
            highest[half] = now;
            total[half] *= keep[half];
#pragma unroll
            for (int n = 0; n < tiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][2 * half + i];
                    score = ptx::exp2_approximate(score * factor - base);
                    total[half] += score;
                }
        }
    }

    // Sums of all lanes of a row, and units of log2.
    __device__ __forceinline__ void finish(float factor) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] *= factor;
            total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
            total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
        }
    }
};

// Weights of 16 keys as left operand.
template <class T>
__device__ __forceinline__ void weights_of(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = pack_two<T>(low[0], low[1]);
    a[1] = pack_two<T>(low[2], low[3]);
    a[2] = pack_two<T>(high[0], high[1]);
    a[3] = pack_two<T>(high[2], high[3]);
}

// What to multiply sums with that are relative to `highest`, so that they are relative to `base`.
__device__ __forceinline__ float rescaled(float highest, float base) {
    return highest == -INFINITY ? 0.0f : ptx::exp2_approximate(highest - base);
}

// What the sums of a row are multiplied with in the end. A sink is one more score, whose value is zero.
__device__ __forceinline__ float final_factor(const AttentionParams& p, uint32_t head, float highest, float total) {
    const float sink = p.sinks ? p.sinks[head] * kLog2e : -INFINITY;
    const float most = fmaxf(highest, sink), keep = rescaled(highest, most);
    return keep / (total * keep + rescaled(sink, most));
}
