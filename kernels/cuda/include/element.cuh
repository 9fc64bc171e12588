// Element types: every kernel computes in f32 and reads and writes float, __half or __nv_bfloat16.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 value) { return float(value); }
__device__ __forceinline__ float to_float(__nv_fp8_e5m2 value) { return float(value); }

// Rounds to the nearest; eight-bit types saturate.
template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <> __device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float value) {
    return __nv_fp8_e4m3(value);
}
template <> __device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float value) {
    return __nv_fp8_e5m2(value);
}

// `count` elements that are loaded and stored at once; at most 16 bytes.
template <class T, int count> struct alignas(sizeof(T) * count) Pack {
    static_assert(sizeof(T) * count <= 16, "a thread moves 16 bytes at once");
    T at[count];
};

// Elements in 16 bytes.
template <class T> constexpr int kVector = 16 / int(sizeof(T));

// Whether rows of `width` elements that begin at `pointer` can be moved 16 bytes at once.
template <class T> __device__ __forceinline__ bool is_vectorized(const void* pointer, int width) {
    return width % kVector<T> == 0 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T, int count> __device__ __forceinline__ void load(float (&values)[count], const T* from) {
    const auto pack = *reinterpret_cast<const Pack<T, count>*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = to_float(pack.at[i]);
}
// The same from floats, also of more than 16 bytes: then in several loads, each at a multiple of 16.
template <int count> __device__ __forceinline__ void load_floats(float (&values)[count], const float* from) {
    constexpr int step = count < 4 ? count : 4;
#pragma unroll
    for (int i = 0; i < count; i += step) {
        const auto pack = *reinterpret_cast<const Pack<float, step>*>(from + i);
#pragma unroll
        for (int n = 0; n < step; ++n) values[i + n] = pack.at[n];
    }
}
template <class T, int count> __device__ __forceinline__ void store(T* to, const float (&values)[count]) {
    Pack<T, count> pack;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.at[i] = from_float<T>(values[i]);
    *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

// A kernel for each element type: KERNELS(name, threads, Params) makes name_f32, name_f16 and name_bf16, which call
// `template <class T> __device__ void name(const Params&)`.
#define KERNEL_OF(name, suffix, T, threads, Params)                                                              \
    extern "C" __global__ void __launch_bounds__(threads) name##_##suffix(const __grid_constant__ Params params) { \
        name<T>(params);                                                                                         \
    }                                                                                                            \
    EXPORT_KERNEL(name##_##suffix)
#define KERNELS(name, threads, Params)                    \
    KERNEL_OF(name, f32, float, threads, Params)          \
    KERNEL_OF(name, f16, __half, threads, Params)         \
    KERNEL_OF(name, bf16, __nv_bfloat16, threads, Params)
