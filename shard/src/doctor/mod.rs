//! `doctor`: what this machine can do, and whether what it computes is right.
//!
//! - `report.rs`: the tables that it prints
//! - `gpu.rs`: every kernel against its definition, on this GPU
//! - `model.rs`: a small model on this GPU against the same model on the CPU
//!
//! One command answers everything, because a GPU may be at hand for minutes only: `doctor --gpu`. Its output is Markdown,
//! to be kept. The exit code is 1 when something is wrong.

#[cfg(feature = "gpu")]
mod gpu;
#[cfg(feature = "gpu")]
mod model;
#[cfg(feature = "gpu")]
mod report;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

#[cfg(feature = "gpu")]
use report::Report;

/// Finds out what this machine can do, and whether what it computes is right.
#[derive(Debug, Parser)]
#[command(name = "doctor", version)]
pub struct Args {
    /// Check the GPU: every kernel against its definition, and a small model against the CPU
    #[arg(long, required = true)]
    pub gpu: bool,
    /// Number of the GPU among those that CUDA_VISIBLE_DEVICES leaves visible
    #[arg(long, default_value_t = 0)]
    pub number: u32,
    /// Only these families of kernels; may be repeated [default: all, and the model]
    #[arg(long)]
    pub family: Vec<String>,
    /// Seed of the random inputs; that of the tests, if absent
    #[arg(long, default_value_t = 20_251_125)]
    pub seed: u64,
    /// Not the GPU, but the emulated one
    #[cfg(feature = "emulation")]
    #[arg(long)]
    pub emulated: bool,
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
    match examine(&args) {
        Ok(Diagnosis { text, is_well }) => {
            let printed = io::stdout().write_all(text.as_bytes());
            if is_well && printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            drop(writeln!(io::stderr(), "Error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// What came out.
#[derive(Debug)]
struct Diagnosis {
    text: String,
    is_well: bool,
}

#[cfg(not(feature = "gpu"))]
fn examine(_: &Args) -> anyhow::Result<Diagnosis> {
    anyhow::bail!("this program was built without CUDA (feature `cuda`): it has no kernels to check")
}

#[cfg(feature = "gpu")]
fn examine(args: &Args) -> anyhow::Result<Diagnosis> {
    let gpu = gpu::open(args)?;
    let mut report = Report::new("GPU");
    gpu::describe(&gpu, &mut report)?;
    gpu::check_kernels(&gpu, args, &mut report)?;
    if args.family.is_empty() {
        model::check(&gpu, args.seed, &mut report)?;
    }
    Ok(Diagnosis { text: report.to_string(), is_well: report.is_well() })
}

#[cfg(all(test, feature = "emulation"))]
mod tests {
    use super::*;

    fn diagnosis(words: &[&str]) -> anyhow::Result<Diagnosis> {
        let words = ["doctor", "--gpu", "--emulated"].iter().chain(words);
        examine(&Args::try_parse_from(words)?)
    }

    #[test]
    fn an_emulated_gpu_is_well_and_its_report_names_what_was_checked() {
        let Diagnosis { text, is_well } = diagnosis(&[]).unwrap();
        assert!(is_well, "{text}");
        for line in ["| GPU | emulated |", "| norm |", "| attention |", "| Llama, BF16 |"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_family_that_is_not_there_is_an_error_that_lists_them() {
        let error = diagnosis(&["--family", "nrom"]).unwrap_err().to_string();
        assert!(error.contains("nrom") && error.contains("norm, "), "{error}");
    }
}
