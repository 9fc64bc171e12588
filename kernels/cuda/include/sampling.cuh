// What the kernels of sampling share: the parameters of a row, probabilities as integers, reductions over a block.
#pragma once
#include "philox.cuh"

constexpr uint32_t kNone = 0xffffffffu;

// How a token is chosen from one row; one per row and step, in device memory.
struct RowParams {
    uint64_t seed, index;             // of the draw
    uint64_t green_key, green_bound;  // of the watermark; nothing is green below 0
    uint32_t logits;                  // which row of the logits
    uint32_t history;                 // slot, or kNone
    float history_length;
    uint32_t penalized;
    float green_delta;
    float repetition, frequency, presence, count;
    uint32_t bias_at, bias_count;     // pairs of id and value, in words from the beginning of the rows
    uint32_t mask_at;                 // the same, or kNone
    float temperature;
    uint32_t top_k;
    float top_p, typical_p;
    float min_p_log;                  // minus infinity for none
    uint32_t draws;
    uint32_t alternatives;            // how many are wanted
    uint32_t alternatives_at;         // where they go, in rows of alternatives
};

// Elements of a row that a block of `process_logits` looks at. Fixed, so that a sum does not depend on the batch.
constexpr uint32_t kChunk = 4096;

// What is known of a chunk of a row.
struct Chunk {
    uint64_t leader;  // see leader()
    uint64_t mass;    // of all its elements, relative to the best of them; of plain rows only
};

// The best token, and the lowest id among equals, is the maximum of these. Not a number, or infinite, beats all.
constexpr uint64_t kBroken = ~uint64_t(0);
// Grows with the value; zeros are equal.
__device__ __forceinline__ uint32_t ascending(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ascending(uint32_t key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ uint64_t leader(float value, uint32_t id) { return uint64_t(ascending(value)) << 32 | ~id; }
__device__ __forceinline__ float leader_value(uint64_t leader) { return from_ascending(uint32_t(leader >> 32)); }
__device__ __forceinline__ uint32_t leader_id(uint64_t leader) { return ~uint32_t(leader); }

// Whether all stages up to the choice leave the row alone, and the best is taken.
__device__ __forceinline__ bool is_plain(const RowParams& row) {
    return !row.draws && row.temperature == 1.0f && row.top_k == 0 && row.top_p >= 1.0f && row.typical_p >= 1.0f &&
           row.min_p_log == -INFINITY;
}

// e^x for x <= 0, within 3e-7 of the value; 0 where that would be subnormal. Operation by operation what the shard's
// sampler computes (sampling/logprobs.rs), so that both choose alike: no fused multiplications here.
__device__ __forceinline__ float exp_negative(float x) {
    const float round = 12582912.0f;  // adding it rounds to an integer, which is then in the lowest bits
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), round);
    const float n = __fsub_rn(shifted, round);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    const float factors[7] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
    float series = 0.0f;
#pragma unroll
    for (int i = 0; i < 7; ++i) series = __fmul_rn(__fadd_rn(series, factors[i]), r);
    series = __fadd_rn(series, 1.0f);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : __fmul_rn(series, power);
}

// Probabilities are summed as integers, in units of 2^-44 of the likeliest token's: so sums are exact and the same in
// any order, whichever thread adds what. 2^20 tokens fit; what they lose by truncation is less than 2^-24 of the sum.
constexpr float kMassOne = 17592186044416.0f;
__device__ __forceinline__ uint64_t mass_of(float share) { return uint64_t(__fmul_rn(share, kMassOne)); }

// The natural logarithm of a mass, relative to that of the likeliest token.
__device__ __forceinline__ double mass_log(uint64_t mass) { return log(double(mass) / double(kMassOne)); }

// `operation` over the values of all threads, for all threads. The block is a multiple of 32 threads, and `partial` has
// 32 elements of shared memory.
template <class Operation>
__device__ __forceinline__ uint64_t block_reduce(uint64_t value, uint64_t* partial, Operation operation) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffffu, value, distance));
    __syncthreads();  // whoever still reads the last result
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = operation(value, partial[warp]);
    return value;
}
__device__ __forceinline__ uint64_t block_max(uint64_t value, uint64_t* partial) {
    return block_reduce(value, partial, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
__device__ __forceinline__ uint64_t block_min(uint64_t value, uint64_t* partial) {
    return block_reduce(value, partial, [](uint64_t a, uint64_t b) { return a < b ? a : b; });
}
__device__ __forceinline__ uint64_t block_sum(uint64_t value, uint64_t* partial) {
    return block_reduce(value, partial, [](uint64_t a, uint64_t b) { return a + b; });
}
