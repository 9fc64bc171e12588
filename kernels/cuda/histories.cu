// How often a request has seen each token: in its prompt, and, times 2^16, among those that were generated.
#include "ptx.cuh"

constexpr int kThreadsMax = 512;

struct AdmitParams {
    uint32_t* history;       // [vocabulary]
    const uint32_t* prompt;  // [length]
    uint32_t vocabulary;
    uint32_t length;
};
EXPORT_PARAMS(AdmitParams, history, prompt, vocabulary, length)

// One block, so that a barrier parts the steps: it runs once per request, beside a prefill.
extern "C" __global__ void __launch_bounds__(kThreadsMax) admit(const __grid_constant__ AdmitParams p) {
    for (uint32_t id = threadIdx.x; id < p.vocabulary; id += blockDim.x) p.history[id] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.length; i += blockDim.x) {
        const uint32_t id = p.prompt[i];
        if (id < p.vocabulary) atomicAdd(&p.history[id], 1u);
    }
    __syncthreads();
    // More would spill into the other half.
    for (uint32_t id = threadIdx.x; id < p.vocabulary; id += blockDim.x) {
        if (__ldcg(&p.history[id]) > 0xffff) p.history[id] = 0xffff;
    }
}
EXPORT_KERNEL(admit)
