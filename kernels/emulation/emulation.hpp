// CUDA on the CPU, for tests: this header lets g++ (-std=c++20) compile a .cu file as ordinary C++. What runs is the
// kernel's own text, so its indexing, masks, block boundaries, reductions, use of shared memory, barriers, shuffles and
// matrix instructions are all executed and checked, where there is neither a GPU nor anything of CUDA.
//
//   emulation.hpp        what a kernel sees: qualifiers, threadIdx, barriers, shuffles, votes, atomics, intrinsics
//   emulation_types.hpp  vector types, __nv_bfloat16, __half and eight-bit floats, with CUDA's names and bit layouts
//   emulation.h, .cpp    the C interface: launches, device memory, settings, counters
//   machine, fiber       how a block runs     meetings   barriers and operations of a warp
//   checker, shared,     what is checked      copies     asynchronous copies and mbarriers
//   heap                                      matrices   ldmatrix, stmatrix, mma
//   faults.cu            a kernel with each kind of fault, for the test that they are reported
//   conformity.cpp       the types against those of the toolkit
//
// How it works:
//
// - Every CUDA thread is a fiber; a block runs to its end on one OS thread. A fiber runs until it has to wait. In which
//   order they go on is the schedule: from the first, from the last, or random and also interrupted at random accesses.
//   All are deterministic. A missing barrier can be invisible in one of them, so tests run several.
// - An operation of a warp is a meeting: every lane leaves a pointer to its operands, and the last one to come computes
//   for all, directly in their frames.
// - __shared__ is thread_local: block-scope variables are then static, one per OS thread, and that is one per block. The
//   dynamic shared memory is one array, filled with NaN before each block and followed by a guard zone.
// - Kernels are compiled with -fsanitize=thread and linked WITHOUT it: the compiler calls __tsan_read4() and so on before
//   every load and store, and checker.cpp has these functions. So every access to shared memory is checked for races, and
//   for being written before; device memory for its bounds, to the byte; both for alignment. Atomics, shuffles and votes
//   do not order other accesses, as CUDA does not promise it either.
// - cp.async fills its destination with NaN and copies in wait_group, a bulk copy when somebody waits for its mbarrier.
// - A failed launch answers with one sentence that names kernel, block, thread and source line; the next starts afresh.
//
// Rules for kernels:
//
// - Include ptx.cuh first, directly or not, and nothing of CUDA. No inline PTX outside of it and no 32-bit shared
//   addresses. A new instruction gets a wrapper there, with both bodies, and a probe in probe.cu.
// - extern "C" __global__ void name(const __grid_constant__ Params), then EXPORT_KERNEL(name).
// - Dynamic shared memory is the array dynamic_shared, carved up by hand.
// - Loops that wait for a flag call ptx::load_acquire or __nanosleep, which let other fibers run. Blocks that wait for
//   each other need an OS thread each (emu_workers).
// - What is within #ifdef __CUDA_ARCH__ is not tested.
// - Leaving before a barrier is an error here, even where hardware bears it; so are two threads that store the same.
//
// What only a GPU shows: speed; the order of global memory accesses between blocks (fences do nothing here, and device
// memory is not checked for races); the last digits (__expf, rsqrtf and tensor cores are exact here, so bounds must leave
// room for both); whether PTX means what its emulation says, which is what the probes are for; and what nvcc does not
// compile. There is no wgmma, no tensor map and no cluster here yet.
//
// Pitfalls of this code: glibc declares __expf and its like, so they are macros; __noinline__ must not be one, since
// libstdc++ has an attribute of that name; assert is redefined behind the last standard header. What is inlined into
// kernels is marked EMU_QUIET, or it would report its own accesses. Kernels need -fstack-clash-protection: large local
// arrays would jump over the guard page of a fiber's stack.
#pragma once
#define CUDA_EMULATION 1

#include <cassert>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>
#include <utility>

#include "emulation_types.hpp"

// ---------------------------------------------------------------------------------------------- qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
// A block-scope `thread_local` is implicitly static: one object per OS thread, and a block never leaves its OS thread.
#define __shared__ thread_local

// Helpers of the emulation itself are not instrumented: they report their accesses with emu::touch().
#define EMU_QUIET __attribute__((no_sanitize("thread")))

// The one dynamic shared array. `__thread` and not `thread_local`, so that no initialisation wrapper is called.
extern "C" __thread unsigned char dynamic_shared[];

namespace emu {
using Site = std::source_location;

// ---------------------------------------------------------------------------------------------- run-time interface
struct Coordinates {
    uint3 thread, block;
    dim3 threads, blocks;  // blockDim, gridDim
    unsigned lane;
};
// Constant for the life of a fiber, so the compiler may keep the reference in a register.
[[gnu::const]] const Coordinates& here();

// Ends the launch with an error that names kernel, block and thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Lets other threads of the block run; a spin loop has to call it (__nanosleep and acquire loads do).
void pause();

enum class Access { read, write, atomic, async_write };
// Tells the memory checker about an access that compiled code did not report by itself.
void touch(const void* address, size_t bytes, Access kind);

// All lanes of `mask` meet; the last to arrive runs `combine` once over everybody's frame, then all go on. Lanes
// share one address space, so `combine` reads and writes the others' frames directly.
using Combine = void (*)(void* const frames[32], unsigned mask);
void meet(unsigned mask, const char* operation, void* frame, Combine combine, Site site);
void sync_warp(unsigned mask, Site site);
unsigned live_lanes();

// bar.sync: returns how many of the arriving threads had a true predicate. count 0 means the whole block.
unsigned barrier(unsigned id, unsigned count, bool predicate, Site site);
void barrier_arrive(unsigned id, unsigned count, Site site);
unsigned block_size();

// ---------------------------------------------------------------------------------- bodies of what is in ptx.cuh
// cp.async: the destination is overwritten with a NaN pattern at once and gets its data only in wait_group().
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
void commit_group();
void wait_group(unsigned newest_allowed);

void load_matrix(uint32_t* registers, int count, bool transposed, const void* row, Site site = Site::current());
void store_matrix(void* row, const uint32_t* registers, int count, bool transposed, Site site = Site::current());

enum class Element { bf16, f16, tf32, e4m3, e5m2, s8 };
void multiply(Element element, void* d, const uint32_t* a, const uint32_t* b, const void* c,
              Site site = Site::current());

void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site = Site::current());
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

// ---------------------------------------------------------------------------------------------- kernel table
using Invoke = void (*)(void** arguments);
bool enlist(const char* name, Invoke invoke, size_t parameter_size);
// How a struct of parameters lies in memory: "name size field:offset:size ...".
bool enlist_layout(const char* layout);

// Unpacks cuLaunchKernel's array of pointers to arguments into a call.
template <auto kernel> struct Unpack;
template <class... Parameters, void (*kernel)(Parameters...)> struct Unpack<kernel> {
    static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters travel as bytes");
    static constexpr size_t size = (sizeof(Parameters) + ... + 0);
    EMU_QUIET static void invoke(void** arguments) {
        [&]<size_t... i>(std::index_sequence<i...>) EMU_QUIET {
            kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[i])...);
        }(std::index_sequence_for<Parameters...>{});
    }
};

// ---------------------------------------------------------------------------------------------- warp exchange
enum class Shuffle { index, up, down, butterfly };

EMU_QUIET inline int shuffle_source(Shuffle kind, int operand, int width) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle width %d is not a power of two up to 32", width);
    const int lane = int(here().lane), first = lane & ~(width - 1), last = first + width - 1;
    int source = lane;
    switch (kind) {
        case Shuffle::index: return first | (operand & (width - 1));
        case Shuffle::up: source = lane - operand; break;
        case Shuffle::down: source = lane + operand; break;
        case Shuffle::butterfly: return (lane ^ operand) > last ? lane : lane ^ operand;
    }
    return source < first || source > last ? lane : source;
}

template <class T> struct Exchange {
    T value, result;
    int source;
    EMU_QUIET static void combine(void* const frames[32], unsigned mask) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            auto* mine = static_cast<Exchange*>(frames[lane]);
            if (!(mask >> mine->source & 1))
                fail("shuffle: lane %d reads lane %d, which takes no part (mask %08x)", lane, mine->source, mask);
            mine->result = static_cast<Exchange*>(frames[mine->source])->value;
        }
    }
};

template <class T> EMU_QUIET T shuffle(const char* name, Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
    Exchange<T> frame{value, value, shuffle_source(kind, operand, width)};
    meet(mask, name, &frame, Exchange<T>::combine, site);
    return frame.result;
}

// Votes, matches and reductions: every lane gives a value and receives `Operation` applied to all of them.
template <class T, class Result> struct Gather {
    T value;
    Result result;
};
template <class T, class Result, class Operation>
EMU_QUIET Result gather(const char* name, unsigned mask, T value, Operation, Site site) {
    Gather<T, Result> frame{value, Result{}};
    meet(mask, name, &frame, [](void* const frames[32], unsigned mask) EMU_QUIET {
        T values[32];
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) values[lane] = static_cast<Gather<T, Result>*>(frames[lane])->value;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) static_cast<Gather<T, Result>*>(frames[lane])->result = Operation{}(values, mask, lane);
    }, site);
    return frame.result;
}
struct EqualLanes {  // the set of lanes that hold the same value as `lane`
    template <class T> EMU_QUIET unsigned operator()(const T* values, unsigned mask, int lane) const {
        unsigned equal = 0;
        for (int other = 0; other < 32; ++other)
            if (mask >> other & 1 && values[other] == values[lane]) equal |= 1u << other;
        return equal;
    }
};
struct TrueLanes {
    EMU_QUIET unsigned operator()(const bool* values, unsigned mask, int) const {
        unsigned set = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && values[lane]) set |= 1u << lane;
        return set;
    }
};
template <class Step> struct Fold {
    template <class T> EMU_QUIET T operator()(const T* values, unsigned mask, int) const {
        int lane = __builtin_ctz(mask);
        T total = values[lane];
        while (++lane < 32)
            if (mask >> lane & 1) total = Step{}(total, values[lane]);
        return total;
    }
};

// ---------------------------------------------------------------------------------------------- atomics
template <size_t size> struct BitsOf;
template <> struct BitsOf<2> { using type = uint16_t; };
template <> struct BitsOf<4> { using type = uint32_t; };
template <> struct BitsOf<8> { using type = uint64_t; };

// Applies `step` atomically (blocks may run on several OS threads) and returns the former value.
template <class T, class Step> EMU_QUIET T update(T* address, Step step) {
    using Bits = typename BitsOf<sizeof(T)>::type;
    touch(address, sizeof(T), Access::atomic);
    auto* bits = reinterpret_cast<Bits*>(address);
    Bits before = __atomic_load_n(bits, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(bits, &before, bit_cast<Bits>(T(step(bit_cast<T>(before)))), false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return bit_cast<T>(before);
}
template <class T> EMU_QUIET T load_acquire(const T* address) {
    touch(address, sizeof(T), Access::atomic);
    pause();
    T value;
    __atomic_load(address, &value, __ATOMIC_ACQUIRE);
    return value;
}
template <class T> EMU_QUIET void store_release(T* address, T value) {
    touch(address, sizeof(T), Access::atomic);
    __atomic_store(address, &value, __ATOMIC_RELEASE);
}
}  // namespace emu

// Names the kernel in the launch table. One line after each kernel; expands to nothing for the GPU.
#define EXPORT_KERNEL(kernel) \
    [[maybe_unused]] static const bool emu_enlisted_##kernel = emu::enlist(#kernel, emu::Unpack<&kernel>::invoke, emu::Unpack<&kernel>::size);

// Tells the launcher how a struct of parameters lies in memory, so that a test can compare it with the other side's. At
// most 40 fields.
#define EMU_FIELD(S, field) + " " #field ":" + std::to_string(offsetof(S, field)) + ":" + std::to_string(sizeof(S::field))
#define EMU_EACH_1(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_2(S, __VA_ARGS__))
#define EMU_EACH_2(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_3(S, __VA_ARGS__))
#define EMU_EACH_3(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_4(S, __VA_ARGS__))
#define EMU_EACH_4(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_5(S, __VA_ARGS__))
#define EMU_EACH_5(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_6(S, __VA_ARGS__))
#define EMU_EACH_6(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_7(S, __VA_ARGS__))
#define EMU_EACH_7(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_8(S, __VA_ARGS__))
#define EMU_EACH_8(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_9(S, __VA_ARGS__))
#define EMU_EACH_9(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_10(S, __VA_ARGS__))
#define EMU_EACH_10(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_11(S, __VA_ARGS__))
#define EMU_EACH_11(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_12(S, __VA_ARGS__))
#define EMU_EACH_12(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_13(S, __VA_ARGS__))
#define EMU_EACH_13(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_14(S, __VA_ARGS__))
#define EMU_EACH_14(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_15(S, __VA_ARGS__))
#define EMU_EACH_15(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_16(S, __VA_ARGS__))
#define EMU_EACH_16(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_17(S, __VA_ARGS__))
#define EMU_EACH_17(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_18(S, __VA_ARGS__))
#define EMU_EACH_18(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_19(S, __VA_ARGS__))
#define EMU_EACH_19(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_20(S, __VA_ARGS__))
#define EMU_EACH_20(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_21(S, __VA_ARGS__))
#define EMU_EACH_21(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_22(S, __VA_ARGS__))
#define EMU_EACH_22(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_23(S, __VA_ARGS__))
#define EMU_EACH_23(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_24(S, __VA_ARGS__))
#define EMU_EACH_24(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_25(S, __VA_ARGS__))
#define EMU_EACH_25(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_26(S, __VA_ARGS__))
#define EMU_EACH_26(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_27(S, __VA_ARGS__))
#define EMU_EACH_27(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_28(S, __VA_ARGS__))
#define EMU_EACH_28(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_29(S, __VA_ARGS__))
#define EMU_EACH_29(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_30(S, __VA_ARGS__))
#define EMU_EACH_30(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_31(S, __VA_ARGS__))
#define EMU_EACH_31(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_32(S, __VA_ARGS__))
#define EMU_EACH_32(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_33(S, __VA_ARGS__))
#define EMU_EACH_33(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_34(S, __VA_ARGS__))
#define EMU_EACH_34(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_35(S, __VA_ARGS__))
#define EMU_EACH_35(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_36(S, __VA_ARGS__))
#define EMU_EACH_36(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_37(S, __VA_ARGS__))
#define EMU_EACH_37(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_38(S, __VA_ARGS__))
#define EMU_EACH_38(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_39(S, __VA_ARGS__))
#define EMU_EACH_39(S, field, ...) EMU_FIELD(S, field) __VA_OPT__(EMU_EACH_40(S, __VA_ARGS__))
#define EMU_EACH_40(S, field) EMU_FIELD(S, field)
#define EMU_LAYOUT(S, ...)                                                                                               \
    [[maybe_unused]] static const bool emu_layout_##S =                                                                  \
        emu::enlist_layout((std::string(#S " ") + std::to_string(sizeof(S)) EMU_EACH_1(S, __VA_ARGS__)).c_str());

// ---------------------------------------------------------------------------------------------- built-in variables
#define threadIdx (emu::here().thread)
#define blockIdx (emu::here().block)
#define blockDim (emu::here().threads)
#define gridDim (emu::here().blocks)
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------- barriers, fences
#define EMU_SITE emu::Site site = emu::Site::current()
inline void __syncthreads(EMU_SITE) { emu::barrier(0, 0, false, site); }
inline int __syncthreads_count(int p, EMU_SITE) { return int(emu::barrier(0, 0, p != 0, site)); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu::barrier(0, 0, p != 0, site) != 0; }
inline int __syncthreads_and(int p, EMU_SITE) { return emu::barrier(0, 0, p != 0, site) == emu::block_size(); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) { emu::sync_warp(mask, site); }
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emu::pause(); }

// ---------------------------------------------------------------------------------------------- shuffles, votes
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
    return emu::shuffle("__shfl_sync", emu::Shuffle::index, mask, value, source, width, site);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle("__shfl_up_sync", emu::Shuffle::up, mask, value, int(delta), width, site);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle("__shfl_down_sync", emu::Shuffle::down, mask, value, int(delta), width, site);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_SITE) {
    return emu::shuffle("__shfl_xor_sync", emu::Shuffle::butterfly, mask, value, lanes, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) {
    return emu::gather<bool, unsigned>("__ballot_sync", mask, p != 0, emu::TrueLanes{}, site);
}
inline int __any_sync(unsigned mask, int p, EMU_SITE) {
    return emu::gather<bool, unsigned>("__any_sync", mask, p != 0, emu::TrueLanes{}, site) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_SITE) {
    return emu::gather<bool, unsigned>("__all_sync", mask, p != 0, emu::TrueLanes{}, site) == mask;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, EMU_SITE) {
    return emu::gather<T, unsigned>("__match_any_sync", mask, value, emu::EqualLanes{}, site);
}
template <class T> unsigned __match_all_sync(unsigned mask, T value, int* all_equal, EMU_SITE) {
    const unsigned equal = emu::gather<T, unsigned>("__match_all_sync", mask, value, emu::EqualLanes{}, site);
    *all_equal = equal == mask;
    return *all_equal ? mask : 0;
}
inline unsigned __activemask() { return emu::live_lanes(); }

#define EMU_REDUCE(name, Step)                                                        \
    template <class T> T name(unsigned mask, T value, EMU_SITE) {                     \
        return emu::gather<T, T>(#name, mask, value, emu::Fold<Step>{}, site);        \
    }
namespace emu {
struct Add { template <class T> EMU_QUIET T operator()(T a, T b) const { return a + b; } };
struct Min { template <class T> EMU_QUIET T operator()(T a, T b) const { return b < a ? b : a; } };
struct Max { template <class T> EMU_QUIET T operator()(T a, T b) const { return a < b ? b : a; } };
struct And { template <class T> EMU_QUIET T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> EMU_QUIET T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> EMU_QUIET T operator()(T a, T b) const { return a ^ b; } };
}  // namespace emu
EMU_REDUCE(__reduce_add_sync, emu::Add)
EMU_REDUCE(__reduce_min_sync, emu::Min)
EMU_REDUCE(__reduce_max_sync, emu::Max)
EMU_REDUCE(__reduce_and_sync, emu::And)
EMU_REDUCE(__reduce_or_sync, emu::Or)
EMU_REDUCE(__reduce_xor_sync, emu::Xor)

// ---------------------------------------------------------------------------------------------- atomic functions
#define EMU_ATOMIC(name, Step)                                                                                  \
    template <class T> T name(T* address, std::type_identity_t<T> operand) {                                    \
        return emu::update(address, [=](T before) EMU_QUIET { return Step{}(before, operand); });               \
    }
EMU_ATOMIC(atomicAdd, emu::Add)
EMU_ATOMIC(atomicMin, emu::Min)
EMU_ATOMIC(atomicMax, emu::Max)
EMU_ATOMIC(atomicAnd, emu::And)
EMU_ATOMIC(atomicOr, emu::Or)
EMU_ATOMIC(atomicXor, emu::Xor)
template <class T> T atomicSub(T* address, std::type_identity_t<T> operand) {
    return emu::update(address, [=](T before) EMU_QUIET { return T(before - operand); });
}
template <class T> T atomicExch(T* address, std::type_identity_t<T> value) {
    return emu::update(address, [=](T) EMU_QUIET { return value; });
}
template <class T> T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return emu::update(address, [=](T before) EMU_QUIET { return before == expected ? value : before; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return emu::update(address, [=](unsigned before) EMU_QUIET { return before >= limit ? 0 : before + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
    return emu::update(address, [=](unsigned before) EMU_QUIET { return before == 0 || before > limit ? limit : before - 1; });
}

// ---------------------------------------------------------------------------------------------- cached loads, stores
// Plain accesses, instrumented by the compiler like any other.
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldca(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> void __stcg(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T> void __stcs(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T> void __stwt(T* address, std::type_identity_t<T> value) { *address = value; }

// ---------------------------------------------------------------------------------------------- arithmetic
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b)); else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b)); else return T(a) < T(b) ? T(b) : T(a);
}
// glibc declares functions with several of these names, so they are macros. The GPU's fast versions are less exact.
#define __expf(x) std::exp(float(x))
#define __exp10f(x) std::pow(10.0f, float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __log10f(x) std::log10(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
#define __tanf(x) std::tan(float(x))
#define __fsqrt_rn(x) std::sqrt(float(x))
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

inline int __float_as_int(float x) { return emu::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bit_cast<double>(x); }
// Conversions saturate and map NaN to 0, as on the GPU; a plain C++ cast would be undefined there.
inline int emu_to_int(double x) { return x != x ? 0 : x >= 2147483647.0 ? 2147483647 : x <= -2147483648.0 ? -2147483647 - 1 : int(x); }
inline unsigned emu_to_uint(double x) { return x != x || x <= 0 ? 0 : x >= 4294967295.0 ? 4294967295u : unsigned(x); }
inline int __float2int_rn(float x) { return emu_to_int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emu_to_int(std::trunc(x)); }
inline int __float2int_rd(float x) { return emu_to_int(std::floor(x)); }
inline int __float2int_ru(float x) { return emu_to_int(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return emu_to_uint(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return emu_to_uint(std::trunc(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed = reversed << 1 | (x >> bit & 1);
    return reversed;
}
inline int __mulhi(int a, int b) { return int((long long)(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
// Bytes 0-3 come from a, 4-7 from b; bit 3 of a selector spreads the chosen byte's sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> 4 * i & 15;
        unsigned byte = unsigned(bytes >> 8 * (pick & 7)) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// ---------------------------------------------------------------------------------------------- traps
inline void __trap() { emu::fail("__trap()"); }
#undef assert
#define assert(condition) \
    ((condition) ? void() : emu::fail("assertion failed: %s (%s:%d)", #condition, __FILE__, __LINE__))
