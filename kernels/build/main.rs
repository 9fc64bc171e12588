//! Compiles the CUDA kernels: with nvcc for GPUs (feature `cuda`), with the host's compiler for tests (feature
//! `emulation`). Without either feature nothing is looked for.

#[cfg(feature = "emulation")]
mod emulated;
#[cfg(feature = "cuda")]
mod nvcc;
#[cfg(any(feature = "cuda", feature = "emulation"))]
mod sources;

fn main() {
    println!("cargo:rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    nvcc::build();
    #[cfg(feature = "emulation")]
    emulated::build();
}
