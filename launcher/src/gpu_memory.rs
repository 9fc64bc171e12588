//! What a model takes of a GPU's memory, as a shard plans it. `--plan` prints it; the shard is asked in a process of its
//! own, as it would run.

use std::fmt::{self, Display};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::model::ModelSource;
use crate::plan::{LaunchPlan, PlanInput};

/// In bytes, of each shard.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct GpuMemory {
    weights: u64,
    workspace: u64,
    cache_block: u64,
    block_tokens: u64,
    /// Of the GPU, where there is one.
    total: Option<u64>,
}

impl GpuMemory {
    /// Asks a shard. Errors with its one line when there is no plan.
    pub fn ask(input: PlanInput<'_>, plan: &LaunchPlan) -> Result<Self, String> {
        let (args, values) = (input.args, &plan.values);
        let mut command = Command::new(&input.machine.executable);
        command.args(["shard", "plan"]).arg(&values.model_directory.value);
        command.args(["--world-size", &values.shard_count.value.to_string()]);
        command.args([
            "--max-batch-prefill-tokens",
            &values.limits.max_batch_prefill_tokens.value.to_string(),
            "--max-concurrent-requests",
            &args.max_concurrent_requests.to_string(),
            "--load-format",
            &args.load_format,
        ]);
        let given = [("--dtype", &args.dtype), ("--kv-cache-dtype", &args.kv_cache_dtype)];
        for (flag, value) in given {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                command.args([flag, value]);
            }
        }
        let output = command.output().map_err(|error| format!("the shard does not start: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("the shard's plan: {error}"))
    }

    /// Whether the model's files are there to plan with.
    pub fn can_be_asked(input: PlanInput<'_>, plan: &LaunchPlan) -> bool {
        let embedded = input.model.source == ModelSource::Embedded;
        plan.values.device.value != "cpu" && !embedded && plan.downloads.is_empty()
    }
}

impl Display for GpuMemory {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
        writeln!(formatter, "\nGPU memory of each shard, besides the driver's")?;
        writeln!(formatter, "  weights    {:>12}", mib(self.weights))?;
        writeln!(formatter, "  workspace  {:>12}  of the largest prefill", mib(self.workspace))?;
        let tokens = self.block_tokens;
        writeln!(
            formatter,
            "  cache      {:>12}  for each {tokens} tokens",
            format!("{} KiB", self.cache_block >> 10)
        )?;
        match self.total {
            Some(total) => writeln!(formatter, "  GPU        {:>12}", mib(total)),
            None => writeln!(formatter, "  GPU        {:>12}  none is here", "unknown"),
        }
    }
}
