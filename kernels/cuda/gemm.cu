// Dense products with many rows, on tensor cores, whose sums have the same bits as those of gemv.cu.
#include "tile.cuh"

struct GemmParams {
    const void* input;   // [rows, inputs], of each head
    const void* weight;  // [outputs, inputs], of each head
    const float* bias;   // [outputs], or null
    void* out;           // [rows, outputs], of each head
    uint32_t rows;
    uint32_t outputs;
    uint32_t inputs;
    uint32_t input_stride;
    uint32_t weight_stride;
    uint32_t out_stride;
    uint32_t input_head;  // elements from a head to the next
    uint32_t weight_head;
    uint32_t out_head;
    uint32_t is_float;  // out is f32
    uint32_t add;       // to what is in out
};
EXPORT_PARAMS(GemmParams, input, weight, bias, out, rows, outputs, inputs, input_stride, weight_stride, out_stride,
              input_head, weight_head, out_head, is_float, add)

template <class T, int rows> __device__ __forceinline__ void gemm(const GemmParams& p) {
    const int first_output = blockIdx.y * kTileWeights, outputs = min(int(p.outputs) - first_output, kTileWeights);
    const size_t first_row = size_t(blockIdx.x) * rows;
    const int row_count = min(int(p.rows - first_row), rows);
    const T* input = static_cast<const T*>(p.input) + size_t(blockIdx.z) * p.input_head + first_row * p.input_stride;
    const T* weight = static_cast<const T*>(p.weight) + size_t(blockIdx.z) * p.weight_head +
                      size_t(first_output) * p.weight_stride;
    Tile<T, rows> tile([&](int row) { return row < row_count ? input + size_t(row) * p.input_stride : nullptr; },
                       [&](int i) { return i < outputs ? weight + size_t(i) * p.weight_stride : nullptr; });
    tile.multiply(p.inputs, is_vectorized<T>(input, p.input_stride) && is_vectorized<T>(weight, p.weight_stride));
    const float* sums = tile.collect();
    const Output out{p.out, p.is_float != 0, p.add != 0};
    for (int i = threadIdx.x; i < row_count * kTileWeights; i += kTileThreads) {
        const int row = i / kTileWeights, output = i % kTileWeights;
        if (output >= outputs) continue;
        const float sum = sums[row * kTileRow + output] + (p.bias ? p.bias[first_output + output] : 0.0f);
        out.write<T>(size_t(blockIdx.z) * p.out_head + (first_row + row) * p.out_stride + first_output + output, sum);
    }
}

#define GEMM(T, suffix, rows)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kTileThreads, rows < 128 ? 2 : 1) gemm_##rows##_##suffix(                            \
        const __grid_constant__ GemmParams params) {                                                              \
        gemm<T, rows>(params);                                                                                    \
    }                                                                                                             \
    EXPORT_KERNEL(gemm_##rows##_##suffix)
GEMM(__half, f16, 32)
GEMM(__half, f16, 128)
GEMM(__nv_bfloat16, bf16, 32)
GEMM(__nv_bfloat16, bf16, 128)
