// What happens element by element or row by row. Sizes are those of the elements' type except where units are named.
#include "activation.cuh"
#include "element.cuh"
#include "units.cuh"

constexpr int kThreads = 256;

__device__ __forceinline__ bool is_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The first of the `count` elements that are this thread's.
template <int count> __device__ __forceinline__ uint64_t first_element() {
    return (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * count;
}

// ---------------------------------------------------------------------------------------------- x = f(x)
struct MapParams {
    void* x;  // [len]
    uint64_t len;
    float operand;
    uint32_t function;
};
EXPORT_PARAMS(MapParams, x, len, operand, function)

// Behind the activations.
constexpr uint32_t kScale = 5, kClamp = 6, kSoftCap = 7;

template <int count, class T, class F> __device__ __forceinline__ void map_at(T* x, F f) {
    float values[count];
    load(values, x);
#pragma unroll
    for (int n = 0; n < count; ++n) values[n] = f(values[n]);
    store(x, values);
}

template <class T, class F> __device__ __forceinline__ void map_with(const MapParams& p, F f) {
    constexpr int count = kVector<T>;
    const uint64_t first = first_element<count>();
    T* x = static_cast<T*>(p.x);
    if (is_aligned(x) && first + count <= p.len) return map_at<count>(x + first, f);
    for (uint64_t i = first; i < first + count && i < p.len; ++i) map_at<1>(x + i, f);
}

template <class T> __device__ __forceinline__ void map(const MapParams& p) {
    const float operand = p.operand;
    switch (p.function) {
        case kScale: return map_with<T>(p, [operand](float x) { return x * operand; });
        case kClamp: return map_with<T>(p, [operand](float x) { return within(x, operand); });
        case kSoftCap: return map_with<T>(p, [operand](float x) { return operand * tanhf(x / operand); });
        default: return with_activation(p.function, [&p](auto f) { map_with<T>(p, f); });
    }
}
KERNELS(map, kThreads, MapParams)

// ---------------------------------------------------------------------------------------------- x = f(x, y)
struct JoinParams {
    void* x;        // [len]
    const void* y;  // [len]
    uint64_t len;
    float limit;
    float alpha;
    uint32_t function;
};
EXPORT_PARAMS(JoinParams, x, y, len, limit, alpha, function)

// Behind the gatings.
constexpr uint32_t kAdd = 6;

template <int count, class T, class Y, class F> __device__ __forceinline__ void join_at(T* x, const Y* y, F f) {
    float values[count], others[count];
    load(values, x);
    load(others, y);
#pragma unroll
    for (int n = 0; n < count; ++n) values[n] = f(values[n], others[n]);
    store(x, values);
}

// y has the type of x, or fewer bytes.
template <class T, class Y, class F> __device__ __forceinline__ void join_with(const JoinParams& p, F f) {
    constexpr int count = kVector<T>;
    const uint64_t first = first_element<count>();
    T* x = static_cast<T*>(p.x);
    const Y* y = static_cast<const Y*>(p.y);
    if (is_aligned(x) && is_aligned(y) && first + count <= p.len) return join_at<count>(x + first, y + first, f);
    for (uint64_t i = first; i < first + count && i < p.len; ++i) join_at<1>(x + i, y + i, f);
}

template <class T> __device__ __forceinline__ void join(const JoinParams& p) {
    if (p.function == kAdd) return join_with<T, T>(p, [](float x, float y) { return x + y; });
    with_gating(p.function, p.limit, p.alpha, [&p](auto f) { join_with<T, T>(p, f); });
}
KERNELS(join, kThreads, JoinParams)

// x is f32, and what is added to it of type T.
template <class T> __device__ __forceinline__ void add_wide(const JoinParams& p) {
    join_with<float, T>(p, [](float x, float y) { return x + y; });
}
KERNEL_OF(add_wide, f16, __half, kThreads, JoinParams)
KERNEL_OF(add_wide, bf16, __nv_bfloat16, kThreads, JoinParams)

// ---------------------------------------------------------------------------------------------- rows
// Block (row, piece) does a piece of a row.
struct RowsParams {
    void* x;           // [rows, width]
    const void* with;  // add_bias: f32 [width]; scale_rows: [rows]
    uint32_t width;
};
EXPORT_PARAMS(RowsParams, x, with, width)

// f(values, column of the first) for all of the row, 16 bytes at once or element by element.
template <int count, class T, class F> __device__ __forceinline__ void map_row(T* row, uint32_t width, F f) {
    const uint32_t step = gridDim.y * blockDim.x * count;
    for (uint32_t i = (blockIdx.y * blockDim.x + threadIdx.x) * count; i < width; i += step) {
        float values[count];
        load(values, row + i);
        f(values, i);
        store(row + i, values);
    }
}
template <class T, class F> __device__ __forceinline__ void map_rows(const RowsParams& p, bool vectors, F f) {
    T* row = static_cast<T*>(p.x) + size_t(blockIdx.x) * p.width;
    if (vectors && is_vectorized<T>(p.x, p.width)) {
        map_row<kVector<T>>(row, p.width, f);
    } else {
        map_row<1>(row, p.width, f);
    }
}

struct AddBias {
    const float* bias;
    template <int count> __device__ __forceinline__ void operator()(float (&values)[count], uint32_t column) const {
        float added[count];
        load_floats(added, bias + column);
#pragma unroll
        for (int n = 0; n < count; ++n) values[n] += added[n];
    }
};
template <class T> __device__ __forceinline__ void add_bias(const RowsParams& p) {
    map_rows<T>(p, is_aligned(p.with), AddBias{static_cast<const float*>(p.with)});
}
KERNELS(add_bias, kThreads, RowsParams)

struct Times {
    float factor;
    template <int count> __device__ __forceinline__ void operator()(float (&values)[count], uint32_t) const {
#pragma unroll
        for (int n = 0; n < count; ++n) values[n] *= factor;
    }
};
template <class T> __device__ __forceinline__ void scale_rows(const RowsParams& p) {
    const float gate = to_float(static_cast<const T*>(p.with)[blockIdx.x]);
    map_rows<T>(p, true, Times{times_sigmoid(1.0f, gate)});
}
KERNELS(scale_rows, kThreads, RowsParams)

// ---------------------------------------------------------------------------------------------- copies
// All sizes in units. Block (part, piece) does a piece of a part; the parts of a row follow each other.
struct CopyPartsParams {
    const void* from;  // [parts, from_width]
    void* to;          // [parts, to_width]
    uint32_t from_width;
    uint32_t out_of;
    uint32_t to_width;
    uint32_t into;
    uint32_t width;
};
EXPORT_PARAMS(CopyPartsParams, from, to, from_width, out_of, to_width, into, width)

template <class Unit> __device__ __forceinline__ void copy_parts(const CopyPartsParams& p) {
    const uint32_t i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= p.width) return;
    const Unit* from = static_cast<const Unit*>(p.from) + size_t(blockIdx.x) * p.from_width + p.out_of;
    Unit* to = static_cast<Unit*>(p.to) + size_t(blockIdx.x) * p.to_width + p.into;
    to[i] = from[i];
}
UNIT_KERNELS(copy_parts, kThreads, CopyPartsParams)

struct ConvertParams {
    const void* from;  // [len]
    void* to;          // [len]
    uint64_t len;
};
EXPORT_PARAMS(ConvertParams, from, to, len)

template <class From, class To> __device__ __forceinline__ void convert(const ConvertParams& p) {
    constexpr int count = kVector<From> < kVector<To> ? kVector<From> : kVector<To>;
    const uint64_t first = first_element<count>();
    const From* from = static_cast<const From*>(p.from);
    To* to = static_cast<To*>(p.to);
    if (is_aligned(from) && is_aligned(to) && first + count <= p.len) {
        float values[count];
        load(values, from + first);
        return store(to + first, values);
    }
    for (uint64_t i = first; i < first + count && i < p.len; ++i) to[i] = from_float<To>(to_float(from[i]));
}
#define CONVERT(from, From, to, To)                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads) convert_##from##_##to(                        \
        const __grid_constant__ ConvertParams params) {                                                  \
        convert<From, To>(params);                                                                       \
    }                                                                                                    \
    EXPORT_KERNEL(convert_##from##_##to)
CONVERT(f32, float, f16, __half)
CONVERT(f32, float, bf16, __nv_bfloat16)
CONVERT(f16, __half, f32, float)
CONVERT(f16, __half, bf16, __nv_bfloat16)
CONVERT(bf16, __nv_bfloat16, f32, float)
CONVERT(bf16, __nv_bfloat16, f16, __half)
