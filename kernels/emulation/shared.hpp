// Shared memory, and what the memory checker knows of it.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace emu {
// The memory checker's record of one byte of shared memory.
struct Cell {
    uint32_t written, read;  // clock of the last write, of the last read since
    uint16_t writer, reader; // thread number and the flags below
    uint32_t writer_code;    // where, relative to the start of the kernel's module
};
constexpr uint16_t kNumber = 0x03ff, kAtomic = 0x0400, kInFlight = 0x0800, kSameWarp = 0x1000, kManyWarps = 0x2000;

inline void* reserve(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    return memory;
}

// The executable, or a library: where its code lies, and this OS thread's part of its thread-local storage.
struct Module {
    uintptr_t code = 0, local = 0;
    size_t local_number = 0, local_size = 0;
    const char* path = "/proc/self/exe";
};
Module module_of(const void* code);

// Thread-local storage of one module, which is where shared memory lies, with a record of each byte.
struct Shared {
    uintptr_t base = 0;
    size_t size = 0;
    Cell* cells = nullptr;

    void open(const Module& module) {
        close();
        base = module.local, size = module.local_size;
        if (size) cells = static_cast<Cell*>(reserve(size * sizeof(Cell)));
    }
    void close() {
        if (cells) munmap(cells, size * sizeof(Cell));
        base = size = 0, cells = nullptr;
    }
    void forget() {
        if (cells) madvise(cells, size * sizeof(Cell), MADV_DONTNEED);
    }
    Cell* find(uintptr_t address) { return address - base < size ? cells + (address - base) : nullptr; }
};
}  // namespace emu
