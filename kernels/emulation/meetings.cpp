// Where threads meet: operations of a warp, and barriers.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace emu {
void meet(unsigned mask, const char* operation, void* frame, Combine combine, Site site) {
    Multiprocessor& sm = *machine;
    Thread& self = *sm.current;
    Warp& warp = sm.warps[self.number / 32];
    const unsigned lane = self.at.lane;
    if (!(mask >> lane & 1)) fail("%s (%s): mask %08x lacks the calling lane %u", operation, place(site).c_str(), mask, lane);
    if (mask & ~warp.live)
        fail("%s (%s): mask %08x names lanes %08x, which have exited or do not exist", operation, place(site).c_str(), mask, mask & ~warp.live);
    auto meeting = std::find_if(warp.open.begin(), warp.open.end(), [&](const Meeting& m) { return m.mask == mask && !(m.arrived >> lane & 1); });
    if (meeting == warp.open.end()) meeting = warp.open.insert(warp.open.end(), Meeting{mask, 0, operation, site, {}});
    if (strcmp(meeting->operation, operation) || (combine && meeting->site.line() != site.line()))
        fail("lanes of one warp meet in different places: %s (%s) and %s (%s)", operation, place(site).c_str(),
             meeting->operation, place(meeting->site).c_str());
    meeting->arrived |= 1u << lane;
    meeting->frames[lane] = frame;
    if (meeting->arrived != mask) return sm.wait(operation, site);

    Meeting complete = *meeting;
    warp.open.erase(meeting);
    const unsigned first = self.number & ~31u;
    if (combine) combine(complete.frames, mask); else sm.join_lanes(first, mask);
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned other = sm.order == EMU_REVERSE ? 31 - i : i;
        if (mask >> other & 1 && other != lane) sm.push(&sm.threads[first + other]);
    }
    if (sm.order == EMU_RANDOM) sm.yield();
}
void sync_warp(unsigned mask, Site site) { meet(mask, "__syncwarp", nullptr, nullptr, site); }

unsigned barrier(unsigned id, unsigned expected, bool predicate, Site site) {
    Multiprocessor& sm = *machine;
    Thread& self = *sm.current;
    NamedBarrier& barrier = sm.barriers[id & 15];
    const bool whole = expected == 0;
    if (whole) expected = sm.count;
    const char* name = whole ? "__syncthreads" : "bar.sync";
    if (barrier.arrived.empty()) {
        barrier.expected = expected;
        barrier.site = site;
    } else if (whole && (barrier.site.line() != site.line() || strcmp(barrier.site.file_name(), site.file_name()))) {
        fail("barrier divergence: this thread waits at __syncthreads (%s), thread %s at another one (%s)", place(site).c_str(),
             coordinates(sm.threads[barrier.arrived[0]].at.thread).c_str(), place(barrier.site).c_str());
    } else if (barrier.expected != expected) {
        fail("barrier %u: threads expect %u and %u arrivals", id, expected, barrier.expected);
    }
    barrier.arrived.push_back(self.number);
    barrier.true_predicates += predicate;
    const unsigned generation = barrier.generation & 1;
    if (barrier.arrived.size() < expected) {
        barrier.waiting.push_back(self.number);
        sm.wait(name, site);
        return barrier.result[generation];
    }
    if (whole) sm.join_block(); else sm.join(barrier.arrived);
    const unsigned result = barrier.result[generation] = barrier.true_predicates;
    barrier.true_predicates = 0;
    ++barrier.generation;
    barrier.arrived.clear();
    // The last to arrive goes to the back of the queue too, so that each interval starts in the chosen order.
    barrier.waiting.push_back(self.number);
    std::sort(barrier.waiting.begin(), barrier.waiting.end());
    sm.wake(barrier.waiting);
    sm.leave();
    return result;
}

void barrier_arrive(unsigned id, unsigned expected, Site site) {
    Multiprocessor& sm = *machine;
    NamedBarrier& barrier = sm.barriers[id & 15];
    if (barrier.arrived.empty()) barrier.expected = expected, barrier.site = site;
    if (barrier.expected != expected) fail("barrier %u: threads expect %u and %u arrivals", id, expected, barrier.expected);
    barrier.arrived.push_back(sm.current->number);
    if (barrier.arrived.size() < expected) return;
    sm.join(barrier.arrived);
    ++barrier.generation;
    barrier.arrived.clear();
    sm.wake(barrier.waiting);
}
}  // namespace emu
