//! One command starts everything: the shards, then the router, all of them this program again.
//!
//! The way of a start: `args` (what the user typed), `env` and `search` (what is there), `plan` (what follows from it),
//! `run_dir` and `demo` (files that the children need), `supervise` (download, start, watch, start again, stop).
//!
//! Invariants:
//! - `plan` is pure and is all that `supervise` executes, so what `--plan` prints is what would run.
//! - No child outlives the launcher, however that ends: each is killed on drop and by the kernel (`tether`).
//! - Keys are in no log, no plan and no argument list (`secret`).
//! - Nothing below `run_from` reads the environment, except `env`, clap in `args` and `download`, and `hub`'s own
//!   configuration.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use telemetry::LogFormat;
use tracing::level_filters::LevelFilter;
use tracing::{info, warn};

pub mod adapters;
pub mod args;
pub mod demo;
pub mod download;
pub mod env;
pub mod error;
pub mod gpu_memory;
pub mod model;
pub mod model_config;
pub mod plan;
pub mod process;
pub mod run_dir;
pub mod search;
pub mod secret;
pub mod signals;
pub mod socket;
pub mod supervise;
pub mod tether;

use args::Args;
use env::{Machine, Variables};
use error::LaunchError;
use gpu_memory::GpuMemory;
use model::{Model, ModelSource};
use plan::{LaunchPlan, PlanInput};
use run_dir::RunDir;
use search::{Found, Search};
use signals::StopSignals;

/// Runs the launcher as if started with these arguments, the program's name first. Ends the process for `--help`,
/// `--version` and arguments that do not parse.
pub fn run_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match launch(&Args::parse_from(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn launch(args: &Args) -> Result<(), LaunchError> {
    let variables = Variables::read().map_err(LaunchError::Variable)?;
    let format = if args.json_output { LogFormat::Json } else { LogFormat::Text };
    let filter = variables.log_level.as_deref().unwrap_or("info");
    telemetry::init(format, filter, variables.no_color).map_err(LaunchError::LogLevel)?;
    let machine = Machine::look().map_err(system("find out where this program is"))?;
    let start =
        Start { args, variables, machine, log_level: LevelFilter::current().to_string().to_uppercase() };
    if args.plan { start.print_plan() } else { start.serve() }
}

/// What is known before anything is created or started.
struct Start<'a> {
    args: &'a Args,
    variables: Variables,
    machine: Machine,
    log_level: String,
}

impl Start<'_> {
    fn print_plan(&self) -> Result<(), LaunchError> {
        let run_dir = run_dir::likely_path(&self.machine.temporary, self.machine.pid);
        self.check_files()?;
        let found = Search::new(self.args, &run_dir).run()?;
        let plan = self.plan(&found, &run_dir)?;
        let memory = self.gpu_memory(&plan, &found, &run_dir);
        let text = match (self.args.json_output, memory) {
            (true, None) => format!("{:#}\n", plan.json()),
            (true, Some(memory)) => {
                let mut json = plan.json();
                json["gpu_memory"] = match memory {
                    Ok(memory) => serde_json::json!(memory),
                    Err(reason) => serde_json::json!({"error": reason}),
                };
                format!("{json:#}\n")
            }
            (false, None) => plan.to_string(),
            (false, Some(Ok(memory))) => format!("{plan}{memory}"),
            (false, Some(Err(reason))) => format!("{plan}\nGPU memory: {reason}\n"),
        };
        io::stdout().write_all(text.as_bytes()).map_err(system("print the plan"))
    }

    fn serve(&self) -> Result<(), LaunchError> {
        if self.args.env {
            info!("Runtime environment:\n{}", env::runtime_report());
        }
        info!("{:#?}", self.args);
        // On this thread, not on one of a pool: the kernel ties the children to the thread that starts them.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("start the runtime"))?;
        runtime.block_on(self.supervise())
    }

    async fn supervise(&self) -> Result<(), LaunchError> {
        let mut signals = StopSignals::listen().map_err(system("listen for signals"))?;
        let Machine { temporary, pid, .. } = &self.machine;
        let failed = |source| LaunchError::RunDirectory { path: temporary.clone(), source };
        run_dir::sweep(temporary, *pid);
        let run_dir = RunDir::create(temporary, *pid).map_err(failed)?;

        self.check_files()?;
        let found = tokio::select! {
            biased;
            signal = signals.next() => {
                info!("{signal}: stopping");
                return Ok(());
            }
            found = Search::new(self.args, run_dir.path()).run_in_background() => found?,
        };
        let plan = self.plan(&found, run_dir.path())?;
        let model = &found.model;
        let address = plan.values.address.value;
        socket::check_free(address).map_err(|source| LaunchError::Listen { address, source })?;
        if model.source == ModelSource::Embedded {
            demo::write_into(&model.directory).map_err(failed)?;
        }
        self.announce(model, &plan);
        supervise::run(&plan, &mut signals).await
    }

    /// Whether the files that the arguments name are there.
    fn check_files(&self) -> Result<(), LaunchError> {
        match self.args.tokenizer_config_path.as_ref().filter(|path| !path.is_file()) {
            Some(path) => Err(LaunchError::NoTokenizerConfig(path.clone())),
            None => Ok(()),
        }
    }

    fn plan(&self, found: &Found, run_dir: &Path) -> Result<LaunchPlan, LaunchError> {
        Ok(LaunchPlan::new(self.input(found, run_dir))?)
    }

    fn input<'a>(&'a self, found: &'a Found, run_dir: &'a Path) -> PlanInput<'a> {
        let Self { args, variables, machine, log_level } = self;
        let Found { model, adapters } = found;
        PlanInput { args, model, adapters, machine, variables, log_level, run_dir }
    }

    /// What the model takes of a GPU, where one computes.
    fn gpu_memory(
        &self,
        plan: &LaunchPlan,
        found: &Found,
        run_dir: &Path,
    ) -> Option<Result<GpuMemory, String>> {
        let input = self.input(found, run_dir);
        GpuMemory::can_be_asked(input, plan).then(|| GpuMemory::ask(input, plan))
    }

    /// Says what was decided, before it starts.
    fn announce(&self, model: &Model, plan: &LaunchPlan) {
        plan.warnings.iter().for_each(|warning| warn!("{warning}"));
        if model.source == ModelSource::Embedded {
            let device = plan.values.device.value;
            info!("No --model-id: serving the tiny demo model that is part of this program ({device})");
        }
        let values = &plan.values;
        if values.shard_count.value > 1 {
            info!("Sharding model on {} processes", values.shard_count.value);
        }
        let caching = if values.prefix_caching.value { "true" } else { "0" };
        info!("Using attention {} - Prefix caching {caching}", values.attention.value);
        if self.args.max_batch_prefill_tokens.is_none() {
            let prefill = &values.limits.max_batch_prefill_tokens;
            info!("Default `max-batch-prefill-tokens` to {}: {}", prefill.value, prefill.reason);
        }
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::System { what, source }
}
