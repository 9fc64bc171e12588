//! Bodies of `/v1/chat/completions`: wire structs only.

use std::collections::HashSet;
use std::fmt;

use proto::units::TokenId;
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::batching::{FinishReason, Step};
use crate::chat::message::Message;
use crate::request::native::null_as_default;

/// A chat request. Every optional field accepts `null`; unknown fields are ignored.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    pub(super) messages: Vec<Message>,
    #[serde(default)]
    pub(super) model: Option<String>,
    #[serde(default)]
    pub(super) max_tokens: Option<u32>,
    #[serde(default)]
    pub(super) max_completion_tokens: Option<u32>,
    #[serde(default)]
    pub(super) temperature: Option<f32>,
    #[serde(default)]
    pub(super) top_p: Option<f32>,
    /// Not OpenAI's.
    #[serde(default)]
    pub(super) min_p: Option<f32>,
    #[serde(default)]
    pub(super) seed: Option<u64>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) stop: Stop,
    #[serde(default)]
    pub(super) frequency_penalty: Option<f32>,
    #[serde(default)]
    pub(super) presence_penalty: Option<f32>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) logit_bias: LogitBias,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) logprobs: bool,
    #[serde(default)]
    pub(super) top_logprobs: Option<u32>,
    #[serde(default)]
    pub(super) n: Option<u32>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) stream: bool,
    #[serde(default, deserialize_with = "null_as_default")]
    pub(super) stream_options: StreamOptions,
    #[serde(default)]
    pub(super) tools: Option<Vec<Value>>,
    #[serde(default)]
    pub(super) tool_choice: Option<Value>,
    #[serde(default)]
    pub(super) response_format: Option<Value>,
    /// Not OpenAI's.
    #[serde(default)]
    pub(super) priority: Option<i64>,
    /// Variables for the template.
    #[serde(default)]
    pub(super) chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(default)]
    pub(super) add_generation_prompt: Option<bool>,
    #[serde(default)]
    pub(super) continue_final_message: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    #[serde(deserialize_with = "null_as_default")]
    pub(super) include_usage: bool,
}

/// One stop string, or a list of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stop(pub(super) Vec<String>);

/// What to add to the logits of single tokens: `{"<token id>": bias}`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct LogitBias(pub(super) Vec<(TokenId, f32)>);

// Written out, because an untagged enum's errors name neither the item nor its place.
impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, stop: &str) -> Result<Stop, E> {
                Ok(Stop(vec![stop.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Stop, A::Error> {
                let mut stops = Vec::new();
                while let Some(stop) = items.next_element()? {
                    stops.push(stop);
                }
                Ok(Stop(stops))
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BiasVisitor;

        impl<'de> Visitor<'de> for BiasVisitor {
            type Value = LogitBias;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map from token ids to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<LogitBias, A::Error> {
                let (mut biases, mut known) = (Vec::new(), HashSet::new());
                while let Some((id, bias)) = entries.next_entry::<u32, f32>()? {
                    if !known.insert(id) {
                        return Err(A::Error::custom(format_args!("token {id} is named twice")));
                    }
                    biases.push((TokenId(id), bias));
                }
                Ok(LogitBias(biases))
            }
        }

        deserializer.deserialize_map(BiasVisitor)
    }
}

/// What all bodies of one answer have in common.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Envelope {
    pub(super) object: &'static str,
    /// The same in all chunks of an answer.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) system_fingerprint: String,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatCompletion<'a> {
    #[serde(flatten)]
    pub(super) envelope: &'a Envelope,
    pub(super) choices: Vec<ChatChoice>,
    pub(super) usage: Usage,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatChoice {
    pub(super) index: u32,
    pub(super) message: OutputMessage,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish_reason: &'static str,
}

/// A message, or a piece of one.
#[derive(Debug, Serialize)]
pub(super) struct OutputMessage {
    pub(super) role: &'static str,
    pub(super) content: String,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatChunk<'a> {
    #[serde(flatten)]
    pub(super) envelope: &'a Envelope,
    /// One, or none in the chunk with the usage.
    pub(super) choices: Vec<ChunkChoice>,
    pub(super) usage: Option<Usage>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChunkChoice {
    pub(super) index: u32,
    pub(super) delta: OutputMessage,
    pub(super) logprobs: Option<Logprobs>,
    /// With the last token.
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    /// Absent if there is nothing to say, as in TGI's answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct Logprobs {
    /// One per generated token, special ones included.
    content: Vec<Logprob>,
}

#[derive(Debug, Serialize)]
struct Logprob {
    token: String,
    logprob: f32,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Serialize)]
struct TopLogprob {
    token: String,
    logprob: f32,
}

impl OutputMessage {
    /// Said by the model.
    pub(super) fn assistant(content: String) -> Self {
        Self { role: "assistant", content }
    }
}

impl Usage {
    pub(super) fn new(prompt_tokens: u32, completion_tokens: u32) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
            prompt_tokens_details: None,
        }
    }

    /// With so many of the prompt's tokens found in the cache.
    pub(super) fn with_cached(self, cached_tokens: u32) -> Self {
        let details = (cached_tokens > 0).then_some(PromptTokensDetails { cached_tokens });
        Self { prompt_tokens_details: details, ..self }
    }
}

impl Logprobs {
    pub(super) fn of(steps: &[Step]) -> Self {
        let content = steps.iter().map(|step| Logprob {
            token: step.token.text.clone(),
            logprob: step.token.logprob,
            top_logprobs: step
                .alternatives
                .iter()
                .map(|token| TopLogprob { token: token.text.clone(), logprob: token.logprob })
                .collect(),
        });
        Self { content: content.collect() }
    }
}

/// A reason in OpenAI's words.
pub(super) fn finish_reason(reason: FinishReason, stopped: bool) -> &'static str {
    match reason {
        FinishReason::Length if !stopped => "length",
        _ => "stop",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &str) -> Result<ChatRequest, serde_json::Error> {
        serde_json::from_str(&format!(r#"{{"messages": [{{"role": "user", "content": "a"}}], {fields}}}"#))
    }

    #[test]
    fn stop_is_a_string_or_a_list() {
        let stop = |value: &str| request(&format!(r#""stop": {value}"#)).unwrap().stop.0;
        assert_eq!(stop(r#""a""#), ["a"]);
        assert_eq!(stop(r#"["a", "b"]"#), ["a", "b"]);
        assert!(stop("null").is_empty());
        assert!(request(r#""stop": 1"#).is_err());
    }

    #[test]
    fn logit_bias_is_a_map_by_token_id() {
        let bias = request(r#""logit_bias": {"50256": -100, "3": 0.5}"#).unwrap().logit_bias.0;
        assert_eq!(bias, [(TokenId(50256), -100.0), (TokenId(3), 0.5)]);
        assert!(request(r#""logit_bias": {"x": 1}"#).is_err());
        let error = request(r#""logit_bias": {"3": 1, "3": 1}"#).unwrap_err();
        assert!(error.is_data() && error.to_string().contains("token 3 is named twice"), "{error}");
    }

    #[test]
    fn null_means_absent() {
        let fields = [
            "model",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "min_p",
            "seed",
            "stop",
            "frequency_penalty",
            "presence_penalty",
            "logit_bias",
            "logprobs",
            "top_logprobs",
            "n",
            "stream",
            "stream_options",
            "tools",
            "tool_choice",
            "response_format",
            "chat_template_kwargs",
            "priority",
            "user",
        ];
        let nulls: Vec<_> = fields.iter().map(|name| format!(r#""{name}": null"#)).collect();
        assert!(request(&nulls.join(", ")).is_ok());
        assert!(serde_json::from_str::<ChatRequest>(r#"{"messages": null}"#).is_err());
    }
}
