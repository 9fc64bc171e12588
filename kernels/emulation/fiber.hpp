// A fiber: a stack, and where its owner was left.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Fiber {
    Context context;
    char* stack = nullptr;
    size_t size = 0;

    // Makes it ready to begin with `entry`, which must not return.
    void start(void (*entry)());
    // Leaves this fiber, which runs, and goes on with another.
    void switch_to(Fiber& to);
};
}  // namespace emu
