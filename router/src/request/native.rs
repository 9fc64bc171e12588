//! The body of the native routes, as clients send it.
//!
//! Every optional field accepts an explicit `null` as absent: clients send them everywhere. Unknown fields are ignored.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::params::{Dialect, Params};

/// Body of `/generate`, `/generate_stream`, `/` and `/tokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct GenerateRequest {
    /// The prompt.
    pub(crate) inputs: String,
    /// Absent, the request samples; present, even empty, it is greedy unless a parameter asks for sampling.
    #[serde(default)]
    pub(crate) parameters: Option<GenerateParameters>,
    /// Only meaningful on `/`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub(crate) stream: bool,
}

/// `parameters` of the native routes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenerateParameters {
    pub(crate) best_of: Option<u32>,
    pub(crate) temperature: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) top_k: Option<i32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) typical_p: Option<f32>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) do_sample: bool,
    pub(crate) max_new_tokens: Option<u32>,
    pub(crate) return_full_text: Option<bool>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) stop: Vec<String>,
    pub(crate) truncate: Option<u32>,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) watermark: bool,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) details: bool,
    #[serde(deserialize_with = "null_as_default")]
    pub(crate) decoder_input_details: bool,
    pub(crate) seed: Option<u64>,
    pub(crate) top_n_tokens: Option<u32>,
    pub(crate) grammar: Option<Value>,
    pub(crate) adapter_id: Option<String>,
    /// Not TGI's.
    pub(crate) priority: Option<i64>,
}

/// What the route itself needs of the parameters, beside the generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Presentation {
    /// Whether the prompt is put in front of the text; `None` is the route's default.
    pub(crate) full_text: Option<bool>,
    /// Whether the answer has `details`.
    pub(crate) details: bool,
}

impl GenerateParameters {
    /// What an absent `parameters` means, which is not what an empty one means.
    fn absent() -> Self {
        Self { do_sample: true, ..Self::default() }
    }

    fn split(self) -> (Params, Presentation) {
        let presentation = Presentation {
            full_text: self.return_full_text,
            details: self.details || self.decoder_input_details,
        };
        let params = Params {
            best_of: self.best_of,
            temperature: self.temperature,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            top_k: self.top_k,
            top_p: self.top_p,
            typical_p: self.typical_p,
            do_sample: self.do_sample,
            max_new_tokens: self.max_new_tokens,
            stop: self.stop,
            truncate: self.truncate,
            watermark: self.watermark,
            prompt_logprobs: self.decoder_input_details,
            seed: self.seed,
            top_n_tokens: self.top_n_tokens,
            grammar: self.grammar,
            adapter: self.adapter_id,
            priority: self.priority,
            ..Params::new(Dialect::Native)
        };
        (params, presentation)
    }
}

impl GenerateRequest {
    /// The prompt, the parameters of the generation, and what the route needs to know for its answer.
    pub(crate) fn split(self) -> (String, Params, Presentation) {
        let (params, presentation) = self.parameters.unwrap_or_else(GenerateParameters::absent).split();
        (self.inputs, params, presentation)
    }
}

/// Reads an explicit `null` as the default.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(body: &str) -> Params {
        serde_json::from_str::<GenerateRequest>(body).unwrap().split().1
    }

    #[test]
    fn absent_parameters_sample_and_empty_ones_do_not() {
        assert!(params(r#"{"inputs": "a"}"#).do_sample);
        assert!(params(r#"{"inputs": "a", "parameters": null}"#).do_sample);
        assert!(!params(r#"{"inputs": "a", "parameters": {}}"#).do_sample);
    }

    #[test]
    fn null_means_absent_everywhere_but_in_the_prompt() {
        let body = r#"{"inputs": "a", "stream": null, "parameters": {
            "best_of": null, "temperature": null, "repetition_penalty": null, "frequency_penalty": null,
            "top_k": null, "top_p": null, "typical_p": null, "do_sample": null, "max_new_tokens": null,
            "return_full_text": null, "stop": null, "truncate": null, "watermark": null, "details": null,
            "decoder_input_details": null, "seed": null, "top_n_tokens": null, "grammar": null, "adapter_id": null,
            "priority": null}}"#;
        let request: GenerateRequest = serde_json::from_str(body).unwrap();
        assert!(!request.stream);
        let (_, params, presentation) = request.split();
        assert_eq!(params, Params::new(Dialect::Native));
        assert_eq!(presentation, Presentation { full_text: None, details: false });
        assert!(serde_json::from_str::<GenerateRequest>(r#"{"inputs": null}"#).is_err());
    }

    #[test]
    fn prompt_details_imply_details() {
        let body = r#"{"inputs": "a", "parameters": {"decoder_input_details": true}}"#;
        let (_, params, presentation) = serde_json::from_str::<GenerateRequest>(body).unwrap().split();
        assert!(params.prompt_logprobs && presentation.details);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        params(r#"{"inputs": "a", "user": 1, "parameters": {"add_special_tokens": false}}"#);
    }
}
