// What an adapter adds to some rows: the second of its two products, whose sums are short. The first one is a product
// like others (gemv.cu, gemm.cu), with an output of f32.
//
// A thread has one output of eight rows, so that it reads its weights once for all of them.
#include "product.cuh"

constexpr int kThreads = 128;
constexpr int kRows = 8;

struct LowRankParams {
    const float* inner;  // [rows, rank]
    const void* weight;  // [outputs, rank]
    void* out;           // [rows, outputs]
    uint32_t rows;
    uint32_t rank;
    uint32_t outputs;
    uint32_t stride;  // of the weight
    float scale;
};
EXPORT_PARAMS(LowRankParams, inner, weight, out, rows, rank, outputs, stride, scale)

template <class T, bool vectors>
__device__ __forceinline__ void add_products(float (&sums)[kRows], const float* inner, int width, const T* weight, int rank) {
    for (int at = 0; at < rank; at += kVector<T>) {
        const uint4 chunk = load_chunk<T, vectors>(weight, at, rank);
        T elements[kVector<T>];
        memcpy(elements, &chunk, sizeof(chunk));
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
            for (int i = 0; i < kVector<T>; i += 4) {
                float x[4];
                load(x, inner + row * width + at + i);
#pragma unroll
                for (int n = 0; n < 4; ++n) sums[row] = fmaf(x[n], to_float(elements[i + n]), sums[row]);
            }
    }
}

template <class T> __device__ __forceinline__ void low_rank(const LowRankParams& p) {
    float* inner = reinterpret_cast<float*>(dynamic_shared);  // [kRows, width], with zeros where there is nothing
    const int rank = p.rank, width = (rank + 7) / 8 * 8;
    const size_t first_row = size_t(blockIdx.y) * kRows;
    const int rows = min(int(p.rows - first_row), kRows);
    for (int i = threadIdx.x; i < kRows * width; i += kThreads) {
        const int row = i / width, at = i % width;
        inner[i] = row < rows && at < rank ? p.inner[(first_row + row) * rank + at] : 0.0f;
    }
    __syncthreads();
    const int output = blockIdx.x * kThreads + threadIdx.x;
    if (output >= int(p.outputs)) return;
    const T* weight = static_cast<const T*>(p.weight) + size_t(output) * p.stride;
    float sums[kRows] = {};
    if (rank % kVector<T> == 0 && is_vectorized<T>(p.weight, p.stride)) {
        add_products<T, true>(sums, inner, width, weight, rank);
    } else {
        add_products<T, false>(sums, inner, width, weight, rank);
    }
    T* out = static_cast<T*>(p.out) + first_row * p.outputs + output;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        T* to = out + size_t(row) * p.outputs;
        if (row < rows) *to = from_float<T>(fmaf(p.scale, sums[row], to_float(*to)));
    }
}
KERNELS(low_rank, kThreads, LowRankParams)
