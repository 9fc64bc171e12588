use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use kernels::cuda::checks::{self, Family, Finding};
use kernels::cuda::{Gpu, Schedule};

/// Makes of this program one that runs the checks of the family that follows, with the library that follows.
pub(crate) const FLAG: &str = "--run-checks-of";

/// For all schedules of a family, in seconds of a processor's time, since others may be using it too. A fault may make
/// kernels run for ever.
const SECONDS_MAX: u64 = 40;
/// For a child that waits for something.
const WAIT_MAX: Duration = Duration::from_secs(900);
const SCHEDULES: [Schedule; 4] =
    [Schedule::Forward, Schedule::Random(1), Schedule::Random(2), Schedule::Random(3)];

// Exit codes of the child. Any other is a crash.
const PASSED: u8 = 0;
const NOTICED: u8 = 10;
const NOT_RUN: u8 = 11;

/// What the checks make of a library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    /// A check failed, or the device did: which, and under which schedule.
    Failed(String),
    Crashed(String),
    TimeLimit,
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => formatter.write_str("every check passes"),
            Self::Failed(reason) => formatter.write_str(reason),
            Self::Crashed(reason) => write!(formatter, "crash: {reason}"),
            Self::TimeLimit => write!(formatter, "not done after {SECONDS_MAX} seconds"),
        }
    }
}

/// Has a process of its own run the checks of a family with a library's kernels.
pub(crate) fn judge(family: &str, library: &Path) -> Verdict {
    let (out, errors) = (library.with_extension("out"), library.with_extension("errors"));
    let write = |path: &Path| File::create(path).expect("a temporary folder that can be written");
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut command = Command::new(std::env::current_exe().expect("a program that runs has a file"));
    command.args([FLAG, family]).arg(library).stdout(write(&out)).stderr(write(&errors));
    let mut child = command.spawn().expect("this program starts again");
    let Some(status) = wait(&mut child) else { return Verdict::TimeLimit };
    match status.code() {
        Some(code) if code == i32::from(PASSED) => Verdict::Passed,
        Some(code) if code == i32::from(NOTICED) => Verdict::Failed(read(&out).trim().to_owned()),
        Some(code) if code == i32::from(NOT_RUN) => panic!("{family}: {}", read(&out)),
        None if status.signal() == Some(SIGXCPU) => Verdict::TimeLimit,
        _ => Verdict::Crashed(format!("{status} {}", read(&errors).trim())),
    }
}

/// Ends the child when its time is over.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let end = Instant::now() + WAIT_MAX;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().expect("a child of this process") {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
    // It may have ended by itself in this moment.
    let _ = child.kill();
    child.wait().expect("a child of this process");
    None
}

/// What the child does.
pub(crate) fn main(family: &str, library: &str) -> ExitCode {
    let found = checks::FAMILIES.iter().find(|(name, _)| *name == family);
    let found = found.ok_or_else(|| "there is no family of this name".to_owned());
    match limit_time().and(found).and_then(|(_, run)| load(library).map(|()| *run)) {
        Err(reason) => {
            println!("{reason}");
            ExitCode::from(NOT_RUN)
        }
        Ok(run) => match SCHEDULES.into_iter().find_map(|schedule| fault(run, schedule)) {
            Some(reason) => {
                println!("{reason}");
                ExitCode::from(NOTICED)
            }
            None => ExitCode::from(PASSED),
        },
    }
}

fn fault(run: Family, schedule: Schedule) -> Option<String> {
    let reason = match checks::run(&Gpu::emulated(schedule), run, 20_251_125) {
        Err(error) => error.to_string(),
        Ok(findings) => findings.iter().find(|finding| !finding.passes()).map(Finding::to_string)?,
    };
    Some(format!("{schedule:?}: {reason}"))
}

const SIGXCPU: c_int = 24;

unsafe extern "C" {
    fn setrlimit(resource: c_int, soft_and_hard: *const [u64; 2]) -> c_int;
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

/// From here on, this process has so much of a processor's time, and ends by a signal when it is over.
fn limit_time() -> Result<(), String> {
    const PROCESSOR_TIME: c_int = 0;
    // SAFETY: two numbers, which are read only.
    if unsafe { setrlimit(PROCESSOR_TIME, &[SECONDS_MAX, SECONDS_MAX + 1]) } == 0 {
        Ok(())
    } else {
        Err("there is no limit of the processor's time".to_owned())
    }
}

/// Loads the library, whose kernels take the place of the executable's.
fn load(library: &str) -> Result<(), String> {
    const NOW: c_int = 2;
    let path = CString::new(library).map_err(|error| error.to_string())?;
    // SAFETY: a zero-terminated path; what runs on loading enlists kernels.
    if unsafe { dlopen(path.as_ptr(), NOW) }.is_null() {
        // SAFETY: after a failure there is a zero-terminated text.
        return Err(unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy().into_owned());
    }
    Ok(())
}
