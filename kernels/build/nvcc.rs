//! The kernels as one fatbin per source file, for the architectures that are asked for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::sources::{self, Unit};

/// Comma-separated compute capabilities, as in `80,90a`. The last of the default also comes as PTX, which newer GPUs
/// compile for themselves.
const ARCHITECTURES: &str = "KERNEL_ARCHITECTURES";
const ARCHITECTURES_DEFAULT: &str = "80,86,89,90a,100,120";

/// What has to be installed where there is no compiler.
const INSTALL: &str = "install `cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2` with pip into a virtual environment named \
                       .venv-cuda beside Cargo.toml, or set CUDA_HOME to an installed CUDA 13";

pub(crate) fn build() {
    for variable in [ARCHITECTURES, "NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed={}", sources::FOLDER);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = find().unwrap_or_else(|| panic!("the feature `cuda` needs nvcc 13: {INSTALL}"));
    let version = version(&nvcc);
    try_out(&nvcc, &out);
    let architectures = env::var(ARCHITECTURES).unwrap_or_else(|_| ARCHITECTURES_DEFAULT.to_owned());
    let targets = targets(&architectures);
    let shared = sources::files(&Path::new(sources::FOLDER).join("include"));
    let unit = |source: PathBuf| {
        let inputs = [&shared[..], std::slice::from_ref(&source)].concat();
        let key = sources::hash(&inputs, &[&version, &architectures]);
        Unit { target: out.join(format!("{}.fatbin", sources::stem(&source))), source, key }
    };
    let units: Vec<Unit> = sources::kernels().into_iter().map(unit).collect();
    let modules = modules(&units);
    sources::compile(units, |unit| {
        let mut command = Command::new(&nvcc);
        command.args(["-O3", "-std=c++17", "-fatbin", "-Xptxas", "-v", "-I", "cuda/include"]).args(&targets);
        let output = run(command.arg(&unit.source).arg("-o").arg(&unit.target))?;
        // Registers and spills of every kernel, which a test reads.
        fs::write(unit.target.with_extension("resources"), output).map_err(|error| error.to_string())
    });
    fs::write(out.join("modules.rs"), modules).expect("OUT_DIR is writable");
    println!("cargo:rustc-env=KERNEL_FATBINS={}", out.display());
    println!("cargo:rustc-env={ARCHITECTURES}={architectures}");
}

/// `nvcc` itself, then installed toolkits, then virtual environments.
fn find() -> Option<PathBuf> {
    let path = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = path("NVCC") {
        return Some(nvcc);
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path).map(|home| home.join("bin"));
    let environments = path("VIRTUAL_ENV").into_iter().chain([PathBuf::from("../.venv-cuda")]);
    let installed = environments.flat_map(|environment| python_folders(&environment));
    let search = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let last = PathBuf::from("/usr/local/cuda/bin");
    let mut folders = toolkits.chain(installed).chain(search.unwrap_or_default()).chain([last]);
    folders.find_map(|folder| Some(folder.join("nvcc")).filter(|nvcc| nvcc.is_file()))
}

/// Where pip puts the compiler, which is not the environment's own `bin`.
fn python_folders(environment: &Path) -> Vec<PathBuf> {
    let versions = fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
    versions.map(|version| version.path().join("site-packages/nvidia/cu13/bin")).collect()
}

fn version(nvcc: &Path) -> String {
    let text = run(Command::new(nvcc).arg("--version")).unwrap_or_else(|error| panic!("{error}"));
    assert!(text.contains("release 13."), "{} is not of CUDA 13:\n{text}\n{INSTALL}", nvcc.display());
    text
}

/// Parts of different versions fail in ways that explain nothing, so three lines are compiled first.
fn try_out(nvcc: &Path, out: &Path) {
    let (source, target) = (out.join("try.cu"), out.join("try.fatbin"));
    fs::write(&source, "__global__ void nothing(int* to) { *to = 1; }\n").expect("OUT_DIR is writable");
    let result = run(Command::new(nvcc).args(["-fatbin", "-arch=sm_90"]).arg(&source).arg("-o").arg(&target));
    if let Err(error) = result {
        panic!("{} compiles nothing; are its parts of one version? {INSTALL}\n{error}", nvcc.display());
    }
}

/// nvcc's words for the architectures. PTX for the newest comes with the default only.
fn targets(architectures: &str) -> Vec<String> {
    let mut targets = Vec::new();
    for name in architectures.split(',').map(str::trim) {
        let digits = name.trim_end_matches(['a', 'f']);
        assert!(
            digits.len() >= 2 && digits.bytes().all(|byte| byte.is_ascii_digit()),
            "{ARCHITECTURES}: `{name}` is no compute capability such as 80 or 90a"
        );
        targets.push(format!("-gencode=arch=compute_{name},code=sm_{name}"));
    }
    if architectures == ARCHITECTURES_DEFAULT {
        targets.push("-gencode=arch=compute_120,code=compute_120".to_owned());
    }
    targets
}

/// The table of modules, which the crate includes.
fn modules(units: &[Unit]) -> String {
    let entries: String = units
        .iter()
        .map(|unit| {
            let (name, path) = (sources::stem(&unit.source), unit.target.display().to_string());
            format!("    ({name:?}, &Aligned(*include_bytes!({path:?}))),\n")
        })
        .collect();
    format!("static MODULES: &[(&str, &Aligned<[u8]>)] = &[\n{entries}];\n")
}

/// What the command prints, on either stream.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}
