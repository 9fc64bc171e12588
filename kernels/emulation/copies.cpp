// Asynchronous copies, which arrive as late as they may, and the mbarriers that some of them complete on.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace emu {
static void start_copy(const Copy& copy, void* code) {
    if (reinterpret_cast<uintptr_t>(copy.to) % 16 && copy.bytes >= 16) fail("asynchronous copy to a misaligned address");
    machine->check(reinterpret_cast<uintptr_t>(copy.from), copy.source_bytes, Access::read, code);
    machine->check(reinterpret_cast<uintptr_t>(copy.to), copy.bytes, Access::async_write, code);
    memset(copy.to, 0xff, copy.bytes);  // until it is waited for, the destination holds NaN
}
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
    if (reinterpret_cast<uintptr_t>(shared) % bytes || (source_bytes && reinterpret_cast<uintptr_t>(global) % bytes))
        fail("cp.async of %u bytes between misaligned addresses", bytes);
    const Copy copy{shared, global, bytes, std::min(bytes, source_bytes), nullptr};
    start_copy(copy, __builtin_return_address(0));
    auto& groups = machine->current->groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(copy);
}
void commit_group() {
    auto& groups = machine->current->groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
void wait_group(unsigned newest_allowed) {
    auto& groups = machine->current->groups;
    while (groups.size() > size_t(newest_allowed) + 1) {  // the open group at the end is not counted
        for (const Copy& copy : groups.front()) machine->finish(copy);
        groups.erase(groups.begin());
    }
}

// The opaque 64 bits of an mbarrier, as the emulation lays them out.
struct MBarrier {
    int32_t bytes;                              // still to come (may dip below zero before expect_tx)
    uint16_t pending;                           // arrivals still to come in this phase
    uint16_t arrivals : 15, phase : 1;
};
static MBarrier& open_barrier(uint64_t* barrier) {
    static_assert(sizeof(MBarrier) == 8);
    return *reinterpret_cast<MBarrier*>(barrier);
}
static void wake_mbarrier_waiters() {  // each looks again whether its phase is over
    Multiprocessor& sm = *machine;
    for (unsigned i = 0; i < sm.count; ++i)
        if (sm.threads[i].state == State::waits && !strcmp(sm.threads[i].waits_for, "mbarrier")) sm.push(&sm.threads[i]);
}
static void complete_phase(uint64_t* address) {
    MBarrier& barrier = open_barrier(address);
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
    wake_mbarrier_waiters();
}
static void learn(std::vector<uint32_t>& from_all, bool give) {
    Multiprocessor& sm = *machine;
    sm.wide = true;
    from_all.resize(sm.count);
    uint32_t* mine = sm.known(sm.current->number);
    for (unsigned i = 0; i < sm.count; ++i) {
        if (give) from_all[i] = std::max(from_all[i], mine[i]); else mine[i] = std::max(from_all[i], mine[i]);
    }
    if (give) from_all[sm.current->number] = sm.current->clock++;
}
void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
    touch(barrier, 8, Access::write);
    open_barrier(barrier) = {0, uint16_t(arrivals), uint16_t(arrivals), 0};
}
void mbarrier_arrive(uint64_t* address, unsigned expected_bytes) {
    touch(address, 8, Access::read);
    MBarrier& barrier = open_barrier(address);
    if (barrier.pending == 0) fail("mbarrier: more arrivals than it was initialised for");
    learn(machine->mbarrier_known[address], true);
    barrier.bytes += int(expected_bytes);
    --barrier.pending;
    complete_phase(address);
}
void mbarrier_wait(uint64_t* address, unsigned parity, Site site) {
    Multiprocessor& sm = *machine;
    touch(address, 8, Access::read);
    for (;;) {
        // Copies arrive when somebody waits for them, not earlier.
        for (size_t i = 0; i < sm.bulk.size();) {
            const Copy copy = sm.bulk[i];
            if (copy.mbarrier != address) { ++i; continue; }
            sm.bulk.erase(sm.bulk.begin() + long(i));
            sm.finish(copy);
            learn(sm.mbarrier_known[address], true);
            open_barrier(address).bytes -= int(copy.bytes);
            complete_phase(address);
        }
        if (open_barrier(address).phase != (parity & 1)) break;
        sm.wait("mbarrier", site);
    }
    learn(sm.mbarrier_known[address], false);
}
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async.bulk needs multiples of 16 bytes");
    const Copy copy{shared, global, bytes, bytes, barrier};
    start_copy(copy, __builtin_return_address(0));
    machine->bulk.push_back(copy);
    wake_mbarrier_waiters();  // whoever waits already may take delivery
}
}  // namespace emu
