use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kernels::DType;
use kernels::cuda::Gpu;
use proto::units::BlockCount;

use super::Report;
use super::checkpoints::Checkpoints;
use super::model;
use super::patient::Patient;
use crate::backend::{Cuda, Device};
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::engine::commands::BLOCK_SIZE;
use crate::model::{Blueprint, LoadOptions, WeightOrigin};
use crate::plan::{Assumptions, MemoryPlan, run_largest_step};
use crate::weights::Partition;

/// A Llama whose weights, cache and activations each take many of a driver's pages. Its weights are random.
const LARGE: &str = r#"{
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

/// The same for an emulated GPU, which takes its time.
const SMALL: &str = r#"{
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

/// Fixtures whose layers are of different kinds.
const FIXTURES: [&str; 5] = ["llama", "mixtral_split", "deepseek_v3", "gpt2", "dbrx"];

const DTYPE: DType = DType::BF16;

/// A driver hands out memory in pages of this size: the last one of a buffer may be all but empty.
const PAGE_BYTES: u64 = 2 << 20;

/// What is loaded, and what the largest step of it is.
#[derive(Clone)]
struct Case {
    name: String,
    directory: PathBuf,
    options: LoadOptions,
    tokens: usize,
    requests: usize,
}

/// What a model should take and what it has taken, in bytes.
struct Weighed {
    plan: MemoryPlan,
    cache: u64,
    taken: u64,
    /// Buffers that it consists of.
    buffers: u64,
    /// What the driver and its libraries took for themselves when the step ran for the first time.
    libraries: u64,
}

/// What models take of the GPU's memory, against what the plan says before.
pub(super) fn check(
    patient: &mut Patient,
    checkpoints: Option<&Checkpoints>,
    seed: u64,
    report: &mut Report<'_>,
) {
    report.table(&[
        "memory, in MiB",
        "planned: weights",
        "cache",
        "step",
        "all",
        "taken",
        "rounding to pages, at most",
        "by libraries, once",
        "ms",
    ]);
    let emulated = patient.gpu().properties().capability == (0, 0);
    let page = if emulated { 0 } else { PAGE_BYTES };
    let llama = match model::directory(if emulated { SMALL } else { LARGE }) {
        Ok(directory) => directory,
        Err(error) => return report.wrong(format!("memory: {error:#}")),
    };
    for case in cases(llama.path(), checkpoints, seed, emulated) {
        let (begin, theirs) = (Instant::now(), case.clone());
        let what = format!("memory of {}", case.name);
        let found = patient.run(&what, move |gpu| theirs.weigh(gpu));
        let Some(Weighed { plan, cache, taken, buffers, libraries }) = report.take(&what, found) else {
            continue;
        };
        let planned = plan.weights + cache + plan.workspace;
        let rounding = buffers * page;
        let sizes = [plan.weights, cache, plan.workspace, planned, taken, rounding, libraries].map(mebibytes);
        let milliseconds = begin.elapsed().as_millis().to_string();
        report.checked(1);
        report.row(&[&[case.name], &sizes[..], &[milliseconds]].concat());
        if taken > planned + rounding {
            report.wrong(format!("{what}: {} MiB taken, {} planned", mebibytes(taken), mebibytes(planned)));
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 20))
}

fn cases(llama: &Path, checkpoints: Option<&Checkpoints>, seed: u64, emulated: bool) -> Vec<Case> {
    let (tokens, requests) = if emulated { (40, 3) } else { (4096, 128) };
    let options = LoadOptions { weights: WeightOrigin::Random(seed), ..LoadOptions::default() };
    let mut cases =
        vec![Case { name: "Llama".to_owned(), directory: llama.to_owned(), options, tokens, requests }];
    let fixtures = checkpoints.into_iter().flat_map(|checkpoints| &checkpoints.fixtures);
    for fixture in fixtures.filter(|fixture| fixture.adapter.is_none()) {
        let name = fixture.checkpoint_name();
        if FIXTURES.contains(&name.as_str()) {
            let (directory, options) = (fixture.checkpoint.clone(), LoadOptions::default());
            cases.push(Case { name, directory, options, tokens, requests });
        }
    }
    cases
}

impl Case {
    fn weigh(&self, gpu: &Arc<Gpu>) -> anyhow::Result<Weighed> {
        let blueprint = Blueprint::read(&self.directory, 1, None)?;
        let assumptions = Assumptions {
            partition: Partition::WHOLE,
            dtype: DTYPE,
            cache: DTYPE.into(),
            tokens: self.tokens,
            requests: self.requests,
        };
        let plan = MemoryPlan::make(&blueprint, &self.options, assumptions)?;
        // Kernels are loaded when they first run, and libraries open with them.
        let before = taken(gpu)?;
        self.take(gpu, &blueprint)?;
        let libraries = taken(gpu)?.saturating_sub(before);
        let (taken, buffers, blocks) = self.take(gpu, &blueprint)?;
        Ok(Weighed { plan, cache: plan.block * u64::from(blocks.0), taken, buffers, libraries })
    }

    /// Loads the model, makes a cache and runs the largest step: the bytes and the buffers that are taken then, and the
    /// blocks of the cache.
    fn take(&self, gpu: &Arc<Gpu>, blueprint: &Blueprint) -> anyhow::Result<(u64, u64, BlockCount)> {
        let (before, buffers_before) = (taken(gpu)?, gpu.buffers());
        let device = Device::Cuda(Arc::new(Cuda::new(gpu.clone(), DTYPE, DTYPE.into())?));
        let mut model = blueprint.load(&self.options, device.clone(), Ranks::alone(), |_| ())?;
        let length = model.shape().positions_max.min(self.tokens);
        let blocks_each = length.div_ceil(BLOCK_SIZE.get() as usize);
        let blocks = BlockCount((self.tokens.div_ceil(length) * blocks_each) as u32);
        let mut cache = PagedKv::new(&device, model.shape().kv, blocks, BLOCK_SIZE)?;
        run_largest_step(&mut *model, &mut cache, self.tokens, self.requests)?;
        gpu.synchronize()?;
        let buffers = gpu.buffers().saturating_sub(buffers_before) as u64;
        Ok((taken(gpu)?.saturating_sub(before), buffers, blocks))
    }
}

/// Bytes of the GPU's memory that somebody has.
fn taken(gpu: &Gpu) -> anyhow::Result<u64> {
    let memory = gpu.memory()?;
    Ok(memory.total.saturating_sub(memory.free) as u64)
}
