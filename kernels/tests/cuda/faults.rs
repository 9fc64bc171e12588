//! The emulation reports what a GPU would not: every kind of fault, with a sentence that tells where it is.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

#[repr(C)]
#[derive(Clone, Copy)]
struct Dim {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

// `kernels/emulation/emulation.h`
unsafe extern "C" {
    fn emu_launch(
        name: *const c_char,
        grid: Dim,
        block: Dim,
        shared_bytes: c_uint,
        arguments: *mut *mut c_void,
    ) -> c_int;
    fn emu_last_error() -> *const c_char;
    fn emu_malloc(bytes: usize) -> *mut c_void;
    fn emu_free(address: *mut c_void);
}

/// An argument of a kernel. Buffers hold 64 words.
#[derive(Clone, Copy)]
enum Argument {
    Buffer,
    Null,
    Number(c_int),
}

struct Launch {
    blocks: c_uint,
    threads: c_uint,
    shared_bytes: c_uint,
}

const WARP: Launch = Launch { blocks: 1, threads: 32, shared_bytes: 0 };
const TWO_WARPS: Launch = Launch { threads: 64, ..WARP };
const ONE: Launch = Launch { threads: 1, ..WARP };
const BUFFER_BYTES: usize = 64 * 4;

/// Runs a kernel; what is reported of it, with the code of the driver's errors, or none.
fn run(kernel: &str, launch: &Launch, arguments: &[Argument]) -> Option<(c_int, String)> {
    // SAFETY: any size is allowed.
    let buffers: Vec<_> = arguments.iter().map(|_| unsafe { emu_malloc(BUFFER_BYTES) }).collect();
    // As wide as a pointer; a number is in the lower half.
    let mut values: Vec<usize> = arguments
        .iter()
        .zip(&buffers)
        .map(|(argument, buffer)| match argument {
            Argument::Buffer => buffer.expose_provenance(),
            Argument::Null => 0,
            Argument::Number(number) => *number as usize,
        })
        .collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (&raw mut *value).cast()).collect();
    let name = CString::new(kernel).expect("a name");
    let dim = |x| Dim { x, y: 1, z: 1 };
    let (blocks, threads) = (dim(launch.blocks), dim(launch.threads));
    // SAFETY: the emulation bears with faulty kernels; each argument is as wide as a pointer.
    let code =
        unsafe { emu_launch(name.as_ptr(), blocks, threads, launch.shared_bytes, pointers.as_mut_ptr()) };
    // SAFETY: a zero-terminated text that stays until this thread's next launch.
    let text = unsafe { CStr::from_ptr(emu_last_error()) }.to_string_lossy().into_owned();
    for buffer in buffers {
        // SAFETY: allocated above, and used by nothing any more.
        unsafe { emu_free(buffer) };
    }
    (code != 0).then_some((code, text))
}

/// The report must begin with the kernel and the place, and contain these words.
fn expect(kernel: &str, launch: &Launch, arguments: &[Argument], place: &str, words: &[&str]) {
    let (code, text) = run(kernel, launch, arguments).unwrap_or_else(|| panic!("{kernel} was not noticed"));
    assert_eq!(code, 719, "{text}");
    assert!(text.starts_with(&format!("kernel {kernel}, {place}")), "{text}");
    for words in words {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn threads_that_do_not_meet_are_reported() {
    expect(
        "fault_exit_before_barrier",
        &TWO_WARPS,
        &[],
        "block (0,0,0): barrier divergence: ",
        &["63 threads at __syncthreads (faults.cu:", "1 thread exited, the first is (7,0,0)"],
    );
    expect(
        "fault_two_barriers",
        &TWO_WARPS,
        &[],
        "block (0,0,0), thread (32,0,0): barrier divergence: ",
        &["this thread waits at __syncthreads (faults.cu:", "thread (0,0,0) at another one (faults.cu:"],
    );
    expect(
        "fault_missing_lane",
        &WARP,
        &[Argument::Buffer],
        "block (0,0,0), thread (4,0,0): __shfl_xor_sync (faults.cu:",
        &["mask ffffffff names lanes 00000008, which have exited or do not exist"],
    );
    expect(
        "fault_inactive_lane",
        &WARP,
        &[Argument::Buffer],
        "block (0,0,0), thread (15,0,0): ",
        &["shuffle: lane 0 reads lane 20, which takes no part (mask 0000ffff)"],
    );
    expect(
        "fault_two_shuffles",
        &WARP,
        &[Argument::Buffer],
        "block (0,0,0), thread (1,0,0): ",
        &["lanes of one warp meet in different places: __shfl_xor_sync (faults.cu:"],
    );
    expect(
        "fault_mbarrier",
        &WARP,
        &[],
        "block (0,0,0): threads wait for each other: ",
        &["32 threads at mbarrier"],
    );
}

#[test]
fn races_and_reads_of_nothing_are_reported() {
    expect(
        "fault_race",
        &TWO_WARPS,
        &[Argument::Buffer],
        "block (0,0,0), thread (31,0,0): reads static shared memory",
        &["which no thread of this block has written (or not yet, for lack of a barrier)"],
    );
    expect(
        "fault_race_of_reuse",
        &TWO_WARPS,
        &[Argument::Buffer],
        "block (0,0,0), thread (",
        &["race: reads static shared memory", " wrote", "without a barrier in between"],
    );
    expect(
        "fault_uninitialised",
        &TWO_WARPS,
        &[Argument::Buffer],
        "block (0,0,0), thread (63,0,0): reads static shared memory",
        &["which no thread of this block has written"],
    );
}

#[test]
fn copies_that_nobody_waits_for_are_reported() {
    let launch = Launch { shared_bytes: 128, ..WARP };
    for kernel in ["fault_no_wait", "fault_weak_wait"] {
        expect(
            kernel,
            &launch,
            &[Argument::Buffer; 2],
            "block (0,0,0), thread (0,0,0): reads byte 0 of dynamic shared memory",
            &["but the asynchronous copy to it has not been waited for"],
        );
    }
}

#[test]
fn accesses_outside_of_memory_are_reported() {
    let launch = Launch { shared_bytes: 100, ..ONE };
    expect(
        "fault_shared_bounds",
        &launch,
        &[Argument::Number(100)],
        "block (0,0,0), thread (0,0,0): ",
        &["writes byte 100 of dynamic shared memory, but the launch asked for 100 bytes"],
    );
    let arguments = [Argument::Buffer, Argument::Number(64)];
    expect(
        "fault_global_bounds",
        &ONE,
        &arguments,
        "block (0,0,0), thread (0,0,0): writes 4 bytes at offset 256 of a buffer of 256 bytes",
        &[],
    );
    let arguments = [Argument::Null, Argument::Buffer];
    expect(
        "fault_null",
        &ONE,
        &arguments,
        "block (0,0,0), thread (0,0,0): invalid address (signal 11 at (nil))",
        &[],
    );
    expect(
        "fault_misaligned",
        &WARP,
        &[Argument::Buffer],
        "block (0,0,0), thread (1,0,0): writes 16 bytes at 0x",
        &["which is no multiple of that"],
    );
    expect(
        "fault_matrix_row",
        &WARP,
        &[Argument::Buffer],
        "block (0,0,0), thread (1,0,0): ",
        &["ldmatrix: row address is not a multiple of 16"],
    );
}

#[test]
fn traps_are_reported_and_the_next_launch_is_well() {
    let four = Launch { blocks: 4, ..WARP };
    expect("fault_trap", &four, &[], "block (2,0,0), thread (5,0,0): __trap()", &[]);
    let limit = |limit| [Argument::Number(limit)];
    expect(
        "fault_assertion",
        &WARP,
        &limit(3),
        "block (0,0,0), thread (3,0,0): assertion failed: ",
        &["faults.cu:"],
    );
    assert_eq!(run("fault_assertion", &WARP, &limit(32)), None);
    expect("fault_stack", &ONE, &[Argument::Buffer], "block (0,0,0), thread (0,0,0): stack overflow", &[]);
    let arguments = [Argument::Buffer, Argument::Number(0)];
    expect("fault_division", &ONE, &arguments, "block (0,0,0), thread (0,0,0): division by zero", &[]);
    assert_eq!(run("fault_division", &ONE, &[Argument::Buffer, Argument::Number(2)]), None);
}

#[test]
fn launches_that_cannot_be_are_refused() {
    let (code, text) = run("fault_that_is_none", &ONE, &[]).expect("there is no such kernel");
    assert_eq!((code, &text[..]), (500, "no kernel named fault_that_is_none in the emulation's table"));
    for launch in [
        Launch { threads: 1025, ..ONE },
        Launch { threads: 0, ..ONE },
        Launch { blocks: 0, ..ONE },
        Launch { shared_bytes: (227 << 10) + 1, ..ONE },
    ] {
        let (code, text) = run("fault_trap", &launch, &[]).expect("outside the limits");
        assert_eq!(code, 1);
        assert_eq!(text, "kernel fault_trap: launch dimensions or shared memory outside the limits");
    }
}
