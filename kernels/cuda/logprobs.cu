// Log-probabilities of given tokens in raw rows of logits. One block per row.
#include "element.cuh"
#include "sampling.cuh"

constexpr int kThreadsMax = 512;

struct LogprobsParams {
    const float* logits;      // [rows, vocabulary]
    const uint32_t* which;    // [gridDim.x] rows
    const uint32_t* targets;  // [gridDim.x] tokens
    float* out;               // [gridDim.x]
    uint32_t rows;
    uint32_t vocabulary;
};
EXPORT_PARAMS(LogprobsParams, logits, which, targets, out, rows, vocabulary)

template <int count> __device__ __forceinline__ float logprob(const float* logits, uint32_t vocabulary, uint32_t target, uint64_t* partial) {
    const uint32_t first = threadIdx.x * count, step = blockDim.x * count;
    float values[count];
    uint64_t best = 0;
    for (uint32_t at = first; at < vocabulary; at += step) {
        load(values, logits + at);
#pragma unroll
        for (int n = 0; n < count; ++n) best = values[n] < INFINITY ? max(best, leader(values[n], 0)) : kBroken;
    }
    best = block_max(best, partial);
    const float of_best = leader_value(best);
    if (!(of_best > -INFINITY)) return NAN;
    uint64_t mass = 0;
    for (uint32_t at = first; at < vocabulary; at += step) {
        load(values, logits + at);
#pragma unroll
        for (int n = 0; n < count; ++n) mass += mass_of(exp_negative(__fsub_rn(values[n], of_best)));
    }
    mass = block_sum(mass, partial);
    return float(double(logits[target]) - double(of_best) - mass_log(mass));
}

extern "C" __global__ void __launch_bounds__(kThreadsMax) row_logprobs(const __grid_constant__ LogprobsParams p) {
    __shared__ uint64_t partial[32];
    const uint32_t which = p.which[blockIdx.x], target = p.targets[blockIdx.x];
    float result = NAN;
    if (which < p.rows && target < p.vocabulary) {
        const float* logits = p.logits + size_t(which) * p.vocabulary;
        result = is_vectorized<float>(p.logits, p.vocabulary) ? logprob<4>(logits, p.vocabulary, target, partial)
                                                              : logprob<1>(logits, p.vocabulary, target, partial);
    }
    if (threadIdx.x == 0) p.out[blockIdx.x] = result;
}
EXPORT_KERNEL(row_logprobs)
