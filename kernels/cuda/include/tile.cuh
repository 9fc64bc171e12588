// Products of many rows of inputs with many rows of weights, on tensor cores: what a block does. The order of the sums is
// that of product.cuh.
//
// Both come in steps of 64 inputs through three buffers in shared memory, so that two steps travel while one is
// multiplied. A row of a step is 128 bytes in chunks of 16. A lane of a quad reads the chunk that is its own from two
// neighbouring rows at once, so in odd rows the halves are exchanged: eight lanes read all banks.
#pragma once
#include "product.cuh"

constexpr int kTileThreads = 256;
constexpr int kTileWeights = 128;  // of a block
constexpr int kTileDepth = 64;     // inputs of a step
constexpr int kTileStages = 3;
constexpr int kTileRow = kTileWeights + 8;  // of the sums in shared memory: rows begin in different banks

// A block of `rows` rows, of 16-bit type.
template <class T, int rows> struct Tile {
    static constexpr int kWarpRows = rows < 64 ? rows : 64;
    static constexpr int kWarpsDown = rows / kWarpRows, kWarpsAcross = kTileThreads / 32 / kWarpsDown;
    static constexpr int kWarpWeights = kTileWeights / kWarpsAcross;
    static constexpr int kDown = kWarpRows / 16, kAcross = kWarpWeights / 8;
    static constexpr int kStageBytes = (rows + kTileWeights) * kTileDepth * 2;
    static constexpr int kRowsApart = kTileThreads / 8;  // a row is eight threads' work

    const T* inputs[rows / kRowsApart];
    const T* weights[kTileWeights / kRowsApart];
    // Of sums[i][j][0 to 3]: rows 16 i and, from 2 on, 8 more; weights 8 j and, if odd, 1 more.
    float sums[kDown][kAcross][4] = {};

    // input(i), weight(i): where row i begins, or null.
    template <class Input, class Weight> __device__ __forceinline__ Tile(Input input, Weight weight) {
#pragma unroll
        for (int i = 0; i < rows / kRowsApart; ++i) inputs[i] = input(int(threadIdx.x) / 8 + i * kRowsApart);
#pragma unroll
        for (int i = 0; i < kTileWeights / kRowsApart; ++i) weights[i] = weight(int(threadIdx.x) / 8 + i * kRowsApart);
    }

    // Rows and weights of this warp.
    static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / kWarpsAcross * kWarpRows; }
    static __device__ __forceinline__ int first_weight() { return threadIdx.x / 32 % kWarpsAcross * kWarpWeights; }

    static __device__ __forceinline__ uint4* chunk(int stage, int row, int index) {
        return reinterpret_cast<uint4*>(dynamic_shared + stage * kStageBytes) + row * 8 + (index ^ (row & 1) * 4);
    }

    template <bool vectors> static __device__ __forceinline__ void copy(uint4* to, const T* from, int at, int end) {
        if constexpr (vectors) {
            const bool valid = from && at < end;
            ptx::copy_async<16>(to, valid ? from + at : nullptr, valid);
        } else {
            *to = from ? load_chunk<T, false>(from, at, end) : uint4{0, 0, 0, 0};
        }
    }
    template <bool vectors> __device__ __forceinline__ void load(int step, int end) const {
        const int stage = step % kTileStages, first = threadIdx.x / 8, index = threadIdx.x % 8;
        const int at = step * kTileDepth + index * 8;
#pragma unroll
        for (int i = 0; i < rows / kRowsApart; ++i)
            copy<vectors>(chunk(stage, first + i * kRowsApart, index), inputs[i], at, end);
#pragma unroll
        for (int i = 0; i < kTileWeights / kRowsApart; ++i)
            copy<vectors>(chunk(stage, rows + first + i * kRowsApart, index), weights[i], at, end);
    }

    // Rows of `end` inputs. With vectors, all rows begin at multiples of 16 bytes.
    __device__ __forceinline__ void multiply(int end, bool vectors) {
        if (vectors && end % kVector<T> == 0) {
            multiply_all<true>(end);
        } else {
            multiply_all<false>(end);
        }
    }
    template <bool vectors> __device__ __forceinline__ void multiply_all(int end) {
        const int steps = (end + kTileDepth - 1) / kTileDepth, steps_of_slice = slice_length(end) / kTileDepth;
#pragma unroll
        for (int step = 0; step < kTileStages - 1; ++step) {
            if (step < steps) load<vectors>(step, end);
            ptx::commit_group();
        }
        float slice[kDown][kAcross][4] = {};
        for (int step = 0, left = steps_of_slice; step < steps; ++step) {
            ptx::wait_group<kTileStages - 2>();
            __syncthreads();  // all parts of this step have arrived, and the buffer of the step before is free
            if (step + kTileStages - 1 < steps) load<vectors>(step + kTileStages - 1, end);
            ptx::commit_group();
            multiply_step(slice, step % kTileStages);
            if (--left == 0 || step + 1 == steps) {
                left = steps_of_slice;
#pragma unroll
                for (int i = 0; i < kDown; ++i)
#pragma unroll
                    for (int j = 0; j < kAcross; ++j)
#pragma unroll
                        for (int part = 0; part < 4; ++part) {
                            sums[i][j][part] += slice[i][j][part];
                            slice[i][j][part] = 0.0f;
                        }
            }
        }
    }

    static __device__ __forceinline__ void multiply_step(float (&slice)[kDown][kAcross][4], int stage) {
        const int group = threadIdx.x % 32 / 4, lane_of_quad = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 low[kDown], high[kDown];
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
                low[i] = *chunk(stage, first_row() + i * 16 + group, half * 4 + lane_of_quad);
                high[i] = *chunk(stage, first_row() + i * 16 + group + 8, half * 4 + lane_of_quad);
            }
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
                const uint4 weight = *chunk(stage, rows + first_weight() + j * 8 + group, half * 4 + lane_of_quad);
#pragma unroll
                for (int i = 0; i < kDown; ++i) multiply_chunks<T>(slice[i][j], low[i], high[i], weight);
            }
        }
    }

    // All sums of the block, [rows, kTileRow] in shared memory, in the place of what was multiplied.
    __device__ __forceinline__ const float* collect() const {
        static_assert(rows * kTileRow * sizeof(float) <= kTileStages * kStageBytes, "sums fit where the stages were");
        float* all = reinterpret_cast<float*>(dynamic_shared);
        const int row = first_row() + threadIdx.x % 32 / 4, weight = first_weight() + threadIdx.x % 4 * 2;
        __syncthreads();  // everybody has multiplied
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float pair[2] = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
                    store(all + (row + i * 16 + half * 8) * kTileRow + weight + j * 8, pair);
                }
        __syncthreads();
        return all;
    }
};
