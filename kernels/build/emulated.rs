//! The kernels, and the emulation that runs them, as code for this machine.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sources::{self, Unit};

const EMULATION: &str = "emulation";

pub(crate) fn build() {
    println!("cargo:rerun-if-changed={EMULATION}");
    println!("cargo:rerun-if-changed={}", sources::FOLDER);
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let shared: Vec<PathBuf> = sources::files(Path::new(EMULATION))
        .into_iter()
        .chain(sources::files(&Path::new(sources::FOLDER).join("include")))
        .collect();
    let kernel = compiler(&[
        // Calls the memory checker of emulation.cpp at every load and store; the sanitizer's library is not linked.
        "-fsanitize=thread",
        // A local array that is too large hits the guard page of a fiber's stack instead of jumping over it.
        "-fstack-clash-protection",
        "-xc++",
    ]);
    let runtime = compiler(&[]);
    let unit = |source: PathBuf| {
        let key = sources::hash(&[&shared[..], std::slice::from_ref(&source)].concat(), &[]);
        Unit { target: out.join(format!("{}.emulated.o", sources::stem(&source))), source, key }
    };
    let mut units: Vec<Unit> = sources::kernels().into_iter().map(unit).collect();
    units.extend(["emulation.cpp", "faults.cu"].map(|name| unit(Path::new(EMULATION).join(name))));
    let objects: Vec<PathBuf> = units.iter().map(|unit| unit.target.clone()).collect();
    sources::compile(units, |unit| {
        let compiler = if unit.source.extension().is_some_and(|extension| extension == "cu") {
            &kernel
        } else {
            &runtime
        };
        run(compiler.to_command().arg("-c").arg(&unit.source).arg("-o").arg(&unit.target))
    });
    // For tests that compile changed kernels, and load them beside the others.
    let words = |text: &OsStr| text.to_str().expect("flags are UTF-8").to_owned();
    let flags: Vec<String> = kernel.args().iter().map(|flag| words(flag)).collect();
    println!("cargo:rustc-env=KERNEL_COMPILER={}", kernel.path().display());
    println!("cargo:rustc-env=KERNEL_COMPILER_FLAGS={}", flags.join("\u{1f}"));
    println!("cargo:rustc-link-arg-tests=-rdynamic");
    // Kernels enlist themselves when the program starts and nobody refers to their symbols, so the linker must be told to
    // keep them.
    cc::Build::new()
        .cpp(true)
        .objects(objects)
        .link_lib_modifier("+whole-archive")
        .compile("emulated_kernels");
}

fn compiler(flags: &[&str]) -> cc::Tool {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).debug(true).warnings(true).include(EMULATION);
    build.include(Path::new(sources::FOLDER).join("include")).flag("-Wno-unknown-pragmas");
    for flag in flags {
        build.flag(flag);
    }
    build.get_compiler()
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}
