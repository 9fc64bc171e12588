// Device memory.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace emu {
constexpr size_t kPage = 4096;

// One reserved address range, so that "is this device memory" is a comparison. Each buffer ends close to an unmapped
// page; freed buffers stay unmapped, so that a late use is caught as well.
struct Heap {
    static constexpr size_t kReserved = size_t(1) << 38;
    std::mutex mutex;
    uintptr_t base = 0, next = 0;
    std::map<uintptr_t, size_t> live;
    std::atomic<uint64_t> generation{0};  // changes whenever a buffer goes away

    void* allocate(size_t bytes) {
        std::lock_guard lock(mutex);
        if (!base) {
            void* range = mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (range == MAP_FAILED) return nullptr;
            base = next = reinterpret_cast<uintptr_t>(range);
        }
        const size_t mapped = (bytes + 255) / 256 * 256, pages = (mapped + kPage - 1) / kPage * kPage;
        if (next + pages + kPage > base + kReserved) return nullptr;
        if (mprotect(reinterpret_cast<void*>(next), pages, PROT_READ | PROT_WRITE)) return nullptr;
        const uintptr_t address = next + pages - mapped;
        memset(reinterpret_cast<void*>(next), 0xff, pages);
        live[address] = bytes;
        next += pages + kPage;
        return reinterpret_cast<void*>(address);
    }
    void release(void* pointer) {
        if (!pointer) return;
        std::lock_guard lock(mutex);
        auto it = live.find(reinterpret_cast<uintptr_t>(pointer));
        if (it == live.end()) abort();
        const uintptr_t first = it->first / kPage * kPage, end = (it->first + it->second + kPage - 1) / kPage * kPage;
        mmap(reinterpret_cast<void*>(first), end - first, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        live.erase(it);
        ++generation;
    }
    bool contains(uintptr_t address) const { return address - base < kReserved && base; }
    // The live buffer at or before `address`: {0, 0} if there is none.
    std::pair<uintptr_t, size_t> find(uintptr_t address) {
        std::lock_guard lock(mutex);
        auto it = live.upper_bound(address);
        if (it == live.begin()) return {0, 0};
        return *--it;
    }
};
extern Heap heap;
}  // namespace emu
