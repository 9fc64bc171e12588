//! What the compilers made of the kernels: slow paths that no wrong result would show. Needs no GPU.
//!
//! Where a disassembler is found (`cuobjdump`: by the environment variable `CUOBJDUMP`, beside nvcc, or in the search path;
//! pip has it as `nvidia-cuda-cuobjdump` and `nvidia-cuda-nvdisasm`), its view is tested too.
#![cfg(feature = "cuda")]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kernels::cuda::Gpu;

/// Where the build has put the fatbins, and beside each what the assembler said.
const FATBINS: &str = env!("KERNEL_FATBINS");

/// Kernels that may keep local memory, by the beginning of their name, the most bytes, and why.
const STACK_FRAMES: &[(&str, u64, &str)] = &[];

/// Kernels that must multiply on tensor cores: the beginning of their names, and what names among them are for others.
const TENSOR_CORES: &[(&str, &[&str])] = &[
    ("attention_decode", &["_f32"]),
    ("attention_prefill", &["_f32"]),
    ("gemm", &["_f32"]),
    ("experts_gate_up", &["_f32", "_few"]),
    ("experts_down", &["_f32", "_few"]),
];

/// What the assembler says of a kernel on an architecture.
#[derive(Debug, Default)]
struct Resources {
    stack_bytes: u64,
    spill_bytes: u64,
    registers: u64,
}

/// By kernel and architecture.
type Table = BTreeMap<(String, String), Resources>;

fn files_with(ending: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(FATBINS).expect("the build's folder").map(|entry| entry.expect("a file").path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
    files.sort();
    assert!(!files.is_empty(), "no {ending} in {FATBINS}");
    files
}

/// Reads what `ptxas -v` prints. Panics when it prints something else.
fn resources(path: &Path) -> Table {
    let text = fs::read_to_string(path).expect("a readable file");
    let mut table = Table::new();
    let mut current = None;
    for line in text.lines() {
        assert!(!line.to_lowercase().contains("warning"), "{}: {line}", path.display());
        let mut quoted = line.split('\'').skip(1).step_by(2).map(str::to_owned);
        if line.contains("Compiling entry function") {
            let (name, architecture) = (quoted.next(), quoted.next());
            let key = (name.expect("a kernel's name"), architecture.expect("its architecture"));
            table.insert(key.clone(), Resources::default());
            current = Some(key);
            continue;
        }
        let Some(resources) = current.as_ref().and_then(|key| table.get_mut(key)) else { continue };
        // "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", also of functions that it calls.
        for part in line.split(',') {
            if let Some(bytes) = number_before(part, "bytes stack frame") {
                resources.stack_bytes += bytes;
            }
            for spilled in ["bytes spill stores", "bytes spill loads"] {
                resources.spill_bytes += number_before(part, spilled).unwrap_or(0);
            }
        }
        if let Some(registers) = number_before(line, "registers") {
            resources.registers = registers;
        }
    }
    table
}

/// The number in front of these words.
fn number_before(text: &str, words: &str) -> Option<u64> {
    let (before, _) = text.split_once(words)?;
    before.split_whitespace().last()?.parse().ok()
}

fn all_resources() -> Table {
    let table: Table = files_with("resources").iter().flat_map(|path| resources(path)).collect();
    let unread: Vec<_> = table.iter().filter(|(_, resources)| resources.registers == 0).collect();
    assert!(!table.is_empty() && unread.is_empty(), "the assembler's words have changed: {unread:#?}");
    table
}

#[test]
fn no_kernel_spills_registers_or_keeps_local_memory() {
    let allowed = |name: &str| {
        STACK_FRAMES.iter().find(|(prefix, _, _)| name.starts_with(prefix)).map_or(0, |(_, bytes, _)| *bytes)
    };
    let table = all_resources();
    let wrong: Vec<_> = table
        .iter()
        .filter(|((name, _), found)| found.spill_bytes > 0 || found.stack_bytes > allowed(name))
        .collect();
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), table.len());
    for (prefix, _, why) in STACK_FRAMES {
        assert!(!why.is_empty() && table.keys().any(|(name, _)| name.starts_with(prefix)), "{prefix}");
    }
}

#[test]
fn every_kernel_is_there_for_every_architecture() {
    let table = all_resources();
    let architectures: std::collections::BTreeSet<_> =
        table.keys().map(|(_, architecture)| architecture).collect();
    for (name, _) in table.keys() {
        for architecture in &architectures {
            assert!(
                table.contains_key(&(name.clone(), (*architecture).clone())),
                "{name} for {architecture}"
            );
        }
    }
}

/// The disassembler, if there is one.
fn disassembler() -> Option<PathBuf> {
    let path = |variable: &str| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(tool) = path("CUOBJDUMP") {
        return Some(tool);
    }
    let beside = path("NVCC").and_then(|nvcc| nvcc.parent().map(Path::to_owned));
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path).map(|home| home.join("bin"));
    let environments = path("VIRTUAL_ENV").into_iter().chain([PathBuf::from("../.venv-cuda")]);
    let installed = environments.flat_map(|environment| {
        let versions = fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
        versions.map(|version| version.path().join("site-packages/nvidia/cu13/bin"))
    });
    let search = path("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let mut folders = beside.into_iter().chain(toolkits).chain(installed).chain(search);
    folders.find_map(|folder| Some(folder.join("cuobjdump")).filter(|tool| tool.is_file()))
}

/// What it prints. None where there is none, which is said.
fn dump(option: &str, fatbin: &Path) -> Option<String> {
    let Some(tool) = disassembler() else {
        eprintln!("no cuobjdump: not tested");
        return None;
    };
    // It looks for nvdisasm in the search path, and both come together.
    let beside = tool.parent().map(Path::to_owned);
    let search = env::var_os("PATH").unwrap_or_default();
    let search = env::join_paths(beside.into_iter().chain(env::split_paths(&search))).expect("a search path");
    let output = Command::new(&tool).arg(option).arg(fatbin).env("PATH", search).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", tool.display()));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {option} {}: {errors}", tool.display(), fatbin.display());
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Kernels whose names begin so, and contain none of the rest.
fn needs_tensor_cores(name: &str) -> bool {
    let mut patterns = TENSOR_CORES.iter();
    patterns
        .any(|(prefix, others)| name.starts_with(prefix) && !others.iter().any(|part| name.contains(part)))
}

#[test]
fn large_products_run_on_tensor_cores() {
    let (mut architecture, mut seen) = (String::new(), 0);
    for fatbin in files_with("fatbin") {
        let stem = fatbin.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        // Disassembling everything takes long; kernels are named as their file is.
        if !TENSOR_CORES.iter().any(|(prefix, _)| prefix.starts_with(stem) || stem.starts_with(prefix)) {
            continue;
        }
        let Some(text) = dump("-sass", &fatbin) else { return };
        let mut current: Option<(String, bool)> = None;
        let mut judge = |ended: Option<(String, bool)>, architecture: &str| {
            if let Some((name, multiplies)) = ended.filter(|(name, _)| needs_tensor_cores(name)) {
                assert!(multiplies, "{name} for {architecture} has no HMMA");
                seen += 1;
            }
        };
        for line in text.lines() {
            if let Some((_, name)) = line.split_once("arch = ") {
                judge(current.take(), &architecture);
                architecture = name.trim().to_owned();
            } else if let Some((_, name)) = line.split_once("Function : ") {
                judge(current.take(), &architecture);
                current = Some((name.trim().to_owned(), false));
            } else if let Some((_, multiplies)) = &mut current {
                *multiplies |= line.contains("HMMA");
            }
        }
        judge(current, &architecture);
    }
    let expected = all_resources().keys().filter(|(name, _)| needs_tensor_cores(name)).count();
    assert_eq!(seen, expected, "kernels that were found in the assembler's report");
}

/// Registers of a multiprocessor, which a block's threads share; they are given out in eights.
const REGISTERS: u64 = 64 << 10;

/// A number as the disassembler writes it.
fn hexadecimal(text: &str) -> u64 {
    let digits = text.trim().trim_start_matches("0x");
    u64::from_str_radix(digits, 16).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Of each kernel and architecture, the threads that it is compiled for: its launch bounds.
fn launch_bounds(text: &str) -> BTreeMap<(String, String), u64> {
    let (mut architecture, mut kernel, mut attribute) = ("", "", "");
    let mut bounds = BTreeMap::new();
    for line in text.lines() {
        if let Some((_, name)) = line.split_once("arch = ") {
            architecture = name.trim();
        } else if let Some(name) = line.strip_prefix(".nv.info.") {
            kernel = name.trim();
        } else if let Some((_, name)) = line.split_once("Attribute:") {
            attribute = name.trim();
        } else if let Some((_, value)) = line.split_once("Value:")
            && attribute == "EIATTR_MAX_THREADS"
        {
            let threads = value.split_whitespace().map(hexadecimal).product();
            bounds.insert((kernel.to_owned(), architecture.to_owned()), threads);
        }
    }
    bounds
}

#[test]
fn a_block_of_as_many_threads_as_a_kernel_says_finds_its_registers() {
    let table = all_resources();
    let mut bounds = BTreeMap::new();
    for fatbin in files_with("fatbin") {
        let Some(text) = dump("-elf", &fatbin) else { return };
        bounds.extend(launch_bounds(&text));
    }
    for (kernel, Resources { registers, .. }) in &table {
        // Without, the compiler guesses, and a launch may fail.
        let threads = bounds.get(kernel).unwrap_or_else(|| panic!("{kernel:?} has no launch bounds"));
        let needed = registers.next_multiple_of(8) * threads;
        assert!(needed <= REGISTERS, "{kernel:?}: {threads} threads of {registers} registers");
    }
}

#[test]
fn a_machine_without_a_driver_is_told_so_in_one_line() {
    let Err(error) = Gpu::open(0) else { return };
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    // SAFETY: it only tries to load the library.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        assert_eq!(text, "open GPU: there is no CUDA driver on this machine (libcuda.so.1)");
    }
}
