//! The flags that say how weights are loaded.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::fixtures;
use integration_tests::stack::Stack;
use serde_json::{Value, json};

const PROMPT: &str = "Once upon a time";

/// The greedy tokens of a server with these flags.
async fn tokens(flags: &[&str]) -> Result<Vec<Value>> {
    let stack = Stack::start(flags).await?;
    let body = json!({"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "details": true}});
    let answer = stack.client().generate("/generate", &body).await?;
    let tokens = answer["details"]["tokens"].as_array().context("a list of tokens")?;
    Ok(tokens.iter().map(|token| token["id"].clone()).collect())
}

fn model(name: &str) -> Result<String> {
    Ok(fixtures::directory(name).to_str().context("a path in UTF-8")?.to_owned())
}

/// A directory with the files of a fixture whose names `wanted` takes.
fn part(name: &str, wanted: impl Fn(&str) -> bool) -> Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    for entry in std::fs::read_dir(fixtures::directory(name))? {
        let path = entry?.path();
        let file = path.file_name().and_then(|file| file.to_str()).context("a name in UTF-8")?;
        if path.is_file() && wanted(file) {
            std::fs::copy(&path, directory.path().join(file))?;
        }
    }
    Ok(directory)
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

#[tokio::test]
async fn weights_in_a_wider_type_give_the_same_tokens() -> Result<()> {
    let llama = model("llama")?;
    let stored = tokens(&["--model-id", &llama]).await?;
    assert_eq!(tokens(&["--model-id", &llama, "--dtype", "float32"]).await?, stored);
    assert_eq!(tokens(&["--model-id", &llama, "--dtype", "bfloat16"]).await?, stored);
    Ok(())
}

#[tokio::test]
async fn made_up_weights_need_no_files_and_are_the_same_at_every_start_and_on_two_shards() -> Result<()> {
    let without = part("llama", |file| !file.ends_with(".safetensors"))?;
    let directory = utf8(without.path())?;
    let flags = ["--model-id", directory, "--load-format", "dummy"];
    let first = tokens(&flags).await?;
    assert_eq!(tokens(&flags).await?, first);
    assert_eq!(tokens(&[&flags[..], &["--num-shard", "2"]].concat()).await?, first);
    assert_ne!(tokens(&["--model-id", &model("llama")?]).await?, first);
    Ok(())
}

#[tokio::test]
async fn weight_files_may_lie_in_another_directory() -> Result<()> {
    let without = part("llama", |file| !file.ends_with(".safetensors"))?;
    let weights = part("llama", |file| file.ends_with(".safetensors"))?;
    let flags = ["--model-id", utf8(without.path())?, "--weights-cache-override", utf8(weights.path())?];
    assert_eq!(tokens(&flags).await?, tokens(&["--model-id", &model("llama")?]).await?);
    Ok(())
}

#[tokio::test]
async fn another_rotary_scaling_changes_the_tokens() -> Result<()> {
    let llama = model("llama_linear")?;
    let own = tokens(&["--model-id", &llama]).await?;
    let scaled = ["--model-id", &llama, "--rope-scaling", "linear", "--rope-factor"];
    // The fixture's own factor.
    assert_eq!(tokens(&[&scaled[..], &["2.5"]].concat()).await?, own);
    assert_ne!(tokens(&[&scaled[..], &["40"]].concat()).await?, own);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_loaded_is_one_line_that_names_it() -> Result<()> {
    let without = part("llama", |file| !file.ends_with(".safetensors"))?;
    let error = tokens(&["--model-id", utf8(without.path())?]).await.unwrap_err().to_string();
    ensure!(error.contains("safetensors"), "{error}");
    let error =
        tokens(&["--model-id", &model("mistral")?, "--num-shard", "2"]).await.unwrap_err().to_string();
    ensure!(
        error.contains("3 attention heads cannot be split over 2 shards; --num-shard can be 1, 3"),
        "{error}"
    );
    Ok(())
}
