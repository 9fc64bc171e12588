//! The routes over a batcher that answers as a test says.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use proto::units::{TokenCount, TokenId};
use serde_json::Value;
use tokio::sync::mpsc;
use tower::ServiceExt as _;

use super::{Access, App, Gate, Info, router};
use crate::adapters::Adapters;
use crate::availability::Availability;
use crate::batching::{Batcher, Event, FinishReason, Finished, PromptToken, Step, Token, Waiting};
use crate::chat::source::TemplateSource;
use crate::chat::template::ChatTemplate;
use crate::infer::Infer;
use crate::metrics::{BucketLimits, Metrics};
use crate::request::validate::{RequestLimits, Validator};
use crate::text::tokenizer::testing::words;

pub(super) const CONCURRENT_REQUESTS: usize = 2;
pub(super) const BODY_BYTES_MAX: usize = 2000;

/// Where the requests arrive that were handed to the batcher.
pub(super) type Mail = mpsc::Receiver<Waiting>;

/// Speaks to the routes.
#[derive(Clone)]
pub(super) struct Client(Router);

/// An answer that was read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) text: String,
}

/// What a test may choose.
pub(super) struct Setup {
    pub(super) access: Access,
    pub(super) template: Option<String>,
    pub(super) availability: Availability,
    pub(super) metrics: Metrics,
    pub(super) adapters: Adapters,
}

impl Default for Setup {
    fn default() -> Self {
        let availability = Availability::starting();
        availability.serving();
        Self {
            access: Access::default(),
            template: Some("{% for m in messages %}{{ m.content }} {% endfor %}".to_owned()),
            availability,
            metrics: Metrics::new(BucketLimits {
                max_input_tokens: TokenCount(6),
                max_total_tokens: TokenCount(10),
            }),
            adapters: Adapters::fixed(&[]),
        }
    }
}

impl Setup {
    /// The routes, and the requests as they reach the batcher.
    pub(super) fn start(self) -> (Client, Mail) {
        let (inbox, mail) = mpsc::channel(CONCURRENT_REQUESTS);
        let metrics = self.metrics;
        let tokenizer = words();
        let limits = RequestLimits {
            best_of_max: 2,
            choices_max: 2,
            stop_sequences_max: 2,
            top_n_tokens_max: 5,
            input_tokens_max: TokenCount(6),
            total_tokens_max: TokenCount(10),
            vocabulary: 10,
            sampling_more: true,
        };
        let validator = Validator::new(tokenizer.clone(), limits, self.adapters.clone());
        let batcher = Batcher { inbox, metrics: metrics.clone() };
        let app = App {
            infer: Infer::new(batcher, validator, metrics.clone(), CONCURRENT_REQUESTS),
            tokenizer,
            template: ChatTemplate::compile(TemplateSource { default: self.template, ..Default::default() }),
            adapters: self.adapters,
            metrics,
            availability: self.availability,
            info: info(),
            compute_type: HeaderValue::from_static("1-test"),
            body_bytes_max: BODY_BYTES_MAX,
        };
        (Client(router(Arc::new(app), &self.access)), mail)
    }

    /// The routes over a batcher that answers every request with `texts`, the last of them special.
    pub(super) fn answering(self, texts: &'static [&'static str]) -> Client {
        let (client, mut mail) = self.start();
        tokio::spawn(async move {
            while let Some(waiting) = mail.recv().await {
                answer(&waiting, texts).await;
            }
        });
        client
    }
}

fn info() -> Info {
    Info {
        model_id: "acme/tiny".to_owned(),
        model_sha: None,
        model_pipeline_tag: None,
        max_concurrent_requests: CONCURRENT_REQUESTS,
        max_best_of: 2,
        max_stop_sequences: 2,
        max_input_tokens: 6,
        max_total_tokens: 10,
        validation_workers: 1,
        max_client_batch_size: 2,
        router: "text-generation-router",
        version: "4.0.0",
        sha: "unknown",
        docker_label: None,
    }
}

/// Generates `texts` as a shard would: until the limit, or until the last of them, which ends the sequence.
pub(super) async fn answer(waiting: &Waiting, texts: &[&str]) {
    answer_cached(waiting, texts, 0).await;
}

/// The same for a prompt of which so many tokens were found in the cache.
pub(super) async fn answer_cached(waiting: &Waiting, texts: &[&str], cached: u32) {
    let request = &waiting.request;
    if request.prompt_logprobs {
        let tokens = request.prompt.ids.iter().enumerate().map(|(index, id)| PromptToken {
            id: *id,
            text: id.to_string(),
            logprob: (index > 0).then_some(-1.0),
        });
        send(waiting, Event::Prompt(tokens.collect())).await;
    }
    let limit = texts.len().min(request.stopping.max_new_tokens.0 as usize);
    for index in 0..limit {
        let step = step(texts, index, request.top_n_tokens);
        if index + 1 < limit {
            send(waiting, Event::Token(step)).await;
            continue;
        }
        let special = usize::from(limit == texts.len());
        let finished = Finished {
            text: texts[..limit - special].concat(),
            tokens: TokenCount(limit as u32),
            reason: if special == 1 { FinishReason::EndOfSequence } else { FinishReason::Length },
            seed: request.sampling.do_sample.then_some(request.sampling.seed),
            queued: waiting.queued,
            started: Instant::now(),
            cached: TokenCount(cached),
        };
        send(waiting, Event::Last(step, finished)).await;
    }
}

/// Token `index` of an answer of `texts`.
pub(super) fn step(texts: &[&str], index: usize, alternatives: u32) -> Step {
    let token = |text: &str| Token {
        id: TokenId(index as u32),
        text: text.to_owned(),
        logprob: -0.5,
        special: index + 1 == texts.len(),
    };
    Step { token: token(texts[index]), alternatives: (0..alternatives).map(|_| token("other")).collect() }
}

pub(super) async fn send(waiting: &Waiting, event: Event) {
    waiting.events.send(Ok(event)).await.expect("the client is there");
}

impl Client {
    /// Of a gate, closed or open.
    pub(super) fn of(gate: Gate) -> Self {
        Self(Router::new().fallback_service(gate))
    }

    pub(super) fn into_routes(self) -> Router {
        self.0
    }

    pub(super) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "").await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &[("content-type", "application/json")], &body.to_string()).await
    }

    pub(super) async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Body::from(body.to_owned())).unwrap()).await;
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: parts.status, headers: parts.headers, text }
    }

    /// Sends a JSON request whose answer is not read.
    pub(super) async fn open(&self, path: &str, body: &Value) -> Response {
        let request = Request::post(path).header("content-type", "application/json");
        self.send(request.body(Body::from(body.to_string())).unwrap()).await
    }

    async fn send(&self, request: Request<Body>) -> Response {
        self.0.clone().oneshot(request).await.unwrap_or_else(|never| match never {})
    }
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    /// Events of a stream; what is not JSON, such as the terminator, as a string.
    pub(super) fn events(&self) -> Vec<Value> {
        let frames = self.text.strip_suffix("\n\n").expect("a stream ends with an empty line").split("\n\n");
        let data = frames.map(|frame| frame.strip_prefix("data: ").expect("frames are data"));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into())).collect()
    }

    #[track_caller]
    pub(super) fn assert_error(&self, status: u16, error_type: &str, message: &str) {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let body = self.json();
        assert_eq!((body["error_type"].as_str(), body["error"].as_str()), (Some(error_type), Some(message)));
        assert!(!self.headers.keys().any(|name| name.as_str().starts_with("x-")), "{:?}", self.headers);
    }
}
