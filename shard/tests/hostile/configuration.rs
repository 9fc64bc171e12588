//! Configurations, tokenizers and adapters that are none.

use crate::safetensors::{VALID, file};
use crate::{Reader, Row};

/// A configuration that nothing is wrong with but this vocabulary size.
fn with_vocabulary(size: &str) -> String {
    format!(
        r#"{{"model_type":"llama","hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,"hidden_act":"silu","num_attention_heads":4,"max_position_embeddings":256,"rms_norm_eps":1e-5,"vocab_size":{size}}}"#
    )
}

pub(crate) fn configs() -> Vec<Row> {
    const NAME: &str = "config.json";
    const MANY: usize = 300_000;
    let row = |name, config: &str, expected| {
        Row::new(name, Reader::Configuration, vec![(NAME, config.as_bytes().to_vec())], expected)
    };
    vec![
        Row::new("no config", Reader::Configuration, Vec::new(), &[NAME, "No such file"]),
        row("empty config", "", &[NAME, "EOF"]),
        row("config that is a list", "[]", &[NAME, "expected a map"]),
        row("config of deep nesting", &"{\"a\":".repeat(MANY / 3), &[NAME, "recursion limit"]),
        row("config of deep lists", &format!("{{\"a\":{}", "[".repeat(MANY)), &[NAME, "recursion limit"]),
        row(
            "config of many numbers",
            &with_vocabulary(&format!("[0{}]", ",0".repeat(MANY))),
            &[NAME, "vocab_size", "…"],
        ),
        row(
            "config with a number of many digits",
            &with_vocabulary(&"9".repeat(MANY)),
            &[NAME, "number out of range"],
        ),
        row(
            "config with a text of many letters",
            &with_vocabulary(&format!("\"{}\"", "x".repeat(MANY))),
            &[NAME, "vocab_size", "…"],
        ),
        row("config of negative sizes", &with_vocabulary("-1"), &[NAME, "`vocab_size` is -1"]),
        row(
            "config of huge sizes",
            &with_vocabulary("18446744073709551615"),
            &[NAME, "`vocab_size` is 18446744073709551615"],
        ),
        row(
            "config of a hundred million layers",
            &with_vocabulary("100").replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":134217728"),
            &[NAME, "`num_hidden_layers` is 134217728, expected at most 4096 layers"],
        ),
        row("config without sizes", "{}", &[NAME, "is missing"]),
    ]
}

pub(crate) fn tokenizers() -> Vec<Row> {
    const NAME: &str = "tokenizer.json";
    const MANY: usize = 300_000;
    let row = |name, bytes: &[u8], expected| {
        Row::new(name, Reader::Tokenizer, vec![(NAME, bytes.to_vec())], expected)
    };
    vec![
        Row::new("no tokenizer", Reader::Tokenizer, Vec::new(), &[NAME, "No such file"]),
        row("empty tokenizer", b"", &[NAME, "EOF"]),
        row("tokenizer of noise", b"\x00\xff\x13garbage", &[NAME, "expected value"]),
        row("tokenizer of deep nesting", "{\"model\":".repeat(MANY).as_bytes(), &[NAME]),
        row("tokenizer without a model", br#"{"version":"1.0"}"#, &[NAME]),
        row(
            "tokenizer of an unknown kind",
            br#"{"version":"1.0","model":{"type":"Oracle","vocab":{}}}"#,
            &[NAME],
        ),
        row(
            "tokenizer with merges of nothing",
            br#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["b c"]}}"#,
            &[NAME],
        ),
    ]
}

pub(crate) fn adapters() -> Vec<Row> {
    const NAME: &str = "adapter_config.json";
    const MODEL: &str = "adapter_model.safetensors";
    const MANY: usize = 300_000;
    let row = |name, config: &str, model: Vec<u8>, expected| {
        let files = vec![(NAME, config.as_bytes().to_vec()), (MODEL, model)];
        Row::new(name, Reader::Adapter, files, expected)
    };
    let good = || file(VALID, 8);
    let long = VALID.replace("weight", &"\\n".repeat(MANY));
    vec![
        Row::new("no adapter", Reader::Adapter, Vec::new(), &[NAME, "No such file"]),
        row("empty adapter", "", good(), &[NAME, "EOF"]),
        row("adapter of deep nesting", &"{\"r\":".repeat(MANY / 3), good(), &[NAME, "recursion limit"]),
        row(
            "adapter of many modules",
            &format!(r#"{{"lora_alpha":["a"{}]}}"#, ",0".repeat(MANY)),
            good(),
            &[NAME, "lora_alpha", "…"],
        ),
        row("adapter of a negative scale", r#"{"lora_alpha":-1}"#, good(), &[NAME, "`lora_alpha` is -1"]),
        row("adapter of another kind", r#"{"peft_type":"PROMPT_TUNING"}"#, good(), &[NAME, "PROMPT_TUNING"]),
        row("adapter with a broken file", "{}", file(VALID, 7), &[MODEL, "`weight`"]),
        row("adapter for something else", "{}", good(), &["`weight`", "belongs to no linear layer"]),
        row("adapter with a name of many lines", "{}", file(&long, 8), &["belongs to no linear layer"]),
    ]
}
