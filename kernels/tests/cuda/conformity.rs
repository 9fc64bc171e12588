//! The emulation's number formats are those of CUDA's headers.

use std::path::Path;
use std::process::Command;

/// Run with `NVCC=… cargo test -p kernels --features emulation --test cuda conformity -- --ignored`.
#[test]
#[ignore = "needs the CUDA toolkit's headers beside the compiler that NVCC names"]
fn short_formats_convert_as_with_the_toolkits_headers() {
    let nvcc = std::env::var_os("NVCC").expect("NVCC names the compiler, whose toolkit has the headers");
    let headers = Path::new(&nvcc).parent().expect("the path of a file").join("../include");
    assert!(headers.join("cuda_fp8.h").is_file(), "{} has no cuda_fp8.h", headers.display());
    let emulation = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulation");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("conformity");
    let mut compiler = Command::new(env!("KERNEL_COMPILER"));
    compiler.args(["-std=c++20", "-O1", "-I"]).arg(headers).arg("-I").arg(&emulation);
    run(compiler.arg(emulation.join("conformity.cpp")).arg("-o").arg(&program));
    print!("{}", run(&mut Command::new(program)));
}

/// What it prints; it must succeed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}
