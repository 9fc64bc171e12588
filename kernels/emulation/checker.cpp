// The memory checker. The compiler calls it before every load and store of a kernel (see emulation.hpp); built-in
// functions and instructions call it through touch(), or with the addresses they use.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>

#include "heap.hpp"
#include "machine.hpp"

namespace emu {
bool instrumented = false;

// ---------------------------------------------------------------------------------------------- modules
// What code that takes the address of a thread-local variable calls. It gives the OS thread its part of the module's
// storage when that is used for the first time.
struct LocalIndex {
    size_t module, offset;
};
extern "C" void* __tls_get_addr(LocalIndex*);

static int find_module(dl_phdr_info* info, size_t, void* data) {
    auto& [address, module] = *static_cast<std::pair<uintptr_t, Module>*>(data);
    bool ours = false;
    size_t local_size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && address - (info->dlpi_addr + header.p_vaddr) < header.p_memsz) ours = true;
        if (header.p_type == PT_TLS) local_size = header.p_memsz;
    }
    if (!ours) return 0;
    module.code = info->dlpi_addr;
    if (*info->dlpi_name) module.path = info->dlpi_name;
    module.local_number = info->dlpi_tls_modid;
    module.local_size = local_size;
    return 1;
}
Module module_of(const void* code) {
    std::pair<uintptr_t, Module> found{reinterpret_cast<uintptr_t>(code), {}};
    dl_iterate_phdr(find_module, &found);
    Module& module = found.second;
    LocalIndex first{module.local_number, 0};
    if (module.local_size) module.local = reinterpret_cast<uintptr_t>(__tls_get_addr(&first));
    return module;
}

// ---------------------------------------------------------------------------------------------- order of accesses
void Multiprocessor::join_block() {
    uint32_t newest = floor;
    for (unsigned i = 0; i < count; ++i) newest = std::max(newest, threads[i].clock);
    floor = newest;
    for (unsigned i = 0; i < count; ++i) threads[i].clock = newest + 1;
}

// The threads of `numbers` learn all that any of them knows (vector clocks).
void Multiprocessor::join(const std::vector<unsigned>& numbers) {
    wide = true;
    std::vector<uint32_t> all(count, 0);
    uint32_t newest = 0;
    for (unsigned number : numbers) {
        for (unsigned i = 0; i < count; ++i) all[i] = std::max(all[i], known(number)[i]);
        newest = std::max(newest, threads[number].clock);
    }
    for (unsigned number : numbers) all[number] = std::max(all[number], threads[number].clock);
    for (unsigned number : numbers) {
        std::copy(all.begin(), all.end(), known(number));
        threads[number].clock = newest + 1;
    }
}

void Multiprocessor::join_lanes(unsigned first, unsigned mask) {
    if (wide) {  // knowledge about other warps must travel too
        std::vector<unsigned> numbers;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) numbers.push_back(first + lane);
        return join(numbers);
    }
    uint32_t all[32] = {}, newest = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint32_t* row = known(first + lane) + first;
        for (unsigned i = 0; i < 32; ++i) all[i] = std::max(all[i], row[i]);
        newest = std::max(newest, threads[first + lane].clock);
    }
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) all[lane] = std::max(all[lane], threads[first + lane].clock);
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        std::copy(all, all + 32, known(first + lane) + first);
        threads[first + lane].clock = newest + 1;
    }
}

void Multiprocessor::check(uintptr_t address, size_t bytes, Access kind, void* code_address, size_t alignment) {
    if (bytes == 0) return;
    const uint32_t code = uint32_t(uintptr_t(code_address) - module.code);
    if (Cell* cell = find_cell(address)) {
        ++accesses;
        check_shared(cell, address, bytes, kind, code);
    } else if (heap.contains(address)) {
        ++accesses;
        check_heap(address, bytes, kind, code);
    } else {
        return;  // a stack, constant data, or the host's memory
    }
    if (address % alignment)
        fail("%s %zu bytes at %#zx%s, which is no multiple of that", kind == Access::read ? "reads" : "writes", bytes,
                  size_t(address), where(code).c_str());
    if (order == EMU_RANDOM && ready_count && random() % 32 == 0) yield();
}

void Multiprocessor::check_heap(uintptr_t address, size_t bytes, Access kind, uint32_t code) {
    const uint64_t generation = heap.generation.load(std::memory_order_relaxed);
    if (generation != buffer_generation) {
        std::fill(buffer_end, buffer_end + 4, 0);
        buffer_generation = generation;
    }
    for (int i = 0; i < 4; ++i)
        if (address >= buffer[i] && address + bytes <= buffer_end[i]) return;
    const auto [base, size] = heap.find(address);
    if (base && address + bytes <= base + size) {
        buffer[buffer_next] = base;
        buffer_end[buffer_next] = base + size;
        buffer_next = (buffer_next + 1) % 4;
        return;
    }
    const char* verb = kind == Access::read ? "reads" : "writes";
    if (base)
        fail("%s %zu bytes at offset %zu of a buffer of %zu bytes%s", verb, bytes, size_t(address - base), size, where(code).c_str());
    fail("%s %zu bytes of device memory that is not allocated%s", verb, bytes, where(code).c_str());
}

void Multiprocessor::check_shared(Cell* cell, uintptr_t address, size_t bytes, Access kind, uint32_t code) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared);
    const bool is_dynamic = address - dynamic < kSharedCapacity + kCanary;
    const bool is_write = kind != Access::read;
    auto name = [&](size_t at) {
        return is_dynamic ? "byte " + std::to_string(address + at - dynamic) + " of dynamic shared memory"
                          : std::string("static shared memory");
    };
    if (is_dynamic && address + bytes > dynamic + shared_bytes)
        fail("%s %s, but the launch asked for %u bytes%s", is_write ? "writes" : "reads", name(0).c_str(), shared_bytes, where(code).c_str());

    const uint16_t me = uint16_t(current->number);
    for (size_t i = 0; i < bytes; ++i, ++cell) {
        // Against the last write.
        if (cell->written >= born) {
            const unsigned writer = cell->writer & kNumber;
            const bool both_atomic = kind == Access::atomic && cell->writer & kAtomic;
            if (instrumented && !both_atomic && !ordered(cell->written, writer))
                fail("race: %s %s%s, which thread %s wrote%s without a barrier in between", is_write ? "writes" : "reads",
                          name(i).c_str(), where(code).c_str(), coordinates(threads[writer].at.thread).c_str(), where(cell->writer_code).c_str());
            if (cell->writer & kInFlight && kind != Access::async_write)
                fail("%s %s%s, but the asynchronous copy to it has not been waited for", is_write ? "writes" : "reads",
                          name(i).c_str(), where(code).c_str());
        } else if (instrumented && (!is_write || kind == Access::atomic)) {
            fail("reads %s%s, which no thread of this block has written (or not yet, for lack of a barrier)", name(i).c_str(), where(code).c_str());
        }
        if (is_write) {
            // Against the reads since the last write.
            if (instrumented && cell->read >= born && cell->read > floor) {
                const unsigned reader = cell->reader & kNumber;
                bool safe = true;
                if (cell->reader & kManyWarps) {
                    safe = false;
                } else if (cell->reader & kSameWarp) {
                    for (unsigned lane = reader & ~31u; lane < std::min(count, (reader & ~31u) + 32); ++lane)
                        safe &= ordered(cell->read, lane);
                } else {
                    safe = ordered(cell->read, reader);
                }
                if (!safe)
                    fail("race: writes %s%s, which thread %s read before without a barrier in between", name(i).c_str(),
                              where(code).c_str(), coordinates(threads[reader].at.thread).c_str());
            }
            cell->written = current->clock;
            cell->writer = me | (kind == Access::atomic ? kAtomic : 0) | (kind == Access::async_write ? kInFlight : 0);
            cell->writer_code = code;
            cell->read = 0;
        } else if (cell->read <= floor || (cell->reader & kNumber) == me) {
            cell->reader = cell->read <= floor ? me : cell->reader;
            cell->read = current->clock;
        } else {
            const bool same_warp = (cell->reader & kNumber) / 32 == me / 32;
            cell->reader = (cell->reader & (kSameWarp | kManyWarps)) | me | (same_warp ? kSameWarp : kManyWarps);
            cell->read = std::max(cell->read, current->clock);
        }
    }
}

// An asynchronous copy arrives.
void Multiprocessor::finish(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.source_bytes);
    memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    Cell* cell = find_cell(reinterpret_cast<uintptr_t>(copy.to));
    if (!cell) return;
    for (Cell* end = cell + copy.bytes; cell < end; ++cell) {
        cell->writer = uint16_t(current->number);
        cell->written = current->clock;
    }
}

void touch(const void* address, size_t bytes, Access kind) {
    if (running) machine->check(reinterpret_cast<uintptr_t>(address), bytes, kind, __builtin_return_address(0));
}
}  // namespace emu

// ---------------------------------------------------------------------------------------------- instrumentation
// What -fsanitize=thread makes the compiler call. We do not link its library; these are all it needs. Where the compiler
// does not say itself that an access may be unaligned, shared and device memory have to be at a multiple of its size, which
// x86 would often forgive. (It says nothing of types of 16 bytes that are aligned to 8: none of those there, please.)
#define EMU_CHECKED(name, bytes, alignment, kind)                                                                \
    extern "C" void __tsan_##name(void* address) {                                                               \
        if (emu::running)                                                                                        \
            emu::machine->check(reinterpret_cast<uintptr_t>(address), bytes, emu::Access::kind,                  \
                                __builtin_return_address(0), alignment);                                         \
    }
#define EMU_CHECKED_SIZES(name, kind)                                                                            \
    EMU_CHECKED(name##1, 1, 1, kind) EMU_CHECKED(name##2, 2, 2, kind) EMU_CHECKED(name##4, 4, 4, kind)           \
    EMU_CHECKED(name##8, 8, 8, kind) EMU_CHECKED(name##16, 16, 16, kind)
#define EMU_CHECKED_UNALIGNED(name, kind)                                                                        \
    EMU_CHECKED(name##1, 1, 1, kind) EMU_CHECKED(name##2, 2, 1, kind) EMU_CHECKED(name##4, 4, 1, kind)           \
    EMU_CHECKED(name##8, 8, 1, kind) EMU_CHECKED(name##16, 16, 1, kind)
EMU_CHECKED_SIZES(read, read)
EMU_CHECKED_SIZES(write, write)
EMU_CHECKED_UNALIGNED(unaligned_read, read)
EMU_CHECKED_UNALIGNED(unaligned_write, write)
EMU_CHECKED_SIZES(volatile_read, atomic)
EMU_CHECKED_SIZES(volatile_write, atomic)
#define EMU_CHECKED_RANGE(name, kind)                                                                            \
    extern "C" void __tsan_##name(void* address, size_t bytes) {                                                 \
        if (emu::running)                                                                                        \
            emu::machine->check(reinterpret_cast<uintptr_t>(address), bytes, emu::Access::kind,                  \
                                __builtin_return_address(0));                                                    \
    }
EMU_CHECKED_RANGE(read_range, read)
EMU_CHECKED_RANGE(write_range, write)
extern "C" void __tsan_init() { emu::instrumented = true; }  // called by a constructor of every instrumented unit
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
