// Like probe.cu: what GPUs can do from compute capability 9.0 on. Older ones find kernels that do nothing.
#include "probe.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HOPPER 1
#endif

PROBE(probe_multiply_e4m3) {
#ifdef HOPPER
    PROBE_MULTIPLY(multiply_e4m3, float);
#endif
}
EXPORT_KERNEL(probe_multiply_e4m3)
PROBE(probe_multiply_e5m2) {
#ifdef HOPPER
    PROBE_MULTIPLY(multiply_e5m2, float);
#endif
}
EXPORT_KERNEL(probe_multiply_e5m2)

// a: 32 rows of 8 half-words, which go through registers into 48 rows: all, and then the first half once more; 32 threads.
PROBE(probe_store_matrix) {
#ifdef HOPPER
    __shared__ uint4 rows[32], stored[48];
    const int lane = threadIdx.x;
    rows[lane] = static_cast<const uint4*>(p.a)[lane];
    __syncwarp();
    uint32_t two[2], four[4];
    ptx::load_matrix_x4(four, &rows[lane]);
    ptx::store_matrix_x4(&stored[lane], four);
    ptx::load_matrix_x2(two, &rows[lane % 16]);
    ptx::store_matrix_x2(&stored[32 + lane % 16], two);
    __syncwarp();
    uint4* to = static_cast<uint4*>(p.out);
    to[lane] = stored[lane];
    if (lane < 16) to[32 + lane] = stored[32 + lane];
#endif
}
EXPORT_KERNEL(probe_store_matrix)

// Two warps: one brings rows of 64 words with bulk copies into a ring of two, the other adds them up.
PROBE(probe_pipeline) {
#ifdef HOPPER
    __shared__ __align__(128) uint32_t ring[2][64];
    __shared__ uint64_t full[2], empty[2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = int(p.count);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) ptx::mbarrier_init(&full[i], 1), ptx::mbarrier_init(&empty[i], 32);
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (warp == 0) {
        for (int row = 0; row < rows && lane == 0; ++row) {
            if (row >= 2) ptx::mbarrier_wait(&empty[row % 2], (row / 2 - 1) & 1);
            ptx::mbarrier_arrive_expect(&full[row % 2], 256);
            ptx::copy_bulk(ring[row % 2], static_cast<const uint32_t*>(p.a) + row * 64, 256, &full[row % 2]);
        }
        __syncwarp();
    } else {
        uint32_t sum = 0;
        for (int row = 0; row < rows; ++row) {
            ptx::mbarrier_wait(&full[row % 2], row / 2 & 1);
            sum += ring[row % 2][lane] + ring[row % 2][lane + 32];
            ptx::mbarrier_arrive(&empty[row % 2]);
        }
        static_cast<uint32_t*>(p.out)[lane] = sum;
    }
    ptx::barrier_sync(1, 64);
#endif
}
EXPORT_KERNEL(probe_pipeline)
