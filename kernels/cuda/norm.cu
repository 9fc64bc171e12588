// Norms over rows, with or without an addition to the residual stream before.
//
// One block per row. A thread keeps to its own elements from pass to pass, so what it wrote it may read again.
//
// What is normalized, be it the residual stream or x, has type S: the type T of all else, or f32. A residual stream in f32
// loses nothing to rounding however many layers add to it, and costs little: it is read once per norm.
#include "element.cuh"
#include "reduce.cuh"

constexpr int kThreadsMax = 512;

struct NormParams {
    const void* x;      // [rows, width]: S; with a residual, what is added to it: T
    void* residual;     // [rows, width]: S, or null
    void* out;          // [rows, width]: T; may be x where S is T
    const float* weight;  // [period, width], or null for ones
    const float* bias;    // [period, width], or null
    uint32_t width;
    uint32_t period;    // rows until the weights repeat
    float eps;
    uint32_t centered;  // layer norm: the mean is taken off
};
EXPORT_PARAMS(NormParams, x, residual, out, weight, bias, width, period, eps, centered)

template <class T, class S, int count> __device__ __forceinline__ void norm_row(const NormParams& p, float* partial) {
    const size_t begin = size_t(blockIdx.x) * p.width;
    const int step = blockDim.x * count, first = threadIdx.x * count, width = p.width;
    const S* from = static_cast<const S*>(p.x) + begin;
    float values[count];
    if (p.residual) {
        const T* delta = static_cast<const T*>(p.x) + begin;
        S* residual = static_cast<S*>(p.residual) + begin;
        for (int i = first; i < width; i += step) {
            float added[count];
            load(values, residual + i);
            load(added, delta + i);
#pragma unroll
            for (int n = 0; n < count; ++n) values[n] += added[n];
            store(residual + i, values);
        }
        from = residual;
    }
    float mean = 0.0f;
    if (p.centered) {
        float sum = 0.0f;
        for (int i = first; i < width; i += step) {
            load(values, from + i);
#pragma unroll
            for (int n = 0; n < count; ++n) sum += values[n];
        }
        mean = block_sum(sum, partial) / float(width);
        __syncthreads();
    }
    float squares = 0.0f;
    for (int i = first; i < width; i += step) {
        load(values, from + i);
#pragma unroll
        for (int n = 0; n < count; ++n) squares += (values[n] - mean) * (values[n] - mean);
    }
    const float factor = rsqrtf(block_sum(squares, partial) / float(width) + p.eps);
    const size_t turn = size_t(blockIdx.x % p.period) * p.width;
    T* out = static_cast<T*>(p.out) + begin;
    for (int i = first; i < width; i += step) {
        load(values, from + i);
#pragma unroll
        for (int n = 0; n < count; ++n) {
            values[n] = (values[n] - mean) * factor;
            if (p.weight) values[n] *= p.weight[turn + i + n];
            if (p.bias) values[n] += p.bias[turn + i + n];
        }
        store(out + i, values);
    }
}

template <class T, class S> __device__ __forceinline__ void norm_of(const NormParams& p) {
    __shared__ float partial[32];
    // Of as many elements as 16 bytes of S have.
    const bool vectors = is_vectorized<S>(p.x, p.width) && is_vectorized<S>(p.out, p.width) &&
                         is_vectorized<S>(p.residual, p.width);
    if (vectors) {
        norm_row<T, S, kVector<S>>(p, partial);
    } else {
        norm_row<T, S, 1>(p, partial);
    }
}
template <class T> __device__ __forceinline__ void norm(const NormParams& p) { norm_of<T, T>(p); }
KERNELS(norm, kThreadsMax, NormParams)

template <class T> __device__ __forceinline__ void norm_wide(const NormParams& p) { norm_of<T, float>(p); }
KERNEL_OF(norm_wide, f16, __half, kThreadsMax, NormParams)
KERNEL_OF(norm_wide, bf16, __nv_bfloat16, kThreadsMax, NormParams)
