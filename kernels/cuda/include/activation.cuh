// The functions of an MLP, element by element, in f32. Their numbers are those of kernels/src/cuda/activation.rs.
#pragma once
#include "ptx.cuh"

// x * sigmoid(y). The exponential of a large -y is infinite and the quotient zero, as it should be.
__device__ __forceinline__ float times_sigmoid(float x, float y) { return x / (1.0f + expf(-y)); }

struct Silu {
    __device__ __forceinline__ float operator()(float x) const { return times_sigmoid(x, x); }
};
struct Gelu {
    // erfc keeps the digits of small results, where 1 + erf has lost them.
    __device__ __forceinline__ float operator()(float x) const { return 0.5f * x * erfcf(x * -0.70710678f); }
};
struct GeluTanh {
    // (1 + tanh(y)) / 2 is the sigmoid of 2 y, here 2 sqrt(2 / pi) (x + 0.044715 x^3).
    __device__ __forceinline__ float operator()(float x) const {
        return times_sigmoid(x, x * (1.5957691f + 0.071354814f * x * x));
    }
};
struct QuickGelu {
    __device__ __forceinline__ float operator()(float x) const { return times_sigmoid(x, 1.702f * x); }
};
// Comparisons, not fminf and fmaxf, wherever something is limited: they let NaN pass.
struct Relu {
    __device__ __forceinline__ float operator()(float x) const { return x < 0.0f ? 0.0f : x; }
};

__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

// activation(gate) * up
template <class Activation> struct Gated {
    __device__ __forceinline__ float operator()(float gate, float up) const { return Activation{}(gate) * up; }
};
struct ClampedSwiglu {
    float limit, alpha;
    __device__ __forceinline__ float operator()(float gate, float up) const {
        gate = at_most(gate, limit);
        return times_sigmoid(gate, alpha * gate) * (within(up, limit) + 1.0f);
    }
};

enum ActivationNumber : uint32_t { kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu };
constexpr uint32_t kClampedSwiglu = 5;  // as a gating; the others are those of an activation

// use(f) for the activation of this number.
template <class Use> __device__ __forceinline__ void with_activation(uint32_t number, Use use) {
    switch (number) {
        case kSilu: return use(Silu{});
        case kGelu: return use(Gelu{});
        case kGeluTanh: return use(GeluTanh{});
        case kQuickGelu: return use(QuickGelu{});
        default: return use(Relu{});
    }
}
// use(f) for the gating of this number.
template <class Use> __device__ __forceinline__ void with_gating(uint32_t number, float limit, float alpha, Use use) {
    switch (number) {
        case kSilu: return use(Gated<Silu>{});
        case kGelu: return use(Gated<Gelu>{});
        case kGeluTanh: return use(Gated<GeluTanh>{});
        case kQuickGelu: return use(Gated<QuickGelu>{});
        case kRelu: return use(Gated<Relu>{});
        default: return use(ClampedSwiglu{limit, alpha});
    }
}
