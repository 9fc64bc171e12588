// Sums and maxima over a warp and over a block. The order of a sum depends on the number of threads alone.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// The sum over all threads, for all threads. The block is a multiple of 32 threads, and `partial` has 32 elements of
// shared memory. Another call with the same memory needs a barrier in between.
__device__ __forceinline__ float block_sum(float value, float* partial) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
    return total;
}
__device__ __forceinline__ float block_max(float value, float* partial) {
    value = warp_max(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float largest = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, partial[warp]);
    return largest;
}
