// Kernels that move memory without a look at its elements: in units of 1 to 16 bytes, whatever the alignment allows.
// UNIT_KERNELS(name, threads, Params) makes name_1, name_2 to name_16, which call
// `template <class Unit> __device__ void name(const Params&)`.
#pragma once
#include "ptx.cuh"

#define UNIT_KERNEL_OF(name, bytes, Unit, threads, Params)                                                      \
    extern "C" __global__ void __launch_bounds__(threads) name##_##bytes(const __grid_constant__ Params params) { \
        name<Unit>(params);                                                                                     \
    }                                                                                                           \
    EXPORT_KERNEL(name##_##bytes)
#define UNIT_KERNELS(name, threads, Params)            \
    UNIT_KERNEL_OF(name, 1, uint8_t, threads, Params)  \
    UNIT_KERNEL_OF(name, 2, uint16_t, threads, Params) \
    UNIT_KERNEL_OF(name, 4, uint32_t, threads, Params) \
    UNIT_KERNEL_OF(name, 8, uint2, threads, Params)    \
    UNIT_KERNEL_OF(name, 16, uint4, threads, Params)
