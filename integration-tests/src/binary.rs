//! Where the launcher binary is.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// A launcher to test instead of the one that cargo builds: on a machine that has no cargo.
const OTHER_BINARY: &str = "TEXT_GENERATION_LAUNCHER";

/// The launcher of the profile that the tests were built with, brought up to date once per test process.
///
/// `cargo test` builds a package's binaries only for that package's own tests, so the kit asks cargo for it: a no-op
/// when nothing changed.
pub fn launcher() -> &'static PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(binary) = std::env::var_os(OTHER_BINARY) {
            return binary.into();
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", "launcher", "--bin", "text-generation-launcher"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        for (wanted, feature) in
            [(cfg!(feature = "cuda"), "cuda"), (cfg!(feature = "emulation"), "emulation")]
        {
            if wanted {
                cargo.args(["--features", feature]);
            }
        }
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let status = cargo.status().expect("cargo runs: it started this test");
        assert!(status.success(), "the launcher does not build");
        let test = std::env::current_exe().expect("a test knows its own path");
        let profile = test.ancestors().nth(2).expect("tests lie in <target>/<profile>/deps");
        let binary = profile.join("text-generation-launcher");
        assert!(binary.is_file(), "{} is missing after a build", binary.display());
        binary
    })
}
