// The run-time part of the emulation: fibers, scheduler, barriers, warp meetings, asynchronous copies, the memory
// checker and the launch. Compile it WITHOUT -fsanitize=thread (kernels are compiled with it, see emulation.hpp).
//
// Each OS thread that runs blocks owns one `Multiprocessor`, which runs one block at a time. The block's threads are
// fibers on it. A fiber runs until it must wait; then the next ready one continues. When nobody is ready and not
// everybody is done, the block is stuck, and who waits where is the error message.
#include "emulation.hpp"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "emulation.h"

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {
constexpr unsigned kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kSharedCapacity = 227 * 1024;  // sm_90: the most a block can ask for
constexpr size_t kCanary = 1024;                // guard zone behind the requested dynamic shared memory
constexpr size_t kStack = 192 * 1024, kPage = 4096, kFaultStack = 64 * 1024;
// Stacks at equal distances would all compete for the same cache sets, so each starts a little lower than the last.
constexpr size_t stack_start(unsigned thread) { return kStack - thread % 61 * 1088; }
}  // namespace

// Local to the OS thread and therefore to the block. The guard zone follows it.
extern "C" {
alignas(1024) __thread unsigned char dynamic_shared[kSharedCapacity + kCanary];
}

// ---------------------------------------------------------------------------------------------- fibers
// A switch saves the callee-saved registers on the old stack and takes them from the new one: about 5 ns. Other
// machines use ucontext, which is slower because it also saves the signal mask through a system call.
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
using Context = void*;
extern "C" void emu_switch_stack(Context* save, Context load);
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch_stack, .-emu_switch_stack
)");
static void switch_context(Context& save, Context& load) { emu_switch_stack(&save, load); }
static void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // keeps the alignment a called function expects
    *--top = reinterpret_cast<void*>(entry);
    context = top - 6;  // six registers, whatever they hold
}
#else
using Context = ucontext_t;
static void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
static void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

namespace {
// A stack and where its owner was left. AddressSanitizer has to be told about every change of stack.
struct Fiber {
    Context context;
    char* stack = nullptr;
    size_t size = 0;
    void* shadow_stack = nullptr;

    void start(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack + kPage, kStack - kPage);  // what an abandoned fiber left behind
#endif
        make_context(context, stack, size, entry);
    }
    void switch_to(Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(&shadow_stack, to.stack, to.size);
        switch_context(context, to.context);
        __sanitizer_finish_switch_fiber(shadow_stack, nullptr, nullptr);
#else
        switch_context(context, to.context);
#endif
    }
    // First thing on a new fiber. `scheduler` learns its own stack the first time.
    static void entered([[maybe_unused]] Fiber& scheduler) {
#ifdef __SANITIZE_ADDRESS__
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
        if (!scheduler.stack) scheduler.stack = static_cast<char*>(const_cast<void*>(bottom)), scheduler.size = size;
#endif
    }
};

// ---------------------------------------------------------------------------------------------- settings, counters
// Settings belong to the calling OS thread, so that tests which run at the same time do not disturb each other.
struct Settings {
    int order = EMU_FORWARD;
    uint64_t seed = 1;
    unsigned workers = 1;
};
thread_local Settings settings;
struct Counters {
    std::atomic<uint64_t> launches{0}, blocks{0}, threads{0}, switches{0}, accesses{0}, conflicts{0};
} counters;

struct Kernel {
    emu::Invoke invoke;
    size_t parameter_size;
};
std::map<std::string, Kernel>& kernel_table() {  // a function, so that static constructors can use it
    static std::map<std::string, Kernel> table;
    return table;
}
std::vector<std::string>& layout_table() {
    static std::vector<std::string> table;
    return table;
}

// ---------------------------------------------------------------------------------------------- device memory
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
} heap;

// ---------------------------------------------------------------------------------------------- threads, warps
enum class State : uint8_t { ready, waits, done };

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, source_bytes;
    uint64_t* mbarrier;
};

struct Thread {
    emu::Coordinates at;
    Fiber fiber;
    unsigned number;  // linear index in the block
    State state;
    const char* waits_for;
    emu::Site site;
    uint32_t clock;                           // of the memory checker
    std::vector<std::vector<Copy>> groups;    // cp.async groups, oldest first; the last one is still open
};

struct Meeting {
    unsigned mask = 0, arrived = 0;
    const char* operation;
    emu::Site site;
    void* frames[32];
};
struct Warp {
    unsigned live = 0;
    std::vector<Meeting> open;
};
struct NamedBarrier {
    unsigned expected = 0, true_predicates = 0, generation = 0;
    emu::Site site;
    std::vector<unsigned> arrived, waiting;
    unsigned result[2] = {0, 0};
};

// The memory checker's record of one byte of shared memory.
struct Cell {
    uint32_t written, read;  // clock of the last write, of the last read since
    uint16_t writer, reader; // thread number and the flags below
    uint32_t writer_code;    // where, relative to the start of the kernel's module
};
constexpr uint16_t kNumber = 0x03ff, kAtomic = 0x0400, kInFlight = 0x0800, kSameWarp = 0x1000, kManyWarps = 0x2000;

void* reserve(size_t bytes) {
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

struct Multiprocessor;
__thread Multiprocessor* machine = nullptr;  // of this OS thread; null until its first launch
__thread bool running = false;               // a fiber is running on this OS thread
thread_local std::string last_error;
bool instrumented = false;                   // kernels were compiled with -fsanitize=thread

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
    emu::Invoke invoke = nullptr;
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
    void wait(const char* what, const emu::Site& site) {
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

    void enter(const char* name, emu::Invoke kernel);
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
    void check(uintptr_t address, size_t bytes, emu::Access kind, void* code, size_t alignment = 1);
    void check_shared(Cell* cell, uintptr_t address, size_t bytes, emu::Access kind, uint32_t code);
    void check_heap(uintptr_t address, size_t bytes, emu::Access kind, uint32_t code);
    void finish(const Copy& copy);
};

std::string coordinates(const uint3& v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}
std::string place(const emu::Site& site) {
    const char* slash = strrchr(site.file_name(), '/');
    return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

// ---------------------------------------------------------------------------------------------- set-up
void fiber_main() {
    Multiprocessor& sm = *machine;
    Fiber::entered(sm.scheduler);
    sm.invoke(sm.arguments);
    Thread& self = *sm.current;
    self.state = State::done;
    ++sm.done;
    sm.warps[self.number / 32].live &= ~(1u << self.at.lane);
    sm.leave();
    abort();  // nobody resumes a finished fiber
}

// A fault inside a kernel becomes that launch's error; any other goes to the handler that was there before.
struct sigaction former_handlers[65];
void on_fault(int signal, siginfo_t* info, void* context) {
    if (running) {
        const char* what = signal == SIGSEGV || signal == SIGBUS ? "invalid address" : signal == SIGFPE ? "division by zero" : "trap";
        const uintptr_t address = uintptr_t(info->si_addr), stacks = uintptr_t(machine->stacks);
        if (signal == SIGSEGV && address - stacks < kMaxThreads * kStack) what = "stack overflow (or invalid address)";
        emu::fail("%s (signal %d at %p)", what, signal, info->si_addr);
    }
    const struct sigaction& former = former_handlers[signal];
    if (former.sa_flags & SA_SIGINFO) return former.sa_sigaction(signal, info, context);
    if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) return former.sa_handler(signal);
    sigaction(signal, &former, nullptr);  // default action: the instruction faults again
}

// What code that takes the address of a thread-local variable calls. It gives the OS thread its part of the module's
// storage when that is used for the first time.
struct LocalIndex {
    size_t module, offset;
};
extern "C" void* __tls_get_addr(LocalIndex*);

int find_module(dl_phdr_info* info, size_t, void* data) {
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
void Multiprocessor::enter(const char* name, emu::Invoke kernel) {
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
    ++counters.blocks;
    counters.threads += count;
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

// ---------------------------------------------------------------------------------------------- memory checker
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

void Multiprocessor::check(uintptr_t address, size_t bytes, emu::Access kind, void* code_address, size_t alignment) {
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
        emu::fail("%s %zu bytes at %#zx%s, which is no multiple of that", kind == emu::Access::read ? "reads" : "writes", bytes,
                  size_t(address), where(code).c_str());
    if (order == EMU_RANDOM && ready_count && random() % 32 == 0) yield();
}

void Multiprocessor::check_heap(uintptr_t address, size_t bytes, emu::Access kind, uint32_t code) {
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
    const char* verb = kind == emu::Access::read ? "reads" : "writes";
    if (base)
        emu::fail("%s %zu bytes at offset %zu of a buffer of %zu bytes%s", verb, bytes, size_t(address - base), size, where(code).c_str());
    emu::fail("%s %zu bytes of device memory that is not allocated%s", verb, bytes, where(code).c_str());
}

void Multiprocessor::check_shared(Cell* cell, uintptr_t address, size_t bytes, emu::Access kind, uint32_t code) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared);
    const bool is_dynamic = address - dynamic < kSharedCapacity + kCanary;
    const bool is_write = kind != emu::Access::read;
    auto name = [&](size_t at) {
        return is_dynamic ? "byte " + std::to_string(address + at - dynamic) + " of dynamic shared memory"
                          : std::string("static shared memory");
    };
    if (is_dynamic && address + bytes > dynamic + shared_bytes)
        emu::fail("%s %s, but the launch asked for %u bytes%s", is_write ? "writes" : "reads", name(0).c_str(), shared_bytes, where(code).c_str());

    const uint16_t me = uint16_t(current->number);
    for (size_t i = 0; i < bytes; ++i, ++cell) {
        // Against the last write.
        if (cell->written >= born) {
            const unsigned writer = cell->writer & kNumber;
            const bool both_atomic = kind == emu::Access::atomic && cell->writer & kAtomic;
            if (instrumented && !both_atomic && !ordered(cell->written, writer))
                emu::fail("race: %s %s%s, which thread %s wrote%s without a barrier in between", is_write ? "writes" : "reads",
                          name(i).c_str(), where(code).c_str(), coordinates(threads[writer].at.thread).c_str(), where(cell->writer_code).c_str());
            if (cell->writer & kInFlight && kind != emu::Access::async_write)
                emu::fail("%s %s%s, but the asynchronous copy to it has not been waited for", is_write ? "writes" : "reads",
                          name(i).c_str(), where(code).c_str());
        } else if (instrumented && (!is_write || kind == emu::Access::atomic)) {
            emu::fail("reads %s%s, which no thread of this block has written (or not yet, for lack of a barrier)", name(i).c_str(), where(code).c_str());
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
                    emu::fail("race: writes %s%s, which thread %s read before without a barrier in between", name(i).c_str(),
                              where(code).c_str(), coordinates(threads[reader].at.thread).c_str());
            }
            cell->written = current->clock;
            cell->writer = me | (kind == emu::Access::atomic ? kAtomic : 0) | (kind == emu::Access::async_write ? kInFlight : 0);
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
}  // namespace

// ---------------------------------------------------------------------------------------------- namespace emu
namespace emu {
const Coordinates& here() { return machine->current->at; }
unsigned block_size() { return machine->count; }
unsigned live_lanes() { return machine->warps[machine->current->number / 32].live; }
void pause() {
    machine->yield();
    // What it waits for may be up to another thread of the host, which may be waiting for this core.
    if (++machine->pauses % 16 == 0) std::this_thread::yield();
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

void touch(const void* address, size_t bytes, Access kind) {
    if (running) machine->check(reinterpret_cast<uintptr_t>(address), bytes, kind, __builtin_return_address(0));
}

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

// ------------------------------------------------------------------------------------------ asynchronous copies
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

// ------------------------------------------------------------------------------------------ matrix instructions
// Lanes name rows, and other lanes get or give what is in them: an access is that of the lane with the register.
struct MatrixFrame {
    uint32_t* registers;
    char* row;
    int count;
    bool transposed;
    char* halves[4][2];  // where the halves of this lane's registers lie
};
static void count_conflicts(void* const frames[32], int matrix) {
    // Eight rows of 16 bytes are one pass if they fall into different groups of four banks.
    uintptr_t seen[8];
    int used[8] = {}, passes = 0;
    for (int i = 0; i < 8; ++i) {
        seen[i] = reinterpret_cast<uintptr_t>(static_cast<MatrixFrame*>(frames[8 * matrix + i])->row) / 16;
        if (std::find(seen, seen + i, seen[i]) == seen + i) passes = std::max(passes, ++used[seen[i] % 8]);
    }
    machine->conflicts += unsigned(passes - 1);
}
template <bool store> static void move_matrix(void* const frames[32], unsigned) {
    const int count = static_cast<MatrixFrame*>(frames[0])->count;
    for (int matrix = 0; matrix < count; ++matrix) {
        count_conflicts(frames, matrix);
        for (int lane = 0; lane < 32; ++lane) {
            auto* mine = static_cast<MatrixFrame*>(frames[lane]);
            for (int half = 0; half < 2; ++half) {
                int row = lane / 4, column = 2 * (lane % 4) + half;
                if (mine->transposed) std::swap(row, column);
                char* element = static_cast<MatrixFrame*>(frames[8 * matrix + row])->row + 2 * column;
                char* own = reinterpret_cast<char*>(mine->registers + matrix) + 2 * half;
                mine->halves[matrix][half] = element;
                if (store) memcpy(element, own, 2); else memcpy(own, element, 2);
            }
        }
    }
}
static void meet_for_matrices(MatrixFrame& frame, const char* name, Combine combine, Access kind, void* code, Site site) {
    if (int(machine->current->at.lane) < 8 * frame.count) {  // the others' addresses are not used
        const auto row = reinterpret_cast<uintptr_t>(frame.row);
        if (row % 16) fail("%s: row address is not a multiple of 16", name);
        if (!machine->find_cell(row)) fail("%s: row is not in shared memory", name);
    }
    meet(0xffffffffu, name, &frame, combine, site);
    for (int matrix = 0; matrix < frame.count; ++matrix) {
        const auto first = reinterpret_cast<uintptr_t>(frame.halves[matrix][0]);
        const auto second = reinterpret_cast<uintptr_t>(frame.halves[matrix][1]);
        machine->check(first, second == first + 2 ? 4 : 2, kind, code);
        if (second != first + 2) machine->check(second, 2, kind, code);
    }
}
void load_matrix(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
    MatrixFrame frame{registers, static_cast<char*>(const_cast<void*>(row)), count, transposed, {}};
    meet_for_matrices(frame, "ldmatrix", move_matrix<false>, Access::read, __builtin_return_address(0), site);
}
void store_matrix(void* row, const uint32_t* registers, int count, bool transposed, Site site) {
    MatrixFrame frame{const_cast<uint32_t*>(registers), static_cast<char*>(row), count, transposed, {}};
    meet_for_matrices(frame, "stmatrix", move_matrix<true>, Access::write, __builtin_return_address(0), site);
}

// All mma shapes used here are m16n8 with K = 32 bytes of A's row. Lane = 4 * group + part holds, in 32-bit registers:
//   A[half + 2 * chunk]: row group + 8 * half, the elements of word 4 * chunk + part;   B[chunk]: column group, same word
//   C, D: rows group and group + 8, columns 2 * part and 2 * part + 1.
struct MultiplyFrame {
    void* d;
    const uint32_t *a, *b;
    const void* c;
};
static double decode(Element element, uint32_t word, int i) {
    switch (element) {
        case Element::bf16: return bf16_decode(uint16_t(word >> 16 * i));
        case Element::f16: return HalfFormat::decode(uint16_t(word >> 16 * i));
        case Element::tf32: return bit_cast<float>(word & 0xffffe000u);
        case Element::e4m3: return E4M3Format::decode(word >> 8 * i & 255);
        case Element::e5m2: return E5M2Format::decode(word >> 8 * i & 255);
        case Element::s8: return int8_t(word >> 8 * i);
    }
    return 0;
}
template <Element element> static void multiply_all(void* const frames[32], unsigned) {
    constexpr int per_word = element == Element::tf32 ? 1 : element == Element::bf16 || element == Element::f16 ? 2 : 4;
    constexpr int k_size = 8 * per_word;
    double a[16][k_size], b[k_size][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* frame = static_cast<MultiplyFrame*>(frames[lane]);
        for (int chunk = 0; chunk < 2; ++chunk)
            for (int i = 0; i < per_word; ++i) {
                const int k = (4 * chunk + lane % 4) * per_word + i;
                for (int half = 0; half < 2; ++half) a[lane / 4 + 8 * half][k] = decode(element, frame->a[half + 2 * chunk], i);
                b[k][lane / 4] = decode(element, frame->b[chunk], i);
            }
    }
    double sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < k_size; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    using Accumulator = std::conditional_t<element == Element::s8, int32_t, float>;
    for (int lane = 0; lane < 32; ++lane) {
        const auto* frame = static_cast<MultiplyFrame*>(frames[lane]);
        for (int i = 0; i < 4; ++i) {
            const double sum = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
            const Accumulator before = static_cast<const Accumulator*>(frame->c)[i];
            // Integers wrap; floats are rounded once, where hardware truncates now and then.
            static_cast<Accumulator*>(frame->d)[i] = std::is_integral_v<Accumulator>
                ? Accumulator(uint32_t(int64_t(sum)) + uint32_t(before)) : Accumulator(sum + before);
        }
    }
}
void multiply(Element element, void* d, const uint32_t* a, const uint32_t* b, const void* c, Site site) {
    static constexpr Combine combines[] = {multiply_all<Element::bf16>, multiply_all<Element::f16>, multiply_all<Element::tf32>,
                                           multiply_all<Element::e4m3>, multiply_all<Element::e5m2>, multiply_all<Element::s8>};
    MultiplyFrame frame{d, a, b, c};
    meet(0xffffffffu, "mma.sync", &frame, combines[int(element)], site);
}
}  // namespace emu

// ---------------------------------------------------------------------------------------------- instrumentation
// What -fsanitize=thread makes the compiler call. We do not link its library; these are all it needs. Where the compiler
// does not say itself that an access may be unaligned, shared and device memory have to be at a multiple of its size, which
// x86 would often forgive. (It says nothing of types of 16 bytes that are aligned to 8: none of those there, please.)
#define EMU_CHECKED(name, bytes, alignment, kind)                                                                \
    extern "C" void __tsan_##name(void* address) {                                                               \
        if (running)                                                                                             \
            machine->check(reinterpret_cast<uintptr_t>(address), bytes, emu::Access::kind,                       \
                           __builtin_return_address(0), alignment);                                              \
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
extern "C" void __tsan_read_range(void* address, size_t bytes) {
    if (running) machine->check(reinterpret_cast<uintptr_t>(address), bytes, emu::Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
    if (running) machine->check(reinterpret_cast<uintptr_t>(address), bytes, emu::Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() { instrumented = true; }  // called by a constructor of every instrumented unit
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// ---------------------------------------------------------------------------------------------- C interface
static void run_blocks(const char* name, emu::Invoke invoke, dim3 grid, dim3 block, unsigned shared_bytes, void** arguments,
                      const Settings& with, std::atomic<uint64_t>& next, std::atomic<bool>& stop, std::string& error) {
    if (!machine) {
        static thread_local std::unique_ptr<Multiprocessor> owner;
        owner = std::make_unique<Multiprocessor>();
        machine = owner.get();
    }
    Multiprocessor& sm = *machine;
    sm.enter(name, invoke);
    sm.arguments = arguments;
    sm.shared_bytes = shared_bytes;
    sm.order = with.order;
    sm.random.seed(unsigned(with.seed * 2654435761u + 1));
    const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
    while (!stop) {
        const uint64_t i = next++;
        if (i >= total) break;
        const uint3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        if (!sm.run_block(index, block, grid) && !stop.exchange(true)) error = sm.error;
    }
    counters.switches += std::exchange(sm.switches, 0);
    counters.accesses += std::exchange(sm.accesses, 0);
    counters.conflicts += std::exchange(sm.conflicts, 0);
}

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
    std::atomic<uint64_t> next{0};
    std::atomic<bool> stop{false};
    std::string error;
    auto work = [&, with = settings] {
        run_blocks(kernel->first.c_str(), kernel->second.invoke, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                   arguments, with, next, stop, error);
    };
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < settings.workers; ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
    last_error = error;
    return error.empty() ? 0 : 719;
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
        {"switches", &counters.switches}, {"accesses", &counters.accesses}, {"matrix_bank_conflicts", &counters.conflicts}};
    for (auto& [key, value] : all)
        if (!strcmp(key, name)) return *value;
    return 0;
}
}
