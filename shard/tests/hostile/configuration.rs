//! Configurations and tokenizers that are none.

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
        row("config of deep nesting", &"{\"a\":".repeat(MANY), &[NAME, "recursion limit"]),
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
