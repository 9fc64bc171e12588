//! Tells the program what it was built for and with, for `--env`.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = env::var("TARGET").expect("cargo names the target");
    println!("cargo::rustc-env=TARGET_TRIPLE={target}");

    let compiler = env::var_os("RUSTC").expect("cargo names the compiler");
    let version =
        Command::new(compiler).arg("--version").output().ok().filter(|output| output.status.success());
    if let Some(version) = version.and_then(|output| String::from_utf8(output.stdout).ok()) {
        println!("cargo::rustc-env=COMPILER_VERSION={}", version.trim());
    }
}
