/* The C interface of the emulation: what a launcher calls. Everything a kernel needs is in emulation.hpp instead, which also
 * says how all of it works. All functions may be called from several OS threads at once. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct { unsigned x, y, z; } EmuDim;

/* Runs a kernel to its end. `arguments` is cuLaunchKernel's array of pointers to the arguments. Returns 0, or one of
 * the driver's codes: 1 invalid value, 500 no such kernel, 719 launch failed. emu_last_error() then says what failed
 * in this OS thread's latest launch, naming kernel, block, thread and, where it can, source line. */
int emu_launch(const char* name, EmuDim grid, EmuDim block, unsigned shared_bytes, void** arguments);
const char* emu_last_error(void);
int emu_has_kernel(const char* name);
/* Bytes of all parameters of a kernel; 0 when there is no such kernel. */
size_t emu_parameter_size(const char* name);
/* The structs of parameters that kernels declare, one after the other, and then null: "name size field:offset:size ...". */
const char* emu_layout(size_t index);

/* "Device" memory: ordinary memory, 256-byte aligned, filled with 0xff (NaN), with an unmapped page behind it. */
void* emu_malloc(size_t bytes);
void emu_free(void* address);

/* The order in which threads get their turn. forward: 0, 1, 2 ... each until it must wait; reverse: from the last;
 * random: a random one, also preempted at random memory accesses (only in instrumented kernels). A wrong kernel may
 * well pass under one order, so tests run all three. Holds for the calling OS thread's launches. */
enum { EMU_FORWARD = 0, EMU_REVERSE = 1, EMU_RANDOM = 2 };
void emu_schedule(int order, uint64_t seed);

/* Number of OS threads that share the blocks of this OS thread's launches (default 1: only itself). A kernel whose blocks wait
 * for each other needs as many as it has blocks. */
void emu_workers(unsigned count);

/* Totals since the start: "launches", "blocks", "threads", "switches", "accesses" (checked loads and stores),
 * and, for the launches of this OS thread, "matrix_bank_conflicts" (extra shared-memory passes of ldmatrix, stmatrix). */
uint64_t emu_counter(const char* name);

#ifdef __cplusplus
}
#endif
