//! The few facts of a model's `config.json` that the launcher derives from.

use serde_json::{Map, Value};

/// What `config.json` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// The family, such as `llama`.
    pub model_type: Option<String>,
    /// Longest sequence the model has positions for, in tokens, and the key that says so.
    pub position_count: Option<(u32, &'static str)>,
    /// Element type of the weights, such as `bfloat16`.
    pub dtype: Option<String>,
    /// How the weights are quantized, such as `gptq`.
    pub quantization: Option<String>,
}

/// Keys that say how many positions a model has, the first found counts.
const POSITION_KEYS: [&str; 3] = ["max_position_embeddings", "max_seq_len", "n_positions"];

impl ModelConfig {
    /// Reads the facts from the text of a `config.json`. A missing fact is none; keys that the launcher has no use for
    /// are the shard's matter.
    ///
    /// Errors with what is wrong, to be put after the file's name.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let config: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| format!("is not a JSON object: {error}"))?;
        Ok(Self {
            model_type: string(&config, "model_type")?,
            position_count: position_count(&config)?,
            // The second is the older name.
            dtype: string(&config, "dtype")?.or(string(&config, "torch_dtype")?),
            quantization: quantization(&config)?,
        })
    }
}

fn position_count(config: &Map<String, Value>) -> Result<Option<(u32, &'static str)>, String> {
    for key in POSITION_KEYS {
        let Some(value) = present(config, key) else { continue };
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0);
        return match count {
            Some(count) => Ok(Some((count, key))),
            None => {
                Err(format!("says `{key}`: {value}, which is not a number of tokens from 1 to {}", u32::MAX))
            }
        };
    }
    Ok(None)
}

fn quantization(config: &Map<String, Value>) -> Result<Option<String>, String> {
    // The second is the older name.
    for key in ["quantization_config", "compression_config"] {
        if let Some(value) = present(config, key) {
            let value = value.as_object().ok_or_else(|| format!("says `{key}`, which is not an object"))?;
            return string(value, "quant_method");
        }
    }
    Ok(None)
}

fn string(config: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match present(config, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("says `{key}`, which is not a string")),
    }
}

/// A key's value; `null` is as good as absent.
fn present<'a>(config: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    config.get(key).filter(|value| !value.is_null())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelConfig, String> {
        ModelConfig::parse(text.as_bytes())
    }

    #[test]
    fn facts_are_found_under_their_old_and_new_names() {
        let config = parse(
            r#"{"model_type": "gpt2", "n_positions": 64, "max_seq_len": null, "torch_dtype": "float32",
                "quantization_config": {"quant_method": "gptq", "bits": 4}}"#,
        );
        let expected = ModelConfig {
            model_type: Some("gpt2".into()),
            position_count: Some((64, "n_positions")),
            dtype: Some("float32".into()),
            quantization: Some("gptq".into()),
        };
        assert_eq!(config, Ok(expected));
        assert_eq!(parse(r#"{"dtype": "bfloat16"}"#).unwrap().dtype.as_deref(), Some("bfloat16"));
    }

    #[test]
    fn an_unknown_quantization_method_costs_no_other_fact() {
        let config =
            parse(r#"{"max_position_embeddings": 8, "quantization_config": {"quant_method": "new"}}"#)
                .unwrap();
        assert_eq!(config.position_count, Some((8, "max_position_embeddings")));
        assert_eq!(config.quantization.as_deref(), Some("new"));
    }

    #[test]
    fn missing_facts_are_none() {
        assert_eq!(parse("{}"), Ok(ModelConfig::default()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("{", "is not a JSON object"),
            ("[]", "is not a JSON object"),
            (r#"{"max_position_embeddings": -1}"#, "`max_position_embeddings`: -1"),
            (r#"{"max_position_embeddings": 0}"#, "`max_position_embeddings`: 0"),
            (r#"{"model_type": 3}"#, "`model_type`"),
            (r#"{"quantization_config": "gptq"}"#, "`quantization_config`"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
