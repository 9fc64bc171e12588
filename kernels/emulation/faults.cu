// Kernels with one deliberate fault each, for the test that the emulation reports every kind (tests/cuda/faults.rs). They
// are compiled for the emulation only.
#include "ptx.cuh"

constexpr unsigned kAll = 0xffffffffu;

#define FAULT(name, ...)                             \
    extern "C" __global__ void fault_##name(__VA_ARGS__); \
    EXPORT_KERNEL(fault_##name)                      \
    extern "C" __global__ void fault_##name(__VA_ARGS__)

FAULT(exit_before_barrier) {
    if (threadIdx.x == 7) return;
    __syncthreads();
}
FAULT(two_barriers) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
FAULT(inactive_lane, int* out) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, int(threadIdx.x), 20);
}
FAULT(missing_lane, int* out) {
    if (threadIdx.x % 32 != 3) out[threadIdx.x] = __shfl_xor_sync(kAll, int(threadIdx.x), 1);
}
FAULT(two_shuffles, int* out) {
    if (threadIdx.x % 2) {
        out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
    } else {
        out[threadIdx.x] = __shfl_xor_sync(kAll, 2, 1);
    }
}
FAULT(assertion, int limit) { assert(int(threadIdx.x) < limit); }
FAULT(trap) {
    if (blockIdx.x == 2 && threadIdx.x == 5) __trap();
}
FAULT(shared_bounds, int at) { dynamic_shared[at] = 1; }
FAULT(global_bounds, float* out, int at) { out[at] = 1.0f; }
FAULT(misaligned, float* out) { *reinterpret_cast<float4*>(out + threadIdx.x) = float4{}; }
FAULT(null, const int* in, int* out) { out[0] = in[threadIdx.x]; }
FAULT(race, int* out) {
    __shared__ int words[64];
    words[threadIdx.x] = int(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] = words[threadIdx.x ^ 32];  // another warp's
}
FAULT(race_of_reuse, int* out) {
    __shared__ int words[64];
    for (int round = 0; round < 2; ++round) {
        words[threadIdx.x] = round;
        __syncthreads();
        out[threadIdx.x] = words[63 - threadIdx.x];  // a barrier is missing behind this read
    }
}
FAULT(uninitialised, int* out) {
    __shared__ int words[64];
    if (threadIdx.x < 63) words[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = words[threadIdx.x];
}
FAULT(no_wait, uint32_t* out, const uint32_t* in) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
    ptx::copy_async<4>(words + threadIdx.x, in + threadIdx.x);
    ptx::commit_group();
    out[threadIdx.x] = words[threadIdx.x];
}
FAULT(weak_wait, uint32_t* out, const uint32_t* in) {
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
    ptx::copy_async<4>(words + threadIdx.x, in + threadIdx.x);
    ptx::commit_group();
    ptx::wait_group<1>();
    out[threadIdx.x] = words[threadIdx.x];
}
FAULT(mbarrier) {
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, 33);  // one more than will come
    __syncthreads();
    ptx::mbarrier_arrive(&barrier);
    ptx::mbarrier_wait(&barrier, 0);
}
FAULT(matrix_row, uint32_t* out) {
    __shared__ uint32_t words[64];
    words[threadIdx.x] = words[32 + threadIdx.x] = 0;
    __syncwarp();
    uint32_t one[1];
    ptx::load_matrix_x1(one, words + threadIdx.x);
    out[threadIdx.x] = one[0];
}
FAULT(stack, int* out) {
    volatile int large[100000];
    large[threadIdx.x] = 1;
    out[0] = large[0];
}
FAULT(division, int* out, int by) { out[0] = 7 / by; }
