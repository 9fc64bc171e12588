// What a kernel can ask of the hardware, once each: every wrapper of ptx.cuh and every group of built-in functions, with
// results that are known. Kernels run on an emulation in tests; on a GPU the probes show that it means the same there.
#include "probe.cuh"
#include "reduce.cuh"

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarpWords = 24, kBitWords = 16, kNumberWords = 12, kFunctions = 7, kFormats = 5;

// 32 threads, kWarpWords words for each.
PROBE(probe_warp) {
    const unsigned lane = threadIdx.x;
    unsigned* to = static_cast<unsigned*>(p.out) + kWarpWords * lane;
    to[0] = __shfl_sync(kAll, lane * 3, 5);
    to[1] = __shfl_sync(kAll, lane * 3, 9, 8);
    to[2] = __shfl_up_sync(kAll, lane, 3);
    to[3] = __shfl_up_sync(kAll, lane, 3, 16);
    to[4] = __shfl_down_sync(kAll, lane, 5);
    to[5] = __shfl_down_sync(kAll, lane, 5, 8);
    to[6] = __shfl_xor_sync(kAll, lane, 17);
    to[7] = __shfl_xor_sync(kAll, lane, 12, 8);
    to[8] = __ballot_sync(kAll, lane % 3 == 0);
    to[9] = unsigned(__any_sync(kAll, lane == 40) != 0) | unsigned(__all_sync(kAll, lane < 32) != 0) << 1;
    to[10] = __match_any_sync(kAll, lane / 5);
    int equal;
    to[11] = __match_all_sync(kAll, 7, &equal);
    to[12] = unsigned(equal != 0);
    to[13] = __reduce_add_sync(kAll, lane);
    to[14] = __reduce_max_sync(kAll, lane ^ 21);
    to[15] = __reduce_min_sync(kAll, lane + 4);
    to[16] = __reduce_xor_sync(kAll, lane);
    to[17] = __reduce_or_sync(kAll, lane & 5) << 8 | __reduce_and_sync(kAll, lane | 9);
    // Two halves of the warp go separate ways and meet again.
    if (lane < 16) {
        to[18] = __shfl_xor_sync(0x0000ffffu, lane, 1) + __reduce_add_sync(0x0000ffffu, 1u);
    } else {
        to[18] = __ballot_sync(0xffff0000u, lane % 2);
    }
    __syncwarp();
    to[19] = __float_as_uint(__shfl_xor_sync(kAll, float(lane), 2));
    to[20] = unsigned(warp_sum(float(lane)));
    to[21] = unsigned(warp_max(float(lane ^ 9)));
    to[22] = __float_as_uint(ptx::exp2_approximate(float(lane)));
    to[23] = warpSize;
}
EXPORT_KERNEL(probe_warp)

// Pairs of words; kBitWords words for each.
PROBE(probe_bits) {
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const unsigned a = static_cast<const unsigned*>(p.a)[i], b = static_cast<const unsigned*>(p.b)[i];
        const unsigned long long wide = (unsigned long long)(b) << 32 | a;
        unsigned* to = static_cast<unsigned*>(p.out) + kBitWords * i;
        to[0] = __brev(a);
        to[1] = unsigned(__clz(int(a))) | unsigned(__clzll((long long)(wide))) << 8 | unsigned(__ffs(int(a))) << 16 |
                unsigned(__ffsll((long long)(wide))) << 24;
        to[2] = unsigned(__popc(a)) | unsigned(__popcll(wide)) << 8;
        to[3] = unsigned(__mulhi(int(a), int(b)));
        to[4] = __umulhi(a, b);
        const unsigned long long high = __umul64hi(wide, ~wide);
        to[5] = unsigned(high) ^ unsigned(high >> 32);
        to[6] = __funnelshift_l(a, b, b & 63);
        to[7] = __funnelshift_r(a, b, b & 63);
        to[8] = __byte_perm(a, b, b & 0x7777);
        to[9] = ptx::prmt(a, b, a);
        to[10] = unsigned(__dp4a(int(a), int(b), -5));
        to[11] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(a, b, a << 8);
        to[12] = ptx::lop3<0xf0 ^ 0xcc ^ 0xaa>(a, b, ~b << 3);
        to[13] = min(a, b) ^ max(int(a), int(b));
        to[14] = __float_as_uint(__uint2float_rn(a));
        to[15] = __float_as_uint(__int2float_rn(int(b)));
    }
}
EXPORT_KERNEL(probe_bits)

// Pairs of floats; kNumberWords words for each. All of it is exact, or rounded to the nearest.
PROBE(probe_numbers) {
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const float a = static_cast<const float*>(p.a)[i], b = static_cast<const float*>(p.b)[i];
        unsigned* to = static_cast<unsigned*>(p.out) + kNumberWords * i;
        to[0] = __float_as_uint(__fadd_rn(a, b));
        to[1] = __float_as_uint(__fsub_rn(a, b));
        to[2] = __float_as_uint(__fmul_rn(a, b));
        to[3] = __float_as_uint(__fdiv_rn(a, b));
        to[4] = __float_as_uint(fmaf(a, b, -a));
        to[5] = __float_as_uint(__fsqrt_rn(fabsf(a)));
        to[6] = __float_as_uint(fmaxf(a, b)) ^ __float_as_uint(fminf(a, -b));
        to[7] = unsigned(__float2int_rn(a)) ^ unsigned(__float2int_rz(b)) << 16;
        to[8] = unsigned(__float2int_rd(a)) ^ unsigned(__float2int_ru(b)) << 16;
        to[9] = __float2uint_rn(a) ^ __float2uint_rz(b) << 16;
        to[10] = __float_as_uint(__saturatef(a));
        const long long both = __double_as_longlong(double(a) * double(b));
        to[11] = unsigned(both) ^ unsigned(both >> 32);
    }
}
EXPORT_KERNEL(probe_numbers)

// Functions that hardware approximates; kFunctions floats for each pair.
PROBE(probe_functions) {
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const float a = static_cast<const float*>(p.a)[i], b = static_cast<const float*>(p.b)[i];
        float* to = static_cast<float*>(p.out) + kFunctions * i;
        to[0] = expf(a);
        to[1] = tanhf(a);
        to[2] = rsqrtf(fabsf(a));
        to[3] = powf(fabsf(a), b);
        to[4] = logf(fabsf(a));
        to[5] = ptx::exp2_approximate(a);
        to[6] = __expf(a);
    }
}
EXPORT_KERNEL(probe_functions)

// Floats; the bits of each in kFormats shorter formats.
PROBE(probe_round) {
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const float a = static_cast<const float*>(p.a)[i];
        unsigned* to = static_cast<unsigned*>(p.out) + kFormats * i;
        to[0] = __half_as_ushort(from_float<__half>(a));
        to[1] = __bfloat16_as_ushort(from_float<__nv_bfloat16>(a));
        to[2] = from_float<__nv_fp8_e4m3>(a).__x;
        to[3] = from_float<__nv_fp8_e5m2>(a).__x;
        to[4] = ptx::round_tf32(a) & 0xffffe000u;
    }
}
EXPORT_KERNEL(probe_round)

// Words; what their lower bits stand for in each of four formats.
PROBE(probe_widen) {
    for (uint32_t i = threadIdx.x; i < p.count; i += blockDim.x) {
        const unsigned a = static_cast<const unsigned*>(p.a)[i];
        float* to = static_cast<float*>(p.out) + 4 * i;
        to[0] = to_float(__ushort_as_half((unsigned short)(a)));
        to[1] = to_float(__ushort_as_bfloat16((unsigned short)(a)));
        __nv_fp8_e4m3 e4m3;
        e4m3.__x = (unsigned char)(a);
        to[2] = to_float(e4m3);
        __nv_fp8_e5m2 e5m2;
        e5m2.__x = (unsigned char)(a);
        to[3] = to_float(e5m2);
    }
}
EXPORT_KERNEL(probe_widen)

PROBE(probe_multiply_bf16) { PROBE_MULTIPLY(multiply_bf16, float); }
EXPORT_KERNEL(probe_multiply_bf16)
PROBE(probe_multiply_f16) { PROBE_MULTIPLY(multiply_f16, float); }
EXPORT_KERNEL(probe_multiply_f16)
PROBE(probe_multiply_tf32) { PROBE_MULTIPLY(multiply_tf32, float); }
EXPORT_KERNEL(probe_multiply_tf32)
PROBE(probe_multiply_s8) { PROBE_MULTIPLY(multiply_s8, int); }
EXPORT_KERNEL(probe_multiply_s8)

// a: 32 rows of 8 half-words. The registers of all ldmatrix variants, 14 for each of 32 threads.
PROBE(probe_load_matrix) {
    __shared__ uint4 rows[32];
    const int lane = threadIdx.x;
    uint32_t* to = static_cast<uint32_t*>(p.out) + 14 * lane;
    rows[lane] = static_cast<const uint4*>(p.a)[lane];
    __syncwarp();
    uint32_t one[1], two[2], four[4];
    ptx::load_matrix_x1(one, &rows[lane % 8]);
    to[0] = one[0];
    ptx::load_matrix_x1_transposed(one, &rows[lane % 8]);
    to[1] = one[0];
    ptx::load_matrix_x2(two, &rows[lane % 16]);
    to[2] = two[0], to[3] = two[1];
    ptx::load_matrix_x2_transposed(two, &rows[lane % 16]);
    to[4] = two[0], to[5] = two[1];
    ptx::load_matrix_x4(four, &rows[lane]);
    for (int i = 0; i < 4; ++i) to[6 + i] = four[i];
    ptx::load_matrix_x4_transposed(four, &rows[lane]);
    for (int i = 0; i < 4; ++i) to[10 + i] = four[i];
}
EXPORT_KERNEL(probe_load_matrix)

// 64 threads copy 64 * 28 bytes through dynamic shared memory with 4, 8 and 16-byte copies; odd threads write zeros.
PROBE(probe_copy) {
    const int i = threadIdx.x;
    const bool valid = i % 2 == 0;
    const auto* in = static_cast<const uint32_t*>(p.a);
    auto* out = static_cast<uint32_t*>(p.out);
    auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
    ptx::copy_async<4>(words + i, in + i, valid);
    ptx::commit_group();
    ptx::copy_async<8>(words + 64 + 2 * i, in + 64 + 2 * i, valid);
    ptx::commit_group();
    ptx::copy_async<16>(words + 192 + 4 * i, in + 192 + 4 * i, valid);
    ptx::commit_group();
    ptx::wait_group<2>();
    out[i] = words[i];  // its own copy needs no barrier
    ptx::wait_group<0>();
    __syncthreads();
    for (int k = i; k < 384; k += 64) out[64 + k] = words[64 + (k ^ 1)];
}
EXPORT_KERNEL(probe_copy)

// 64 threads: the second warp tells the first what it has written, through flags in global memory, and back.
PROBE(probe_flags) {
    auto* words = static_cast<uint32_t*>(p.out);  // two flags, two values, the sum that each side reads
    if (threadIdx.x == 32) {
        words[2] = 11;
        ptx::store_release(words, 1);
        while (ptx::load_acquire_system(words + 1) != 7) {
        }
        words[4] = words[2] + words[3];
    } else if (threadIdx.x == 0) {
        while (ptx::load_acquire(words) != 1) {
        }
        words[5] = words[2];
        words[3] = 20;
        ptx::store_release_system(words + 1, 3);
        ptx::add_release(words + 1, 4);
    }
}
EXPORT_KERNEL(probe_flags)

// Blocks of 71 threads. out: a float sum, a smallest, a largest of 64 bits, a ticket, an exchanged word, four votes.
PROBE(probe_atomics) {
    __shared__ unsigned counted;
    auto* words = static_cast<uint32_t*>(p.out);
    if (threadIdx.x == 0) counted = 0;
    __syncthreads();
    atomicAdd(&counted, 1u);
    atomicAdd(reinterpret_cast<float*>(words), 0.5f);
    atomicMin(reinterpret_cast<int*>(words + 1), -int(threadIdx.x));
    atomicMax(reinterpret_cast<unsigned long long*>(words + 2), (unsigned long long)(threadIdx.x) << 33);
    atomicInc(words + 4, 6);
    if (threadIdx.x == 0 && atomicCAS(words + 5, 0xffffffffu, 1u) != 0xffffffffu) atomicAdd(words + 5, 2u);
    atomicOr(words + 6, 1u << threadIdx.x % 20);
    atomicAnd(words + 7, ~(1u << threadIdx.x % 20));
    const int odd = __syncthreads_count(threadIdx.x % 2);
    const int any = __syncthreads_or(threadIdx.x == 70), all = __syncthreads_and(threadIdx.x < 71);
    if (threadIdx.x == 0) {
        words[8] = unsigned(odd), words[9] = unsigned(any != 0), words[10] = unsigned(all != 0), words[11] = counted;
    }
}
EXPORT_KERNEL(probe_atomics)

// 96 threads: two warps hand over to the third, without waiting; then all sum.
PROBE(probe_barriers) {
    __shared__ uint32_t words[64];
    __shared__ float partial[32];
    auto* out = static_cast<uint32_t*>(p.out);
    if (threadIdx.x < 64) {
        words[threadIdx.x] = threadIdx.x * 5;
        ptx::barrier_arrive(1, 96);
    } else {
        ptx::barrier_sync(1, 96);
        const int lane = threadIdx.x % 32;
        out[lane] = words[lane] + words[lane + 32];
    }
    const float sum = block_sum(float(threadIdx.x), partial);
    __syncthreads();
    const float largest = block_max(float(threadIdx.x ^ 1), partial);
    if (threadIdx.x < 2) out[32 + threadIdx.x] = unsigned(threadIdx.x ? largest : sum);
}
EXPORT_KERNEL(probe_barriers)

// Loads and stores that say how memory is cached.
PROBE(probe_cached) {
    const auto* in = static_cast<const uint32_t*>(p.a);
    auto* out = static_cast<uint32_t*>(p.out);
    const int i = threadIdx.x;
    __stcg(out + i, __ldg(in + i));
    __stcs(out + 32 + i, __ldcg(in + 32 + i));
    __stwt(out + 64 + i, __ldca(in + 64 + i) + __ldcs(in + 96 + i));
}
EXPORT_KERNEL(probe_cached)
