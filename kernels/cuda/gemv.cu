// Dense products with few rows, which cost what reading the weights costs: up to four weights with one input at once.
//
// A block has some weights of one of the products, and each of its warps a slice of the inputs. With f32 any number of
// rows comes here, 16 at a time.
#include "product.cuh"

constexpr int kProducts = 4;

struct GemvParams {
    const void* input;  // [rows, inputs], of each head
    const void* weight[kProducts];  // [outputs, inputs], of each head
    const float* bias[kProducts];   // [outputs], or null
    void* out[kProducts];           // [rows, outputs], of each head
    uint32_t outputs[kProducts];
    uint32_t weight_stride[kProducts];
    uint32_t first_block[kProducts];  // those behind the last begin after all blocks
    uint32_t is_float[kProducts];     // out is f32
    uint32_t add[kProducts];          // to what is in out
    uint32_t out_stride[kProducts];
    uint32_t rows;
    uint32_t inputs;
    uint32_t input_stride;
    uint32_t input_head;   // elements from a head to the next
    uint32_t weight_head;
    uint32_t out_head;
};
EXPORT_PARAMS(GemvParams, input, weight, bias, out, outputs, weight_stride, first_block, is_float, add, out_stride, rows,
              inputs, input_stride, input_head, weight_head, out_head)

template <class T, int rows, int tiles> __device__ __forceinline__ void gemv(const GemvParams& p) {
    constexpr int kOutputs = 8 * tiles, kSums = rows * kOutputs;
    __shared__ float partial[kSlices * kSums];
    int product = 0;
    while (product + 1 < kProducts && blockIdx.x >= p.first_block[product + 1]) ++product;
    const int first_output = (blockIdx.x - p.first_block[product]) * kOutputs, outputs = p.outputs[product];
    const int first_row = blockIdx.y * rows, row_count = min(int(p.rows) - first_row, rows);
    const T* input = static_cast<const T*>(p.input) + size_t(blockIdx.z) * p.input_head + size_t(first_row) * p.input_stride;
    const T* weight = static_cast<const T*>(p.weight[product]) + size_t(blockIdx.z) * p.weight_head;
    const uint32_t stride = p.weight_stride[product];
    const int warp = threadIdx.x / 32, inputs = p.inputs;
    const int begin = warp * slice_length(inputs), end = min(begin + slice_length(inputs), inputs);

    // Rows and weights that are not there are the last ones once more; nobody looks at their sums.
    WarpSums<T, rows, tiles> sums([&](int row) { return input + size_t(min(row, row_count - 1)) * p.input_stride; });
    using Weights = Stream<T, tiles>;
    const Weights weights(reinterpret_cast<uint4*>(dynamic_shared) + warp * Weights::kRing, [&](int i) {
        return weight + size_t(min(first_output + i, outputs - 1)) * stride;
    });
    const bool vectors = inputs % kVector<T> == 0 && is_vectorized<T>(input, p.input_stride) &&
                         is_vectorized<T>(weight, stride);
    if (vectors) {
        weights.add_to(sums, begin, end);
    } else {
        weights.add_elements_to(sums, begin, end);
    }
    sums.write(partial + warp * kSums);
    __syncthreads();

    const Output out{p.out[product], p.is_float[product] != 0, p.add[product] != 0};
    const float* bias = p.bias[product];
    for (int i = threadIdx.x; i < row_count * kOutputs; i += blockDim.x) {
        const int output = first_output + i % kOutputs;
        if (output >= outputs) continue;
        const float sum = sum_slices(partial, kSums, i) + (bias ? bias[output] : 0.0f);
        const size_t row = first_row + i / kOutputs;
        out.write<T>(size_t(blockIdx.z) * p.out_head + row * p.out_stride[product] + output, sum);
    }
}

// Two blocks share a multiprocessor, but for those with many rows of f32, whose sums need the registers.
#define GEMV(T, suffix, rows, tiles)                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * kSlices, sizeof(T) * rows > 32 ? 1 : 2)                    \
        gemv_##rows##x##tiles##_##suffix(const __grid_constant__ GemvParams params) {                            \
        gemv<T, rows, tiles>(params);                                                                            \
    }                                                                                                            \
    EXPORT_KERNEL(gemv_##rows##x##tiles##_##suffix)
#define GEMV_16_BITS(T, suffix) \
    GEMV(T, suffix, 8, 1)       \
    GEMV(T, suffix, 8, 2)       \
    GEMV(T, suffix, 8, 4)       \
    GEMV(T, suffix, 16, 1)      \
    GEMV(T, suffix, 16, 2)      \
    GEMV(T, suffix, 16, 4)
GEMV_16_BITS(__half, f16)
GEMV_16_BITS(__nv_bfloat16, bf16)
GEMV(float, f32, 1, 2)
GEMV(float, f32, 4, 2)
GEMV(float, f32, 16, 2)
