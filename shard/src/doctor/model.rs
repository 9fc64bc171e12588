use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use kernels::cuda::Gpu;
use kernels::{DType, Sequence};
use proto::units::{BlockCount, BlockSize};

use super::Report;
use crate::backend::{Cuda, Device};
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::model::{Blueprint, LoadOptions, Model, StepInput, WeightOrigin};

/// A Llama with heads of the usual size. Its weights are random.
const CONFIG: &str = r#"{
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

const VOCABULARY: usize = 1000;
const BLOCK_SIZE: BlockSize = BlockSize::new(16).expect("sixteen is not zero");

/// Lengths of the prompts: one token, part of a block, several blocks and tiles.
const PROMPTS: [usize; 3] = [1, 13, 100];

/// Tokens that follow.
const STEPS: usize = 3;

/// Largest root-mean-square error of logits relative to theirs, by what a type rounds away in so many layers.
const BOUNDS: [(DType, f64); 3] = [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 6e-2)];

/// The same model on the CPU and on the GPU, in every type.
pub(super) fn check(gpu: &Arc<Gpu>, seed: u64, report: &mut Report) -> anyhow::Result<()> {
    let directory = tempfile::tempdir().context("a directory for the model's configuration")?;
    std::fs::write(directory.path().join("config.json"), CONFIG).context("the model's configuration")?;
    let expected = logits(directory.path(), Device::cpu(NonZeroUsize::MIN)?, seed)?;
    report.table(&["model", "logits", "largest error, as a share of its bound", "ms"]);
    for (dtype, bound) in BOUNDS {
        let device = Device::Cuda(Arc::new(Cuda::new(gpu.clone(), dtype, dtype.into())?));
        let begin = Instant::now();
        let found = logits(directory.path(), device, seed)?;
        let errors = expected.iter().zip(&found).map(|(expected, found)| relative_error(expected, found));
        // NaN is the worst of all.
        let worst = errors.fold(0.0, |worst: f64, error| if error <= worst { worst } else { error }) / bound;
        let name = format!("Llama, {dtype:?}");
        let milliseconds = begin.elapsed().as_millis();
        report.row(&[name.clone(), found.len().to_string(), format!("{worst:.3}"), milliseconds.to_string()]);
        let is_close = worst <= 1.0;
        if !is_close || found.len() != expected.len() {
            report.wrong(format!("{name}: logits are off by {worst:.3} of what is allowed"));
        }
    }
    Ok(())
}

/// Rows of logits of all prompts together, and of the tokens that follow, which are the same on every device.
fn logits(directory: &Path, device: Device, seed: u64) -> anyhow::Result<Vec<Vec<f32>>> {
    let options = LoadOptions { weights: WeightOrigin::Random(seed), ..LoadOptions::default() };
    let mut model =
        Blueprint::read(directory, 1, None)?.load(&options, device.clone(), Ranks::alone(), |_| ())?;
    let blocks = (PROMPTS.iter().max().copied().unwrap_or(0) + STEPS).div_ceil(BLOCK_SIZE.get() as usize);
    let blocks_all = BlockCount((blocks * PROMPTS.len()) as u32);
    let mut cache = PagedKv::new(&device, model.shape().kv, blocks_all, BLOCK_SIZE)?;
    // Blocks of the requests take turns.
    let slots: Vec<Vec<u32>> = (0..PROMPTS.len())
        .map(|request| {
            (0..blocks * BLOCK_SIZE.get() as usize)
                .map(|position| {
                    let (block, offset) =
                        (position as u32 / BLOCK_SIZE.get(), position as u32 % BLOCK_SIZE.get());
                    (block * PROMPTS.len() as u32 + request as u32) * BLOCK_SIZE.get() + offset
                })
                .collect()
        })
        .collect();
    let mut rows = Vec::new();
    let mut lengths = [0; PROMPTS.len()];
    for step in 0..=STEPS {
        let counts = if step == 0 { PROMPTS } else { [1; PROMPTS.len()] };
        rows.extend(forward(model.as_mut(), &mut cache, &slots, &mut lengths, counts)?);
    }
    Ok(rows)
}

/// Computes the next tokens of every request; the logits behind the last of each.
fn forward(
    model: &mut dyn Model,
    cache: &mut PagedKv,
    slots: &[Vec<u32>],
    lengths: &mut [usize],
    counts: [usize; PROMPTS.len()],
) -> anyhow::Result<Vec<Vec<f32>>> {
    let (mut ids, mut positions, mut step_slots) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sequences, mut logits_at) = (Vec::new(), Vec::new());
    for (request, (length, count)) in lengths.iter_mut().zip(counts).enumerate() {
        let (start, first) = (*length, ids.len());
        *length += count;
        for position in start..*length {
            ids.push((position * 37 + request * 101 + 5) as u32 % VOCABULARY as u32);
            positions.push(position as u32);
        }
        step_slots.extend_from_slice(&slots[request][start..*length]);
        sequences.push(Sequence { rows: first..ids.len(), start, slots: &slots[request] });
        logits_at.push(ids.len() as u32 - 1);
    }
    let input = StepInput {
        ids: &ids,
        positions: &positions,
        lengths: &positions,
        slots: &step_slots,
        sequences: &sequences,
        block_size: BLOCK_SIZE.get() as usize,
        logits_at: &logits_at,
        adapters: &[],
    };
    let logits = model.forward(&input, cache)?;
    Ok(logits.read()?.chunks(VOCABULARY).map(<[f32]>::to_vec).collect())
}

/// Of a row, in the root-mean-square norm.
fn relative_error(expected: &[f32], found: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let mut differences =
        expected.iter().zip(found).map(|(expected, found)| f64::from(*found) - f64::from(*expected));
    let difference = squares(&mut differences);
    let size = squares(&mut expected.iter().map(|value| f64::from(*value)));
    if found.len() == expected.len() { (difference / size).sqrt() } else { f64::INFINITY }
}
