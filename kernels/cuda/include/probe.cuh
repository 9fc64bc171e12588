// What the probes take.
#pragma once
#include "element.cuh"

struct ProbeParams {
    void* out;
    const void* a;
    const void* b;
    uint32_t count;
};
EXPORT_PARAMS(ProbeParams, out, a, b, count)

#define PROBE(name) extern "C" __global__ void __launch_bounds__(96) name(const __grid_constant__ ProbeParams p)

// d = a * b: a is 16 x K row-major, b 8 x K (that is K x 8 column-major), both as 32-bit words; 32 threads.
template <class T, class Multiply>
__device__ __forceinline__ void probe_multiply(const ProbeParams& p, Multiply multiply) {
    const auto* a = static_cast<const uint32_t*>(p.a);
    const auto* b = static_cast<const uint32_t*>(p.b);
    const int group = threadIdx.x / 4, part = threadIdx.x % 4;  // eight words per row of a and b
    const uint32_t left[4] = {a[group * 8 + part], a[(group + 8) * 8 + part], a[group * 8 + 4 + part],
                              a[(group + 8) * 8 + 4 + part]};
    const uint32_t right[2] = {b[group * 8 + part], b[group * 8 + 4 + part]};
    T sums[4] = {1, 2, 3, 4};
    multiply(sums, left, right);
    T* d = static_cast<T*>(p.out);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + part * 2 + i % 2] = sums[i] - T(i + 1);
}
#define PROBE_MULTIPLY(name, T) \
    probe_multiply<T>(p, [](T(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { ptx::name(d, a, b); })
