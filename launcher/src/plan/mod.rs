//! Arguments, model and machine become a plan: what will run, and why so. Pure: nothing here starts anything, reads a
//! file or asks the clock. `--plan` prints the very object that `supervise` executes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::adapters::Adapter;
use crate::args::Args;
use crate::env::{Machine, Variables};
use crate::model::Model;

mod adapters;
mod checks;
mod commands;
mod limits;
mod recovery;
mod shards;
mod table;
mod unserved;
mod values;

pub use adapters::{AdapterArgument, parse as parse_adapters};
pub use checks::PlanError;
pub use commands::{ChildCommand, EnvValue};
pub use limits::{Limits, TokenLimit};
pub use recovery::Recovery;
pub use values::{Bytes, Derived, Values};

/// What a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// What the user typed.
    pub args: &'a Args,
    /// The model to serve.
    pub model: &'a Model,
    /// The adapters to load at the start.
    pub adapters: &'a [Adapter],
    /// Where the children will run.
    pub machine: &'a Machine,
    /// The variables that are no flag's.
    pub variables: &'a Variables,
    /// The most talkative level of the launcher's log, such as `INFO`.
    pub log_level: &'a str,
    /// The launcher's private directory.
    pub run_dir: &'a Path,
}

/// Everything that will be started, in the order of starting.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// Every derived value with its reason.
    pub values: Values,
    /// What fetches files that are not there yet, one after the other: each has to end before anything else starts.
    pub downloads: Vec<DownloadPlan>,
    /// One shard per rank, in the order of ranks.
    pub shards: Vec<ShardPlan>,
    /// The file at which several shards meet. They take it away themselves, unless they are killed before.
    pub group: PathBuf,
    /// The router, which is started when all shards are ready.
    pub router: ChildCommand,
    /// Where the launcher listens to the router.
    pub control: PathBuf,
    /// How often in a row, without a step of the model in between, the shards are started again, and the router; 0: a child
    /// that dies is the end.
    pub restarts_max: u32,
    /// How long a child may take to end after SIGTERM.
    pub termination_timeout: Duration,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

/// The download of one repository of the Hub.
#[derive(Clone, Debug)]
pub struct DownloadPlan {
    /// The id of the model or adapter.
    pub id: String,
    /// How it is started.
    pub command: ChildCommand,
}

/// One shard.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    /// Its number among the shards, from 0.
    pub rank: usize,
    /// The socket it will listen on; the file appears when it is ready.
    pub socket: PathBuf,
    /// How it is started.
    pub command: ChildCommand,
}

impl LaunchPlan {
    /// Derives the plan.
    ///
    /// Errors when arguments contradict each other, or ask for what this version does not serve.
    pub fn new(input: PlanInput<'_>) -> Result<Self, PlanError> {
        checks::check(input)?;
        let values = Values::derive(input)?;
        let control = values::control_socket(input)?;
        Ok(Self {
            downloads: commands::downloads(input),
            shards: (0..values.shard_count.value).map(|rank| commands::shard(input, &values, rank)).collect(),
            group: shards::group_path(&values.socket_prefix.value),
            router: commands::router(input, &values, &control),
            control,
            restarts_max: values.recovery.max_shard_restarts.value,
            termination_timeout: Duration::from_secs(input.args.graceful_termination_timeout),
            warnings: unserved::warnings(input, &values),
            values,
        })
    }
}

/// What the tests of a plan start from: the demo model on a small machine.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) struct Case {
        pub(crate) args: Args,
        pub(crate) model: Model,
        pub(crate) adapters: Vec<Adapter>,
        pub(crate) machine: Machine,
        pub(crate) variables: Variables,
        pub(crate) run_dir: PathBuf,
    }

    impl Case {
        pub(crate) fn new(words: &[&str]) -> Self {
            Self {
                args: Args::parse_without_environment(words).unwrap_or_else(|error| panic!("{error}")),
                model: Model::demo(PathBuf::from("/run/tgi/demo")),
                adapters: Vec::new(),
                machine: Machine {
                    cores: 6,
                    memory_bytes: Some(8 << 30),
                    devices: None,
                    gpu_driver: false,
                    executable: PathBuf::from("/bin/launcher"),
                    pid: 4711,
                    temporary: PathBuf::from("/tmp"),
                },
                variables: Variables::default(),
                run_dir: PathBuf::from("/run/tgi"),
            }
        }

        pub(crate) fn input(&self) -> PlanInput<'_> {
            PlanInput {
                args: &self.args,
                model: &self.model,
                adapters: &self.adapters,
                machine: &self.machine,
                variables: &self.variables,
                log_level: "INFO",
                run_dir: &self.run_dir,
            }
        }

        pub(crate) fn plan(&self) -> Result<LaunchPlan, PlanError> {
            LaunchPlan::new(self.input())
        }
    }

    /// The plan for these arguments, which are expected to be fine.
    pub(crate) fn plan(words: &[&str]) -> LaunchPlan {
        Case::new(words).plan().unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// The one line that answers these arguments, which are expected not to be fine.
    pub(crate) fn refusal(words: &[&str]) -> String {
        let line = Case::new(words).plan().expect_err("the arguments are wrong").to_string();
        assert_eq!(line.lines().count(), 1, "{line}");
        line
    }
}
