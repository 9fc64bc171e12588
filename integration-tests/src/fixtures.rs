//! Tiny checkpoints with the answers of the reference library (see `fixtures/README.md`).

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

/// The directory of a fixture's checkpoint.
pub fn directory(name: &str) -> PathBuf {
    root().join(name)
}

/// The names of all fixtures, in order.
pub fn names() -> Result<Vec<String>> {
    let all = root();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&all).with_context(|| all.display().to_string())? {
        let path = entry?.path();
        if path.join("expected.json").exists() {
            names.push(path.file_name().context("a directory has a name")?.to_string_lossy().into_owned());
        }
    }
    names.sort();
    ensure!(!names.is_empty(), "no fixture in {}", all.display());
    Ok(names)
}

/// Attention heads of a fixture's model, under whatever name its family has them.
pub fn heads(name: &str) -> Result<usize> {
    let path = directory(name).join("config.json");
    let config: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let inside = if config["text_config"].is_object() { &config["text_config"] } else { &config };
    let names = ["num_attention_heads", "n_head", "n_heads"];
    let heads = names.iter().find_map(|name| inside[name].as_u64());
    Ok(heads.with_context(|| format!("no number of heads in {}", path.display()))?.try_into()?)
}

/// What the reference library computes for a checkpoint, in float32.
#[derive(Debug, Deserialize)]
pub struct Expected {
    /// Element type of the stored weights.
    pub stored_dtype: String,
    /// Greedy tokens per prompt.
    pub max_new_tokens: u32,
    /// Short, unicode, long, code.
    pub prompts: Vec<Prompt>,
}

/// One prompt and its greedy continuation.
#[derive(Debug, Deserialize)]
pub struct Prompt {
    /// What kind of prompt it is.
    pub name: String,
    /// As sent to the server.
    pub text: String,
    /// Its tokens, special tokens included.
    pub input_ids: Vec<u32>,
    /// Log-probability of each prompt token given those before; `None` for the first.
    pub prefill_logprobs: Vec<Option<f64>>,
    /// The continuation.
    pub generated_ids: Vec<u32>,
    /// Text of each token when decoding incrementally.
    pub stream_texts: Vec<String>,
    /// The continuation's text in its context, special tokens left out.
    pub stream_text: String,
    /// `length` or `eos_token`.
    pub finish_reason: String,
    /// Log-probability of each generated token.
    pub logprobs: Vec<f64>,
}

/// Reads a fixture's answers.
pub fn expected(name: &str) -> Result<Expected> {
    let path = directory(name).join("expected.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// Where the fixtures are: in the repository that this was built from, or else in that which it is run in.
fn root() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    if built.exists() { built } else { PathBuf::from("integration-tests/fixtures") }
}
