// The first include of every kernel, and the only place where inline PTX lives. Each wrapper has two bodies: PTX(...)
// is the instruction for the GPU, EMULATED(...) is the same meaning on the CPU (see emulation.hpp). All of them take
// plain pointers; conversion to 32-bit shared addresses happens here.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>
// All dynamic shared memory is this one array. Kernels lay it out themselves.
extern "C" __shared__ __align__(1024) unsigned char dynamic_shared[];
#define EXPORT_KERNEL(kernel)
#define EXPORT_PARAMS(S, ...)
#define EMULATED(...)
#ifdef __CUDA_ARCH__
#define PTX(...) asm volatile(__VA_ARGS__)
#else
#define PTX(...)  // nvcc's pass over host code
#endif
#else
#include "emulation.hpp"
#define EXPORT_PARAMS(S, ...) EMU_LAYOUT(S, __VA_ARGS__)
#define EMULATED(...) __VA_ARGS__
#define PTX(...)
#endif

#define PTX_INLINE __device__ __forceinline__

namespace ptx {
// The 32-bit address of a pointer into shared memory. Not needed under the emulation.
PTX_INLINE uint32_t shared_address(const void* pointer) {
#ifdef __CUDA_ARCH__
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
    (void)pointer;
    return 0;
#endif
}

// ---------------------------------------------------------------------------------------------- cp.async
// Copies `bytes` (4, 8 or 16) from global to shared memory; with valid == false it writes zeros and does not read.
// The data is there after wait_group(), for this thread; for others after a barrier as well.
template <int bytes> PTX_INLINE void copy_async(void* shared, const void* global, bool valid = true) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    const int source_bytes = valid ? bytes : 0;
    if constexpr (bytes == 16) {  // .cg: through the second-level cache only
        PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(source_bytes)
            : "memory");
    } else {
        PTX("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
            "r"(source_bytes)
            : "memory");
    }
    EMULATED(emu::copy_async(shared, global, bytes, source_bytes));
}
PTX_INLINE void commit_group() {
    PTX("cp.async.commit_group;" ::: "memory");
    EMULATED(emu::commit_group());
}
// Waits until at most `newest` of this thread's committed groups are still under way.
template <int newest> PTX_INLINE void wait_group() {
    PTX("cp.async.wait_group %0;" ::"n"(newest) : "memory");
    EMULATED(emu::wait_group(newest));
}

// ---------------------------------------------------------------------------------------------- ldmatrix, stmatrix
// Lane 8 * m + r gives the address of row r of matrix m (16 bytes, 16-byte aligned).
PTX_INLINE void load_matrix_x1(uint32_t (&r)[1], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 1, false, row));
}
PTX_INLINE void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 2, false, row));
}
PTX_INLINE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 4, false, row));
}
PTX_INLINE void load_matrix_x1_transposed(uint32_t (&r)[1], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 1, true, row));
}
PTX_INLINE void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 2, true, row));
}
PTX_INLINE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    EMULATED(emu::load_matrix(r, 4, true, row));
}
// sm_90 and later.
PTX_INLINE void store_matrix_x2(void* row, const uint32_t (&r)[2]) {
    PTX("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]) : "memory");
    EMULATED(emu::store_matrix(row, r, 2, false));
}
PTX_INLINE void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
    PTX("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]),
        "r"(r[2]), "r"(r[3]) : "memory");
    EMULATED(emu::store_matrix(row, r, 4, false));
}

// ---------------------------------------------------------------------------------------------- mma.sync
// d += a * b on one warp, in place. a is 16 x K row-major, b is K x 8 column-major, d is 16 x 8.
#define PTX_MULTIPLY(name, shape_and_types, element, T, letter)                                                          \
    PTX_INLINE void name(T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                                    \
        PTX("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
            : "+" letter(d[0]), "+" letter(d[1]), "+" letter(d[2]), "+" letter(d[3])                                     \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                         \
        EMULATED(emu::multiply(emu::Element::element, d, a, b, d));                                                      \
    }
PTX_MULTIPLY(multiply_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", bf16, float, "f")
PTX_MULTIPLY(multiply_f16, "m16n8k16.row.col.f32.f16.f16.f32", f16, float, "f")
PTX_MULTIPLY(multiply_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32", tf32, float, "f")
PTX_MULTIPLY(multiply_s8, "m16n8k32.row.col.s32.s8.s8.s32", s8, int, "r")
PTX_MULTIPLY(multiply_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32", e4m3, float, "f")  // sm_89 and later
PTX_MULTIPLY(multiply_e5m2, "m16n8k32.row.col.f32.e5m2.e5m2.f32", e5m2, float, "f")  // sm_89 and later
#undef PTX_MULTIPLY

// ---------------------------------------------------------------------------------------------- bits
// Any function of three bits at each position: `table` is f(0xf0, 0xcc, 0xaa).
template <int table> PTX_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    PTX("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(table));
    EMULATED(for (int i = 0; i < 8; ++i) if (table >> i & 1)
                 result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c));
    return result;
}
PTX_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// Rounds a float to tf32's 10 mantissa bits (to nearest, ties away from zero).
PTX_INLINE uint32_t round_tf32(float value) {
    uint32_t result = 0;
    PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
    EMULATED(result = value != value ? 0x7fffffffu : (__float_as_uint(value) + 0x1000u) & 0xffffe000u);
    return result;
}
// Two E4M3 numbers, not NaN, in the lower half of `pair`, as two of type f16.
PTX_INLINE uint32_t widen_e4m3(uint32_t pair) {
    uint32_t result = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    PTX("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(static_cast<uint16_t>(pair)));
#else  // Exponent and mantissa move to where f16 has them; a factor makes up for the other bias.
    const uint32_t bytes = prmt(pair, 0, 0x1404);
    result = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> 1;
    __half2 numbers;
    memcpy(&numbers, &result, 4);
    numbers = __hmul2(numbers, __floats2half2_rn(256.0f, 256.0f));
    memcpy(&result, &numbers, 4);
#endif
    return result;
}
// 2^x, approximate.
PTX_INLINE float exp2_approximate(float value) {
    float result = 0;
    PTX("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    EMULATED(result = std::exp2(value));
    return result;
}

// ---------------------------------------------------------------------------------------------- flags between blocks
PTX_INLINE uint32_t load_acquire(const uint32_t* flag) {
    uint32_t value = 0;
    PTX("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    EMULATED(value = emu::load_acquire(flag));
    return value;
}
PTX_INLINE void store_release(uint32_t* flag, uint32_t value) {
    PTX("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
    EMULATED(emu::store_release(flag, value));
}
PTX_INLINE void add_release(uint32_t* flag, uint32_t value) {
    PTX("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
    EMULATED(atomicAdd(flag, value));
}
// The same across GPUs.
PTX_INLINE uint32_t load_acquire_system(const uint32_t* flag) {
    uint32_t value = 0;
    PTX("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    EMULATED(value = emu::load_acquire(flag));
    return value;
}
PTX_INLINE void store_release_system(uint32_t* flag, uint32_t value) {
    PTX("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
    EMULATED(emu::store_release(flag, value));
}

// ---------------------------------------------------------------------------------------------- barriers
// A barrier of `threads` threads of the block; ids 1 to 15 are free (0 is __syncthreads).
PTX_INLINE void barrier_sync(int id, int threads) {
    PTX("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
    EMULATED(emu::barrier(unsigned(id), unsigned(threads), false, emu::Site::current()));
}
PTX_INLINE void barrier_arrive(int id, int threads) {
    PTX("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
    EMULATED(emu::barrier_arrive(unsigned(id), unsigned(threads), emu::Site::current()));
}

// mbarrier and the bulk copy that completes on it: sm_90 and later.
PTX_INLINE void mbarrier_init(uint64_t* barrier, int arrivals) {
    PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
    EMULATED(emu::mbarrier_init(barrier, unsigned(arrivals)));
}
// Makes initialised mbarriers visible to the copy engine; one thread calls it after mbarrier_init.
PTX_INLINE void mbarrier_init_fence() { PTX("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX_INLINE void mbarrier_arrive(uint64_t* barrier) {
    PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
    EMULATED(emu::mbarrier_arrive(barrier, 0));
}
PTX_INLINE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
    EMULATED(emu::mbarrier_arrive(barrier, unsigned(bytes)));
}
// Waits for the end of the phase with this parity: 0 for the first, then 1, 0, ...
PTX_INLINE void mbarrier_wait(uint64_t* barrier, int parity) {
    PTX("{\n"
        ".reg .pred done;\n"
        "waiting:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra waiting;\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
    EMULATED(emu::mbarrier_wait(barrier, unsigned(parity)));
}
PTX_INLINE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
    EMULATED(emu::copy_bulk(shared, global, unsigned(bytes), barrier));
}
}  // namespace ptx
#undef PTX_INLINE
