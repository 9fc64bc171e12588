// The C interface: kernels by name, launches, device memory, settings and counters. The run-time part of the emulation is
// compiled WITHOUT -fsanitize=thread (kernels are compiled with it, see emulation.hpp).
#include "emulation.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "heap.hpp"
#include "machine.hpp"

namespace emu {
Heap heap;

// Settings belong to the calling OS thread, so that tests which run at the same time do not disturb each other.
struct Settings {
    int order = EMU_FORWARD;
    uint64_t seed = 1;
    unsigned workers = 1;
};
static thread_local Settings settings;
// So do the last error, and conflicts: whether a kernel has any is a property of the kernel.
static thread_local std::string last_error;
static thread_local uint64_t conflicts = 0;
static struct Counters {
    std::atomic<uint64_t> launches{0}, blocks{0}, threads{0}, switches{0}, accesses{0};
} counters;

struct Kernel {
    Invoke invoke;
    size_t parameter_size;
};
static std::map<std::string, Kernel>& kernel_table() {  // a function, so that static constructors can use it
    static std::map<std::string, Kernel> table;
    return table;
}
static std::vector<std::string>& layout_table() {
    static std::vector<std::string> table;
    return table;
}

bool enlist(const char* name, Invoke invoke, size_t parameter_size) {
    // A library that is loaded later replaces kernels of the same names.
    return kernel_table().insert_or_assign(name, Kernel{invoke, parameter_size}).second;
}
bool enlist_layout(const char* layout) {
    auto& table = layout_table();
    if (std::find(table.begin(), table.end(), layout) == table.end()) table.push_back(layout);
    return true;
}

// One launch, whose blocks the OS threads take one by one.
struct Launch {
    const char* name;
    Invoke invoke;
    dim3 grid, block;
    unsigned shared_bytes;
    void** arguments;
    Settings settings;
    std::atomic<uint64_t> next{0}, conflicts{0};
    std::atomic<bool> stop{false};
    std::string error{};  // of the thread that has set `stop`
};

static void run_blocks(Launch& launch) {
    if (!machine) {
        static thread_local std::unique_ptr<Multiprocessor> owner;
        owner = std::make_unique<Multiprocessor>();
        machine = owner.get();
    }
    Multiprocessor& sm = *machine;
    sm.enter(launch.name, launch.invoke);
    sm.arguments = launch.arguments;
    sm.shared_bytes = launch.shared_bytes;
    sm.order = launch.settings.order;
    sm.random.seed(unsigned(launch.settings.seed * 2654435761u + 1));
    const dim3& grid = launch.grid;
    while (!launch.stop) {
        const uint64_t i = launch.next++;
        if (i >= uint64_t(grid.x) * grid.y * grid.z) break;
        const uint3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        if (!sm.run_block(index, launch.block, grid) && !launch.stop.exchange(true)) launch.error = sm.error;
        ++counters.blocks;
        counters.threads += sm.count;
    }
    counters.switches += std::exchange(sm.switches, 0);
    counters.accesses += std::exchange(sm.accesses, 0);
    launch.conflicts += std::exchange(sm.conflicts, 0);
}
}  // namespace emu

using namespace emu;
extern "C" {
int emu_launch(const char* name, EmuDim grid, EmuDim block, unsigned shared_bytes, void** arguments) {
    last_error.clear();
    const auto kernel = kernel_table().find(name);
    if (kernel == kernel_table().end()) {
        last_error = std::string("no kernel named ") + name + " in the emulation's table";
        return 500;
    }
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535 || shared_bytes > kSharedCapacity) {
        last_error = std::string("kernel ") + name + ": launch dimensions or shared memory outside the limits";
        return 1;
    }
    ++counters.launches;
    Launch launch{kernel->first.c_str(), kernel->second.invoke, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                  shared_bytes, arguments, settings};
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < settings.workers; ++i) helpers.emplace_back(run_blocks, std::ref(launch));
    run_blocks(launch);
    for (auto& helper : helpers) helper.join();
    conflicts += launch.conflicts;
    last_error = launch.error;
    return last_error.empty() ? 0 : 719;
}
const char* emu_last_error(void) { return last_error.c_str(); }
int emu_has_kernel(const char* name) { return kernel_table().count(name) != 0; }
size_t emu_parameter_size(const char* name) {
    const auto kernel = kernel_table().find(name);
    return kernel == kernel_table().end() ? 0 : kernel->second.parameter_size;
}
const char* emu_layout(size_t index) { return index < layout_table().size() ? layout_table()[index].c_str() : nullptr; }
void* emu_malloc(size_t bytes) { return heap.allocate(bytes); }
void emu_free(void* address) { heap.release(address); }
void emu_schedule(int order, uint64_t seed) {
    settings.order = order;
    settings.seed = seed;
}
void emu_workers(unsigned count) { settings.workers = std::max(1u, count); }
uint64_t emu_counter(const char* name) {
    const std::pair<const char*, std::atomic<uint64_t>*> all[] = {
        {"launches", &counters.launches}, {"blocks", &counters.blocks},     {"threads", &counters.threads},
        {"switches", &counters.switches}, {"accesses", &counters.accesses}};
    for (auto& [key, value] : all)
        if (!strcmp(key, name)) return *value;
    return strcmp("matrix_bank_conflicts", name) ? 0 : conflicts;
}
}
