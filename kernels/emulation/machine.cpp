// How blocks run: fibers are set up, started, and looked after until all are done or none can go on.
#include "machine.hpp"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "heap.hpp"

// Local to the OS thread and therefore to the block. The guard zone follows it.
extern "C" {
alignas(1024) __thread unsigned char dynamic_shared[emu::kSharedCapacity + emu::kCanary];
}

namespace emu {
__thread Multiprocessor* machine = nullptr;
__thread bool running = false;

constexpr size_t kStack = 192 * 1024, kFaultStack = 64 * 1024;
// Stacks at equal distances would all compete for the same cache sets, so each starts a little lower than the last.
static constexpr size_t stack_start(unsigned thread) { return kStack - thread % 61 * 1088; }

std::string coordinates(const uint3& v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}
std::string place(const Site& site) {
    const char* slash = strrchr(site.file_name(), '/');
    return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

const Coordinates& here() { return machine->current->at; }
unsigned block_size() { return machine->count; }
unsigned live_lanes() { return machine->warps[machine->current->number / 32].live; }
void pause() {
    machine->yield();
    // What it waits for may be up to another thread of the host, which may be waiting for this core.
    if (++machine->pauses % 16 == 0) std::this_thread::yield();
}

void fail(const char* format, ...) {
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (!running) {
        fprintf(stderr, "emulation: %s\n", text);
        abort();
    }
    machine->report(text, machine->current);
    machine->leave();  // the launch is over: nobody comes back here
    abort();
}

// ---------------------------------------------------------------------------------------------- set-up
static void fiber_main() {
    Multiprocessor& sm = *machine;
    sm.invoke(sm.arguments);
    Thread& self = *sm.current;
    self.state = State::done;
    ++sm.done;
    sm.warps[self.number / 32].live &= ~(1u << self.at.lane);
    sm.leave();
    abort();  // nobody resumes a finished fiber
}

// A fault inside a kernel becomes that launch's error; any other goes to the handler that was there before.
static struct sigaction former_handlers[65];
static void on_fault(int signal, siginfo_t* info, void* context) {
    if (running) {
        const char* what = signal == SIGSEGV || signal == SIGBUS ? "invalid address" : signal == SIGFPE ? "division by zero" : "trap";
        const uintptr_t address = uintptr_t(info->si_addr), stacks = uintptr_t(machine->stacks);
        if (signal == SIGSEGV && address - stacks < kMaxThreads * kStack) what = "stack overflow (or invalid address)";
        fail("%s (signal %d at %p)", what, signal, info->si_addr);
    }
    const struct sigaction& former = former_handlers[signal];
    if (former.sa_flags & SA_SIGINFO) return former.sa_sigaction(signal, info, context);
    if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) return former.sa_handler(signal);
    sigaction(signal, &former, nullptr);  // default action: the instruction faults again
}

Multiprocessor::Multiprocessor() : ready(kMaxThreads) {
    stacks = static_cast<char*>(reserve(kMaxThreads * kStack));
    for (unsigned i = 0; i < kMaxThreads; ++i) {
        threads[i].number = i;
        threads[i].fiber.stack = stacks + i * kStack;
        threads[i].fiber.size = stack_start(i);
        mprotect(threads[i].fiber.stack, kPage, PROT_NONE);
    }
    own_module = module_of(reinterpret_cast<const void*>(&fiber_main));
    own.open(own_module);
    known_rows = static_cast<uint32_t*>(reserve(sizeof(uint32_t) * kMaxThreads * kMaxThreads));

    stack_t alternative{};
    alternative.ss_sp = fault_stack = reserve(kFaultStack);
    alternative.ss_size = kFaultStack;
    sigaltstack(&alternative, &former_fault_stack);
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &former_handlers[signal]);
    });
}

Multiprocessor::~Multiprocessor() {
    sigaltstack(&former_fault_stack, nullptr);
    munmap(fault_stack, kFaultStack);
    munmap(stacks, kMaxThreads * kStack);
    own.close();
    loaded.close();
    munmap(known_rows, sizeof(uint32_t) * kMaxThreads * kMaxThreads);
    machine = nullptr;
}

// ---------------------------------------------------------------------------------------------- running a block
void Multiprocessor::enter(const char* name, Invoke kernel) {
    kernel_name = name;
    if (kernel == invoke) return;
    invoke = kernel;
    const uintptr_t before = module.code;
    module = module_of(reinterpret_cast<const void*>(kernel));
    if (module.code == before) return;
    if (module.code == own_module.code) loaded.close(); else loaded.open(module);
}

bool Multiprocessor::run_block(uint3 block, dim3 shape, dim3 blocks) {
    if (floor > (1u << 31)) {  // clocks would wrap: forget everything
        own.forget();
        loaded.forget();
        madvise(known_rows, sizeof(uint32_t) * kMaxThreads * kMaxThreads, MADV_DONTNEED);
        floor = 0;
    }
    born = floor + 1;
    count = shape.x * shape.y * shape.z;
    done = 0;
    failed = wide = false;
    ready_first = ready_count = 0;
    bulk.clear();
    mbarrier_known.clear();
    for (auto& barrier : barriers) barrier = NamedBarrier{};
    memset(dynamic_shared, 0xff, shared_bytes);
    memset(dynamic_shared + shared_bytes, 0xc5, kCanary);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.at = {{i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y}, block, shape, blocks, i % 32};
        thread.clock = born;
        thread.groups.clear();
        thread.fiber.start(fiber_main);
        if (i % 32 == 0) warps[i / 32] = Warp{};
        warps[i / 32].live |= 1u << i % 32;
    }
    for (unsigned i = 0; i < count; ++i) push(&threads[order == EMU_REVERSE ? count - 1 - i : i]);

    running = true;
    current = pop();
    scheduler.switch_to(current->fiber);
    running = false;

    if (!failed && done < count) diagnose();
    if (!failed && std::any_of(dynamic_shared + shared_bytes, dynamic_shared + shared_bytes + kCanary,
                               [](unsigned char byte) { return byte != 0xc5; }))
        report("some thread wrote behind the " + std::to_string(shared_bytes) + " bytes of dynamic shared memory", nullptr);
    uint32_t newest = floor;
    for (unsigned i = 0; i < count; ++i) newest = std::max(newest, threads[i].clock);
    floor = newest;
    return !failed;
}

void Multiprocessor::report(const std::string& text, const Thread* thread) {
    if (failed) return;
    failed = true;
    error = std::string("kernel ") + kernel_name + ", block " + coordinates(threads[0].at.block);
    if (thread) error += ", thread " + coordinates(thread->at.thread);
    error += ": " + text;
}

// Nobody can run: say who waits where.
void Multiprocessor::diagnose() {
    std::map<std::string, std::pair<unsigned, Thread*>> groups;
    bool barrier = false;
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        std::string what = "exited";
        if (thread.state == State::waits) {
            what = std::string("at ") + thread.waits_for + " (" + place(thread.site) + ")";
            barrier |= strstr(thread.waits_for, "syncthreads") || strstr(thread.waits_for, "bar.sync");
        }
        auto& group = groups[what];
        if (group.first++ == 0) group.second = &thread;
    }
    std::string text = barrier ? "barrier divergence:" : "threads wait for each other:";
    for (auto& [what, group] : groups)
        text += " " + std::to_string(group.first) + (group.first == 1 ? " thread " : " threads ") + what + ", the first is " +
                coordinates(group.second->at.thread) + ";";
    text.pop_back();
    report(text, nullptr);
}

// Source position of a code address, through addr2line if it is installed: only run for an error message.
std::string Multiprocessor::where(uint32_t code) const {
    char command[5000], line[512] = "", path[4097] = "";
    if (!realpath(module.path, path)) return "";
    snprintf(command, sizeof(command), "addr2line -i -s -e '%s' 0x%x 2>/dev/null", path, code - 1);
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        // Inlined calls come first: take the first position that lies in a kernel's own text.
        while (fgets(line, sizeof(line), pipe)) {
            text = std::string(line).substr(0, strcspn(line, " \n"));
            if (!text.starts_with("ptx.cuh:") && !text.starts_with("emulation.hpp:")) break;
        }
        pclose(pipe);
    }
    return text.empty() || text[0] == '?' ? "" : " at " + text;
}
}  // namespace emu
