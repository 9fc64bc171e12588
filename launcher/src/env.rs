//! What this machine has and what its environment says, besides the flags. The only reader of both.

use std::env::{self, VarError};
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use sysinfo::System;

/// What the children can use, and who starts them.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Cores this process may use: affinity and container limits counted.
    pub cores: usize,
    /// Memory this process may use, in bytes, container limits counted; none when the system does not tell.
    pub memory_bytes: Option<u64>,
    /// Accelerators that the environment names; none when it says nothing of them.
    pub devices: Option<VisibleDevices>,
    /// Whether the driver of NVIDIA GPUs is loaded.
    pub gpu_driver: bool,
    /// This program, which starts itself again for each child.
    pub executable: PathBuf,
    /// This process.
    pub pid: u32,
    /// Where temporary files go.
    pub temporary: PathBuf,
}

impl Machine {
    /// Looks at the machine.
    ///
    /// Errors when the path of this program cannot be found.
    pub fn look() -> io::Result<Self> {
        Ok(Self {
            cores: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            memory_bytes: memory_bytes(),
            devices: VisibleDevices::look(),
            gpu_driver: GPU_DRIVERS.iter().any(|path| Path::new(path).exists()),
            executable: env::current_exe()?,
            pid: std::process::id(),
            temporary: env::temp_dir(),
        })
    }
}

/// What the driver shows when it is loaded; the second under Windows' Linux.
const GPU_DRIVERS: [&str; 2] = ["/proc/driver/nvidia/version", "/dev/dxg"];

/// Accelerators that a variable of the environment leaves visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisibleDevices {
    /// How many.
    pub count: usize,
    /// Which variable says so.
    pub variable: &'static str,
}

impl VisibleDevices {
    /// What the first variable that is set says, be it that there are none.
    fn look() -> Option<Self> {
        let set = |variable| Some((variable, env::var_os(variable)?));
        let (variable, text) =
            ["CUDA_VISIBLE_DEVICES", NVIDIA, "ZE_AFFINITY_MASK"].into_iter().find_map(set)?;
        let count = match (variable, text.to_string_lossy().trim()) {
            // A container's words for "whatever the tool shows".
            (NVIDIA, "all" | "void") => output_of("nvidia-smi", &["--list-gpus"])?.lines().count(),
            (_, list) => listed(list),
        };
        Some(Self { count, variable })
    }
}

const NVIDIA: &str = "NVIDIA_VISIBLE_DEVICES";

/// Devices of a list with commas. An empty one and `-1` name none.
fn listed(list: &str) -> usize {
    list.split(',').filter(|device| !["", "-1"].contains(&device.trim())).count()
}

fn memory_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let total = system.total_memory();
    let limit = system.cgroup_limits().map_or(total, |limits| limits.total_memory);
    Some(total.min(limit)).filter(|bytes| *bytes > 0)
}

/// The variables that are no flag's and that the launcher minds.
#[derive(Clone, Debug, Default)]
pub struct Variables {
    /// `LOG_LEVEL`: a level or a filter expression.
    pub log_level: Option<String>,
    /// `NO_COLOR`: no colours, when it is not empty.
    pub no_color: bool,
    /// `ATTENTION`: the attention implementation asked for.
    pub attention: Option<String>,
    /// `COMPUTE_TYPE`: what the answers' header `x-compute-type` says.
    pub compute_type: Option<String>,
    /// `OMP_NUM_THREADS`: the threads that computing libraries are told to use, possibly one number per nesting level.
    pub omp_num_threads: Option<String>,
}

impl Variables {
    /// Reads them.
    ///
    /// Errors with one line that names the variable which is not UTF-8.
    pub fn read() -> Result<Self, String> {
        Ok(Self {
            log_level: variable("LOG_LEVEL")?,
            no_color: no_color(),
            attention: variable("ATTENTION")?,
            compute_type: variable("COMPUTE_TYPE")?,
            omp_num_threads: variable("OMP_NUM_THREADS")?,
        })
    }

    /// The threads that `OMP_NUM_THREADS` asks for on the outermost level; none when it is not set or no such number.
    pub fn thread_count(&self) -> Option<NonZeroUsize> {
        self.omp_num_threads.as_deref()?.split(',').next()?.trim().parse().ok()
    }
}

/// `NO_COLOR`: no colours, when it is not empty.
pub fn no_color() -> bool {
    env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// A variable's text; an empty one says nothing.
fn variable(name: &str) -> Result<Option<String>, String> {
    match env::var(name) {
        Ok(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(format!("{name} is not UTF-8 text")),
    }
}

/// What `--env` logs: what this program was built for, from and with, and what the vendor's tool says of the devices.
pub fn runtime_report() -> String {
    format!(
        "Target: {}\nVersion: {}\nCompiler: {}\nCommit: {}\nContainer label: {}\nnvidia-smi:\n{}",
        env!("TARGET_TRIPLE"),
        env!("CARGO_PKG_VERSION"),
        option_env!("COMPILER_VERSION").unwrap_or("N/A"),
        option_env!("GIT_SHA").unwrap_or("N/A"),
        option_env!("DOCKER_LABEL").unwrap_or("N/A"),
        output_of("nvidia-smi", &[]).as_deref().unwrap_or("N/A"),
    )
}

fn output_of(tool: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(tool).args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_cores_memory_and_this_program() {
        let machine = Machine::look().unwrap();
        assert!(machine.cores >= 1);
        assert!(machine.memory_bytes.is_some_and(|bytes| bytes > 1 << 20));
        assert!(machine.executable.is_file());
    }

    #[test]
    fn the_report_names_the_target_and_the_version() {
        let report = runtime_report();
        assert!(report.contains(std::env::consts::ARCH), "{report}");
        assert!(report.contains(env!("CARGO_PKG_VERSION")), "{report}");
        assert!(report.contains("nvidia-smi:\n"), "{report}");
    }

    #[test]
    fn a_tool_that_is_not_there_says_nothing() {
        assert_eq!(output_of("no-such-tool-on-this-machine", &[]), None);
    }

    #[test]
    fn devices_are_the_items_of_a_list() {
        assert_eq!(["0", "0,1", "GPU-a, GPU-b,GPU-c", "", "-1"].map(listed), [1, 2, 3, 0, 0]);
    }
}
