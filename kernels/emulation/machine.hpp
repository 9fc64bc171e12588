// A multiprocessor: what an OS thread that runs blocks owns, one block at a time. The block's threads are fibers on it.
// A fiber runs until it must wait; then the next ready one continues. When nobody is ready and not everybody is done,
// the block is stuck, and who waits where is the error message.
#pragma once
#include <signal.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "emulation.hpp"
#include "fiber.hpp"
#include "shared.hpp"

namespace emu {
constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kSharedCapacity = 227 * 1024;  // sm_90: the most a block can ask for
constexpr size_t kCanary = 1024;                // guard zone behind the requested dynamic shared memory

enum class State : uint8_t { ready, waits, done };

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, source_bytes;
    uint64_t* mbarrier;
};

struct Thread {
    Coordinates at;
    Fiber fiber;
    unsigned number;  // linear index in the block
    State state;
    const char* waits_for;
    Site site;
    uint32_t clock;                           // of the memory checker
    std::vector<std::vector<Copy>> groups;    // cp.async groups, oldest first; the last one is still open
};

struct Meeting {
    unsigned mask = 0, arrived = 0;
    const char* operation;
    Site site;
    void* frames[32];
};
struct Warp {
    unsigned live = 0;
    std::vector<Meeting> open;
};
struct NamedBarrier {
    unsigned expected = 0, true_predicates = 0, generation = 0;
    Site site;
    std::vector<unsigned> arrived, waiting;
    unsigned result[2] = {0, 0};
};

struct Multiprocessor {
    Thread threads[kMaxThreads];
    Warp warps[kMaxWarps];
    NamedBarrier barriers[16];
    unsigned count = 0, done = 0;
    Thread* current = nullptr;
    Fiber scheduler;
    bool failed = false;
    std::string error;

    std::vector<Thread*> ready;  // ring
    size_t ready_first = 0, ready_count = 0;
    int order = EMU_FORWARD;
    std::minstd_rand random{1};

    const char* kernel_name = "";
    Invoke invoke = nullptr;
    void** arguments = nullptr;
    unsigned shared_bytes = 0;

    char* stacks = nullptr;
    void* fault_stack = nullptr;  // signal handlers run here, because the fault may be a full fiber stack
    stack_t former_fault_stack{};
    uint64_t switches = 0, accesses = 0, conflicts = 0, pauses = 0;

    // Asynchronous copies that complete on an mbarrier, and what the barrier's users know of each other's accesses.
    std::vector<Copy> bulk;
    std::map<uint64_t*, std::vector<uint32_t>> mbarrier_known;

    // Memory checker. Every thread has a clock; everything stamped at or before `floor` is ordered before now for
    // everybody (a block barrier lies between). Inside a barrier interval, known[a][b] is the clock of b up to which
    // a has synchronised with b.
    Shared own;     // of the emulation's module, with dynamic shared memory; the kernels are usually there too
    Shared loaded;  // of the kernel's module, if it is another
    Module own_module, module;
    uint32_t floor = 0, born = 1;
    uint32_t* known_rows = nullptr;
    bool wide = false;  // the block has used a synchronisation that crosses warps without joining all
    uintptr_t buffer[4] = {}, buffer_end[4] = {};
    unsigned buffer_next = 0;
    uint64_t buffer_generation = 0;

    Multiprocessor();
    ~Multiprocessor();
    uint32_t* known(unsigned thread) { return known_rows + size_t(thread) * kMaxThreads; }

    void push(Thread* thread) {
        thread->state = State::ready;
        ready[(ready_first + ready_count++) % kMaxThreads] = thread;
    }
    void wake(std::vector<unsigned>& numbers) {
        if (order == EMU_REVERSE) std::reverse(numbers.begin(), numbers.end());
        for (unsigned number : numbers) push(&threads[number]);
        numbers.clear();
    }
    Thread* pop() {
        if (!ready_count) return nullptr;
        if (order == EMU_RANDOM) {
            const size_t pick = (ready_first + random() % ready_count) % kMaxThreads;
            std::swap(ready[ready_first], ready[pick]);
        }
        Thread* thread = ready[ready_first];
        ready_first = (ready_first + 1) % kMaxThreads;
        --ready_count;
        return thread;
    }
    // The current fiber has queued itself, waits, or is done: go on with the next, or back to run_block().
    void leave() {
        Thread *from = current, *to = failed ? nullptr : pop();
        if (to == from) return;
        ++switches;
        current = to;
        from->fiber.switch_to(to ? to->fiber : scheduler);
    }
    void wait(const char* what, const Site& site) {
        current->state = State::waits;
        current->waits_for = what;
        current->site = site;
        leave();
    }
    void yield() {
        if (!ready_count) return;
        push(current);
        leave();
    }

    void enter(const char* name, Invoke kernel);
    bool run_block(uint3 block, dim3 threads, dim3 blocks);
    void diagnose();
    void report(const std::string& text, const Thread* thread);
    std::string where(uint32_t code) const;

    // memory checker
    void join_block();
    void join(const std::vector<unsigned>& numbers);
    void join_lanes(unsigned first, unsigned mask);
    bool ordered(uint32_t stamp, unsigned other) const {
        return stamp <= floor || other == current->number ||
               known_rows[size_t(current->number) * kMaxThreads + other] >= stamp;
    }
    Cell* find_cell(uintptr_t address) {
        Cell* cell = own.find(address);
        return cell ? cell : loaded.find(address);
    }
    void check(uintptr_t address, size_t bytes, Access kind, void* code, size_t alignment = 1);
    void check_shared(Cell* cell, uintptr_t address, size_t bytes, Access kind, uint32_t code);
    void check_heap(uintptr_t address, size_t bytes, Access kind, uint32_t code);
    void finish(const Copy& copy);
};

extern __thread Multiprocessor* machine;  // of this OS thread; null until its first launch
extern __thread bool running;             // a fiber is running on this OS thread
extern bool instrumented;                 // kernels were compiled with -fsanitize=thread

// As messages name them.
std::string coordinates(const uint3& v);
std::string place(const Site& site);
}  // namespace emu
