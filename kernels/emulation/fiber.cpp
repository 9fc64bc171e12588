// How fibers are switched. A switch saves the callee-saved registers on the old stack and takes them from the new one:
// about 5 ns. Other machines use ucontext, which is slower because it also saves the signal mask through a system call.
#include "fiber.hpp"

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch_stack(void** save, void* load);
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

namespace emu {
void Fiber::start(void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // keeps the alignment a called function expects
    *--top = reinterpret_cast<void*>(entry);
    context = top - 6;  // six registers, whatever they hold
}
void Fiber::switch_to(Fiber& to) { emu_switch_stack(&context, to.context); }
}  // namespace emu
#else
namespace emu {
void Fiber::start(void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
void Fiber::switch_to(Fiber& to) { swapcontext(&context, &to.context); }
}  // namespace emu
#endif
