// Random numbers without a state: Philox4x32-10, a function of key and counter (Salmon et al., SC 2011).
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ uint4 philox(uint4 counter, uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xd2511f53u, counter.x), low0 = 0xd2511f53u * counter.x;
        const uint32_t high1 = __umulhi(0xcd9e8d57u, counter.z), low1 = 0xcd9e8d57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return counter;
}

// Uniform over 64 bits.
__device__ __forceinline__ uint64_t keyed_hash(uint64_t key, uint32_t value) {
    const uint4 block = philox(make_uint4(value, 0, 0, 0), key);
    return uint64_t(block.y) << 32 | block.x;
}

// The random bits of the tokens `2 * number` and `2 * number + 1` in the draw with this seed and index.
__device__ __forceinline__ uint4 draw_block(uint64_t seed, uint64_t index, uint32_t number) {
    return philox(make_uint4(number, 0, uint32_t(index), uint32_t(index >> 32)), seed);
}
__device__ __forceinline__ uint64_t draw_bits(uint4 block, uint32_t id) {
    return id % 2 == 0 ? uint64_t(block.y) << 32 | block.x : uint64_t(block.w) << 32 | block.z;
}
// Uniform in the open interval (0, 1), in steps of 2^-52.
__device__ __forceinline__ double uniform(uint64_t bits) {
    return (double(bits >> 12) + 0.5) * 2.220446049250313080847263336181640625e-16;
}
