//! `doctor`: what this machine can do, and whether what it computes is right.
//!
//! - `report.rs`: the tables that it prints
//! - `patient.rs`: the GPU, and what to do when it does not answer; `device.rs`: which one it is
//! - `families.rs`: every kernel against its definition
//! - `model.rs`: a small model on the GPU against the same model on the CPU
//! - [`fixtures`]: checkpoints of every family with the answers of the reference library, which tests hold the CPU to as well;
//!   `checkpoints.rs`: all of them on the GPU
//! - `memory.rs`: what models take of its memory, against the plan
//! - `ranks/`: two ranks that exchange numbers
//! - [`runner`]: drives a model as the engine does
//!
//! One command answers everything, because a GPU may be at hand for minutes only: `doctor --gpu`. Its output is Markdown,
//! to be kept, and each row is written as soon as it is known. The exit code is 1 when something is wrong.
//!
//! Invariants:
//!
//! - Whatever a part runs into (an error, a panic, work without an end) is a finding, and the other parts run.
//! - What has not been checked is said to be not checked.

#[cfg(feature = "gpu")]
mod checkpoints;
#[cfg(feature = "gpu")]
mod device;
#[cfg(feature = "gpu")]
mod families;
pub mod fixtures;
#[cfg(feature = "gpu")]
mod memory;
#[cfg(feature = "gpu")]
mod model;
#[cfg(feature = "gpu")]
mod patient;
#[cfg(feature = "gpu")]
mod ranks;
#[cfg(feature = "gpu")]
mod report;
pub mod runner;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

#[cfg(feature = "gpu")]
use report::Report;

/// Finds out what this machine can do, and whether what it computes is right.
#[derive(Debug, Parser)]
#[command(name = "doctor", version)]
pub struct Args {
    /// Check the GPU: kernels against their definitions, models against the CPU and against what is expected of them, memory
    /// against the plan, and ranks against each other
    #[arg(long, required = true)]
    pub gpu: bool,
    /// Number of the GPU among those that CUDA_VISIBLE_DEVICES leaves visible; where there is another, ranks use both
    #[arg(long, default_value_t = 0)]
    pub number: u32,
    /// Directory of the checkpoints whose answers are known: integration-tests/fixtures of the repository [default: none, and
    /// they are not checked]
    #[arg(long, value_name = "DIR")]
    pub fixtures: Option<PathBuf>,
    /// Only these fixtures, with their adapters; may be repeated [default: all]
    #[arg(long, value_name = "NAME", requires = "fixtures")]
    pub fixture: Vec<String>,
    /// Only these parts; may be repeated [default: all]
    #[arg(long, value_enum)]
    pub part: Vec<Part>,
    /// Only these families of kernels, and no other part unless --part names it; may be repeated [default: all]
    #[arg(long)]
    pub family: Vec<String>,
    /// Seed of the random inputs; that of the tests, if absent
    #[arg(long, default_value_t = 20_251_125)]
    pub seed: u64,
    /// Longest time for a family, a fixture in one type, a model or two ranks: what takes longer is wrong, and the GPU is given
    /// up [default: 60, and 600 where it is emulated]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub time_limit: Option<u64>,
    /// Not the GPU, but the emulated one
    #[cfg(feature = "emulation")]
    #[arg(long)]
    pub emulated: bool,
    /// Be one of two ranks; not for people
    #[arg(long, hide = true)]
    pub as_rank: Option<String>,
}

/// What is examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Every kernel in every type against its definition in float64
    Kernels,
    /// A small model against the CPU
    Model,
    /// Checkpoints of every family against their expected answers, and against the CPU
    Fixtures,
    /// What models take of the GPU's memory, against the plan
    Memory,
    /// Two ranks as threads and as processes, connected in every way that there is
    Ranks,
}

/// Runs the doctor as if started with these arguments, the program's name first. What it finds is on standard output.
pub fn run_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(help_or_mistake) => {
            // Nobody is left to be told when standard output is closed.
            drop(help_or_mistake.print());
            return ExitCode::from(help_or_mistake.exit_code() as u8);
        }
    };
    #[cfg(feature = "gpu")]
    if let Some(task) = &args.as_rank {
        return ranks::run_as_rank(task);
    }
    match examine(&args, &mut io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            drop(writeln!(io::stderr(), "Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "gpu"))]
fn examine(_: &Args, _: &mut dyn Write) -> anyhow::Result<bool> {
    anyhow::bail!("this program was built without CUDA (feature `cuda`): it has no kernels to check")
}

/// Whether all is well. Errors when there is nothing to examine.
#[cfg(feature = "gpu")]
fn examine(args: &Args, out: &mut dyn Write) -> anyhow::Result<bool> {
    use checkpoints::Checkpoints;

    const NO_FIXTURES: &str = "--fixtures does not say where they are";
    let families = families::chosen(&args.family)?;
    let checkpoints =
        args.fixtures.as_deref().map(|root| Checkpoints::read(root, &args.fixture)).transpose()?;
    let gpu = device::open(args)?;
    let mut report = Report::new(out, "GPU");
    device::describe(&gpu, &mut report)?;
    let mut patient = patient::Patient::new(gpu, args.limit());
    for part in Part::value_variants().iter().filter(|part| args.wants(**part)) {
        let name = format!("{part:?}").to_lowercase();
        let lost = patient.lost().filter(|_| *part != Part::Ranks);
        let no_fixtures = *part == Part::Fixtures && checkpoints.is_none();
        if let Some(reason) = lost.or_else(|| no_fixtures.then(|| NO_FIXTURES.to_owned())) {
            report.left_out(&name, &reason);
            continue;
        }
        report.part(&name, |report| match part {
            Part::Kernels => families::check(&mut patient, &families, args.seed, report),
            Part::Model => model::check(&mut patient, args.seed, report),
            Part::Fixtures => checkpoints.iter().for_each(|all| all.check(&mut patient, report)),
            Part::Memory => memory::check(&mut patient, checkpoints.as_ref(), args.seed, report),
            Part::Ranks => ranks::check(&mut patient, args, report),
        });
    }
    Ok(report.finish())
}

#[cfg(feature = "gpu")]
impl Args {
    fn wants(&self, part: Part) -> bool {
        match (self.part.is_empty(), self.family.is_empty()) {
            (true, true) => true,
            (true, false) => part == Part::Kernels,
            (false, _) => self.part.contains(&part),
        }
    }

    fn limit(&self) -> std::time::Duration {
        let default = if self.is_emulated() { 600 } else { 60 };
        std::time::Duration::from_secs(self.time_limit.unwrap_or(default))
    }

    fn is_emulated(&self) -> bool {
        #[cfg(feature = "emulation")]
        return self.emulated;
        #[cfg(not(feature = "emulation"))]
        false
    }
}
