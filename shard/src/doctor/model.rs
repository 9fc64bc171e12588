use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use kernels::DType;
use tempfile::TempDir;

use super::Report;
use super::families::worse;
use super::patient::Patient;
use super::runner::{Request, Runner};
use crate::backend::{Cuda, Device};
use crate::collective::Ranks;
use crate::model::{Blueprint, LoadOptions, WeightOrigin};

/// A Llama with heads of the usual size. Its weights are random.
const CONFIG: &str = r#"{
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
}"#;

const VOCABULARY: usize = 1000;

/// Lengths of the prompts, which are computed together: one token, part of a block, several blocks and tiles.
const PROMPTS: [usize; 3] = [1, 13, 100];

/// Tokens that follow.
const STEPS: usize = 3;

/// Largest root-mean-square error of logits relative to theirs, by what a type rounds away in so many layers.
const BOUNDS: [(DType, f64); 3] = [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 6e-2)];

/// The same model on the CPU and on the GPU, in every type.
pub(super) fn check(patient: &mut Patient, seed: u64, report: &mut Report<'_>) {
    report.table(&["model", "logits", "wrong", "largest error, as a share of its bound", "ms"]);
    let expected = || -> anyhow::Result<_> {
        let directory = Arc::new(directory(CONFIG)?);
        let expected = logits(directory.path(), &Device::cpu(NonZeroUsize::MIN)?, seed)?;
        Ok((directory, Arc::new(expected)))
    };
    let (directory, expected) = match expected() {
        Ok(expected) => expected,
        Err(error) => return report.wrong(format!("Llama on the CPU: {error:#}")),
    };
    for (dtype, bound) in BOUNDS {
        let (begin, name) = (Instant::now(), format!("Llama, {dtype:?}"));
        let (directory, expected) = (directory.clone(), expected.clone());
        let found = patient.run(&name, move |gpu| {
            let device = Device::Cuda(Arc::new(Cuda::new(gpu.clone(), dtype, dtype.into())?));
            errors(&expected, &logits(directory.path(), &device, seed)?)
        });
        let Some(errors) = report.take(&name, found) else { continue };
        let shares: Vec<f64> = errors.iter().map(|error| error / bound).collect();
        let worst = shares.iter().copied().fold(0.0, worse);
        let wrong = shares.iter().filter(|share| **share > 1.0 || share.is_nan()).count();
        report.checked(shares.len());
        report.row(&[
            name.clone(),
            shares.len().to_string(),
            wrong.to_string(),
            format!("{worst:.3}"),
            begin.elapsed().as_millis().to_string(),
        ]);
        if wrong > 0 {
            report.wrong(format!(
                "{name}: {wrong} rows of logits are off by up to {worst:.3} of what is allowed"
            ));
        }
    }
}

/// A directory with the configuration of a model, and without weights.
pub(super) fn directory(config: &str) -> anyhow::Result<TempDir> {
    let directory = tempfile::tempdir().context("a directory for the model's configuration")?;
    std::fs::write(directory.path().join("config.json"), config).context("the model's configuration")?;
    Ok(directory)
}

/// Rows of logits of all prompts together, and of the tokens that follow, which are the same on every device.
fn logits(directory: &Path, device: &Device, seed: u64) -> anyhow::Result<Vec<Vec<f32>>> {
    let options = LoadOptions { weights: WeightOrigin::Random(seed), ..LoadOptions::default() };
    let model =
        Blueprint::read(directory, 1, None)?.load(&options, device.clone(), Ranks::alone(), |_| ())?;
    let mut runner = Runner::new(model, device)?;
    let id = |request: usize, position: usize| (position * 37 + request * 101 + 5) as u32 % VOCABULARY as u32;
    let mut requests = Vec::new();
    for (request, length) in PROMPTS.into_iter().enumerate() {
        let prompt: Vec<u32> = (0..length).map(|position| id(request, position)).collect();
        requests.push(runner.request(&prompt, STEPS)?);
    }
    let mut rows = Vec::new();
    for step in 0..=STEPS {
        if step > 0 {
            for (request, Request { ids, .. }) in requests.iter_mut().enumerate() {
                ids.push(id(request, ids.len()));
            }
        }
        let logits = runner.step(&mut requests.iter_mut().collect::<Vec<_>>(), usize::MAX)?;
        rows.extend(logits.into_iter().flatten());
    }
    Ok(rows)
}

/// Of every row, in the root-mean-square norm, relative to its size.
fn errors(expected: &[Vec<f32>], found: &[Vec<f32>]) -> anyhow::Result<Vec<f64>> {
    ensure!(found.len() == expected.len(), "{} rows of logits, {} expected", found.len(), expected.len());
    Ok(expected.iter().zip(found).map(|(expected, found)| relative_error(expected, found)).collect())
}

fn relative_error(expected: &[f32], found: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let mut differences =
        expected.iter().zip(found).map(|(expected, found)| f64::from(*found) - f64::from(*expected));
    let difference = squares(&mut differences);
    let size = squares(&mut expected.iter().map(|value| f64::from(*value)));
    if found.len() == expected.len() { (difference / size).sqrt() } else { f64::INFINITY }
}
