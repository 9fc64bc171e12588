//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use async_stream::try_stream;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::stream::{Stream, StreamExt as _, select_all};
use serde_json::Value;
use uuid::Uuid;

use super::types::{
    ChatChoice, ChatChunk, ChatCompletion, ChatRequest, ChunkChoice, Envelope, Logprobs, OutputMessage,
    Usage, finish_reason,
};
use crate::adapters::ANY_MODEL;
use crate::batching::{Event, Step};
use crate::chat::reply::{self, Reply};
use crate::chat::template::{Conversation, TemplateError};
use crate::http::body::Json;
use crate::http::error::ApiError;
use crate::http::headers::{self, Summary};
use crate::http::terms::Headers;
use crate::http::{App, sse};
use crate::infer::{Generating, Generation, InferError, Request};
use crate::request::params::{Dialect, Params};
use crate::request::validate::ValidationError;

pub(in crate::http) async fn chat_completions(
    State(app): State<Arc<App>>,
    Headers(terms): Headers,
    Json(request): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    let (id, received) = (Uuid::new_v4(), Instant::now());
    let (prompt, request) = prompt(&app, request).await.map_err(|error| app.infer.refuse(id, error))?;
    let characters = prompt.chars().count();
    let answer = Answer::new(&app, &request, id);
    let (streamed, include_usage) = (request.stream, request.stream_options.include_usage);
    let request = Request { id, received, inputs: prompt, params: params(request), terms, streamed };
    if streamed {
        let sequences = app.infer.start(request).await?;
        let headers = headers::streamed(&app.compute_type, characters);
        return sse::respond(frames(answer, sequences, include_usage), Dialect::OpenAi, headers).await;
    }
    let generations = app.infer.generate(request).await?;
    let summary = summary(characters, &generations);
    let completion = answer.completion(generations, &summary);
    Ok((headers::whole(&app.compute_type, &summary), axum::Json(completion)).into_response())
}

/// The prompt of a chat, and the chat itself, or why there is none. Templates are programs, which run on the threads for
/// long work on texts.
pub(in crate::http) async fn prompt(
    app: &Arc<App>,
    request: ChatRequest,
) -> Result<(String, ChatRequest), InferError> {
    check_supported(&request)?;
    let templates = app.clone();
    let rendered =
        app.tokenizer.run(move |_| Ok(render(&templates, &request).map(|prompt| (prompt, request)))).await;
    Ok(rendered.map_err(|error| TemplateError::Render(error.to_string()))??)
}

fn render(app: &App, request: &ChatRequest) -> Result<String, TemplateError> {
    let last_is_answer = request.messages.last().is_some_and(|message| message.role() == "assistant");
    app.template.render(&Conversation {
        messages: &request.messages,
        tools: &[],
        variables: request.chat_template_kwargs.as_ref(),
        add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
        continue_final_message: request.continue_final_message.unwrap_or(last_is_answer),
    })
}

/// Refuses, by name, what would change the answer but is not there.
fn check_supported(request: &ChatRequest) -> Result<(), InferError> {
    let format = request.response_format.as_ref();
    let constrained = format.is_some_and(|format| format.get("type").and_then(Value::as_str) != Some("text"));
    if constrained && request.tools.is_some() {
        return Err(InferError::GrammarWithTools);
    }
    let tools = request.tools.as_ref().is_some_and(|tools| !tools.is_empty());
    let tools_wanted = request.tool_choice.as_ref().and_then(Value::as_str) != Some("none");
    let unsupported = if constrained {
        "response_format"
    } else if tools && tools_wanted {
        "tools"
    } else if request.messages.iter().any(|message| message.part_besides_text().is_some()) {
        "image_url"
    } else {
        return Ok(());
    };
    Err(ValidationError::Unsupported(unsupported).into())
}

fn params(request: ChatRequest) -> Params {
    Params {
        choices: request.n,
        do_sample: true,
        temperature: request.temperature,
        top_p: request.top_p,
        min_p: request.min_p,
        frequency_penalty: request.frequency_penalty,
        presence_penalty: request.presence_penalty,
        logit_bias: request.logit_bias.0,
        seed: request.seed,
        max_new_tokens: request.max_completion_tokens.or(request.max_tokens),
        stop: request.stop.0,
        add_special_tokens: false,
        top_n_tokens: request.top_logprobs,
        adapter: request.model.filter(|model| model != ANY_MODEL),
        priority: request.priority,
        ..Params::new(Dialect::OpenAi)
    }
}

/// What is fixed for all pieces of one answer.
#[derive(Debug)]
struct Answer {
    envelope: Envelope,
    stops: Vec<String>,
    logprobs: bool,
    /// Whether the usage may have what TGI's has not.
    usage_details: bool,
}

impl Answer {
    fn new(app: &App, request: &ChatRequest, id: Uuid) -> Self {
        let model = request.model.as_deref().filter(|model| *model != ANY_MODEL);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            envelope: Envelope {
                object: if request.stream { "chat.completion.chunk" } else { "chat.completion" },
                id: format!("chatcmpl-{}", id.simple()),
                created: now.as_secs(),
                model: model.unwrap_or(&app.info.model_id).to_owned(),
                system_fingerprint: app.info.fingerprint(),
            },
            stops: request.stop.0.clone(),
            logprobs: request.logprobs,
            usage_details: request.model.as_deref() != Some(ANY_MODEL),
        }
    }

    fn completion(&self, generations: Vec<Generation>, summary: &Summary) -> ChatCompletion<'_> {
        let choices = std::iter::zip(0.., generations).map(|(index, Generation { steps, finished, .. })| {
            let (content, stopped) = reply::whole(&finished.text, &self.stops);
            ChatChoice {
                index,
                message: OutputMessage::assistant(content),
                logprobs: self.logprobs.then(|| Logprobs::of(&steps)),
                finish_reason: finish_reason(finished.reason, stopped),
            }
        });
        let choices = choices.collect();
        let usage = self.count(summary.prompt_tokens, summary.cached_tokens, summary.generated_tokens);
        ChatCompletion { envelope: &self.envelope, choices, usage }
    }

    fn count(&self, prompt: u32, cached: u32, generated: u32) -> Usage {
        Usage::new(prompt, generated).with_cached(if self.usage_details { cached } else { 0 })
    }

    /// A chunk of the choice `index`; `finished` with its last token.
    fn chunk(&self, index: u32, content: String, step: Step, finish_reason: Option<&'static str>) -> Bytes {
        let choice = ChunkChoice {
            index,
            delta: OutputMessage::assistant(content),
            logprobs: self.logprobs.then(|| Logprobs::of(&[step])),
            finish_reason,
        };
        sse::frame(&ChatChunk { envelope: &self.envelope, choices: vec![choice], usage: None })
    }

    /// The chunk behind all others.
    fn usage(&self, usage: Usage) -> Bytes {
        sse::frame(&ChatChunk { envelope: &self.envelope, choices: Vec::new(), usage: Some(usage) })
    }
}

/// Choices share the prompt, which was found in the cache as far as the least of them found it: others may owe it to their
/// neighbours. The slowest of them gives the times.
fn summary(characters: usize, generations: &[Generation]) -> Summary {
    let slowest = generations.iter().max_by_key(|generation| generation.timings.total);
    let slowest = slowest.expect("a request has at least one sequence");
    Summary {
        characters,
        prompt_tokens: slowest.prompt_tokens.0,
        cached_tokens: generations.iter().map(|generation| generation.finished.cached.0).min().unwrap_or(0),
        generated_tokens: generations.iter().map(|generation| generation.finished.tokens.0).sum(),
        timings: slowest.timings,
    }
}

/// One chunk per token, of whichever choice has one.
fn frames(
    answer: Answer,
    sequences: Vec<Generating>,
    include_usage: bool,
) -> impl Stream<Item = Result<Bytes, ApiError>> {
    let prompt_tokens = sequences.first().map_or(0, |sequence| sequence.prompt_tokens().0);
    let mut replies = vec![Reply::new(answer.stops.clone()); sequences.len()];
    let numbered = sequences.into_iter().enumerate();
    let mut events = select_all(
        numbered.map(|(index, sequence)| sequence.into_events().map(move |event| (index, event)).boxed()),
    );
    try_stream! {
        let (mut generated_tokens, mut cached_tokens) = (0, prompt_tokens);
        while let Some((index, event)) = events.next().await {
            let (step, finished) = match event? {
                Event::Prompt(_) => continue,
                Event::Token(step) => (step, None),
                Event::Last(step, finished) => (step, Some(finished)),
            };
            let reply = &mut replies[index];
            let mut content = if step.token.special { String::new() } else { reply.push(&step.token.text) };
            let reason = finished.map(|finished| {
                content.push_str(&reply.finish());
                generated_tokens += finished.tokens.0;
                cached_tokens = cached_tokens.min(finished.cached.0);
                finish_reason(finished.reason, reply.stopped())
            });
            yield answer.chunk(index as u32, content, step, reason);
        }
        if include_usage {
            yield answer.usage(answer.count(prompt_tokens, cached_tokens, generated_tokens));
        }
    }
}
