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
    T* to = static_cast<T*>(p.out) + block.at(p, row) * value_dim;
    for (int i = lane; i < value_dim; i += 32) {
        float sum = 0.0f;
        for (int s = block.splits_begin; s < block.splits_end; ++s)
            sum += factors[s - block.splits_begin] * __ldcg(p.partial + block.partial_at(p, row, s) * value_dim + i);
        to[i] = from_float<T>(sum);
    }
    __syncwarp();  // the factors of the next row
}
