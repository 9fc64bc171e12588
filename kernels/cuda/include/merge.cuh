// From the results of the splits of a sequence to that of all of its keys.
#pragma once
#include "attention_block.cuh"
#include "reduce.cuh"
#include "scores.cuh"

// Whether all other splits of these rows are done, and their results there to be read. All threads of a block ask, once
// it has written its own.
__device__ __forceinline__ bool is_last_split(const AttentionParams& p, const Block& block) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // It goes back to zero with the last one.
        uint32_t* counter = p.counters + size_t(block.index) * gridDim.y + blockIdx.y;
        const unsigned others = block.splits() - 1;
        is_last = atomicInc(counter, others) == others;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

// Adds up the splits of a row, by one warp, which has `factors` of shared memory. Each lane has the state of one split.
template <class T, int value_dim>
__device__ __forceinline__ void merge_splits(const AttentionParams& p, const Block& block, int row,
                                             float (&factors)[kSplitsMax]) {
    const int lane = threadIdx.x % 32, split = block.splits_begin + lane;
    float2 state = make_float2(-INFINITY, 0.0f);
    if (split < block.splits_end) state = __ldcg(p.states + block.partial_at(p, row, split));
    const float highest = warp_max(state.x), factor = rescaled(state.x, highest);
    factors[lane] = factor * final_factor(p, block.head(row), highest, warp_sum(state.y * factor));
    __syncwarp();
    // Of four elements each; all loads of some splits are under way at once.
    constexpr int vectors = (value_dim / 4 + 31) / 32;
    float sums[vectors][4] = {};
#pragma unroll 4
    for (int s = block.splits_begin; s < block.splits_end; ++s) {
        const auto* from = reinterpret_cast<const float4*>(p.partial + block.partial_at(p, row, s) * value_dim);
        const float factor = factors[s - block.splits_begin];
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            if (value_dim % 128 != 0 && i * 32 + lane >= value_dim / 4) continue;
            const float4 part = __ldcg(from + i * 32 + lane);
            sums[i][0] += factor * part.x, sums[i][1] += factor * part.y;
            sums[i][2] += factor * part.z, sums[i][3] += factor * part.w;
        }
    }
    T* to = static_cast<T*>(p.out) + block.at(p, row) * value_dim;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
        if (value_dim % 128 == 0 || i * 32 + lane < value_dim / 4) store(to + (i * 32 + lane) * 4, sums[i]);
    __syncwarp();  // the factors of the next row
}
