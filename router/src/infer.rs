//! The front door of the batcher: permit, validate, submit, stream.
//!
//! A request holds a permit per sequence from before its validation until its stream ends or is dropped; with none left
//! the answer is "overloaded", at once. Dropping a stream closes its channel, which is how the batcher learns that the
//! client has left.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_stream::stream;
use futures::Stream;
use futures::future::try_join_all;
use proto::units::TokenCount;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::batching::{Batcher, Event, FinishReason, Finished, PromptToken, Step, Stopped, Waiting};
use crate::chat::template::TemplateError;
use crate::metrics::{Failure, Metrics, RequestTimings};
use crate::request::ValidRequest;
use crate::request::params::Params;
use crate::request::validate::{ValidationError, Validator};
use crate::shards::ShardError;

/// A request that was not served to its end.
#[derive(Clone, Debug, Error, PartialEq)]
pub(crate) enum InferError {
    #[error("Input validation error: {0}")]
    Validation(#[from] ValidationError),
    #[error("Model is overloaded")]
    Overloaded,
    #[error("Request failed during generation: {0}")]
    Shard(#[from] ShardError),
    #[error("Request failed during generation: {0}")]
    Stopped(#[from] Stopped),
    #[error("Incomplete generation")]
    Incomplete,
    #[error("Request failed during generation: the server is shutting down")]
    ShuttingDown,
    #[error("Template error: {0}")]
    Template(#[from] TemplateError),
    #[error("Tool error: Grammar and tools are mutually exclusive")]
    GrammarWithTools,
    #[error("`adapter_id` is `{0}`, but no adapter of this name is loaded")]
    UnknownAdapter(String),
}

impl InferError {
    /// What the metrics call it. The batcher counts the failures of steps itself.
    fn counted_as(&self) -> Option<Failure> {
        match self {
            Self::Validation(_) | Self::GrammarWithTools | Self::UnknownAdapter(_) => {
                Some(Failure::Validation)
            }
            Self::Overloaded => Some(Failure::Overloaded),
            Self::Template(_) => Some(Failure::Template),
            Self::Incomplete | Self::ShuttingDown => Some(Failure::Incomplete),
            Self::Stopped(_) => Some(Failure::Generation),
            Self::Shard(_) => None,
        }
    }
}

/// A request as a route hands it over.
#[derive(Debug)]
pub(crate) struct Request {
    /// Names it in the logs and in OpenAI's answers.
    pub(crate) id: Uuid,
    /// When its handler began.
    pub(crate) received: Instant,
    pub(crate) inputs: String,
    pub(crate) params: Params,
    /// Whether the client sees tokens as they come.
    pub(crate) streamed: bool,
}

/// A sequence from its start to its end.
#[derive(Debug)]
pub(crate) struct Generation {
    /// Empty unless log-probabilities of the prompt were asked for.
    pub(crate) prompt: Vec<PromptToken>,
    pub(crate) steps: Vec<Step>,
    pub(crate) finished: Finished,
    pub(crate) prompt_tokens: TokenCount,
    pub(crate) timings: RequestTimings,
}

impl Generation {
    /// Mean log-probability of the generated tokens; that of no tokens, or of an impossible one, is the lowest.
    pub(crate) fn mean_logprob(&self) -> f32 {
        let sum: f32 = self.steps.iter().map(|step| step.token.logprob).sum();
        let mean = sum / self.steps.len() as f32;
        if mean.is_nan() { f32::NEG_INFINITY } else { mean }
    }
}

/// Takes requests. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Infer {
    batcher: Batcher,
    validator: Validator,
    permits: Arc<Semaphore>,
    metrics: Metrics,
    /// Cancelled when requests in flight are to end.
    ending: CancellationToken,
}

impl Infer {
    pub(crate) fn new(
        batcher: Batcher,
        validator: Validator,
        metrics: Metrics,
        max_concurrent_requests: usize,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(max_concurrent_requests.min(Semaphore::MAX_PERMITS)));
        Self { batcher, validator, permits, metrics, ending: CancellationToken::new() }
    }

    /// Whether requests can be handed over at all.
    pub(crate) fn is_alive(&self) -> bool {
        self.batcher.is_alive()
    }

    /// Ends all requests in flight with an error: the server is shutting down.
    pub(crate) fn end_all(&self) {
        self.ending.cancel();
    }

    /// Generates all sequences of a request to their ends. The first failure fails them all.
    pub(crate) async fn generate(&self, request: Request) -> Result<Vec<Generation>, InferError> {
        let sequences = self.start(request).await?;
        try_join_all(sequences.into_iter().map(Generating::collect)).await
    }

    /// Admits a request and hands its sequences to the batcher.
    pub(crate) async fn start(&self, request: Request) -> Result<Vec<Generating>, InferError> {
        self.metrics.request_received();
        let id = request.id;
        self.admit(request).await.inspect_err(|error| refused(&self.metrics, id, error))
    }

    /// Counts and logs a request that failed before it could be handed over.
    pub(crate) fn refuse(&self, id: Uuid, error: InferError) -> InferError {
        self.metrics.request_received();
        refused(&self.metrics, id, &error);
        error
    }

    async fn admit(&self, request: Request) -> Result<Vec<Generating>, InferError> {
        let Request { id, received, inputs, params, streamed } = request;
        self.validator.check_sequences(&params, streamed)?;
        if let Some(adapter) = params.adapter {
            return Err(InferError::UnknownAdapter(adapter));
        }
        let count = params.sequences();
        let permits = self.permits.clone().try_acquire_many_owned(count);
        let mut permits = permits.map_err(|_| InferError::Overloaded)?;

        let valid = self.validator.validate(inputs, params).await?;
        self.metrics.request_validated(valid.prompt.length(), valid.stopping.max_new_tokens);
        let record = Arc::new(Record {
            id,
            received,
            prompt_tokens: valid.prompt.length(),
            metrics: self.metrics.clone(),
            progress: Mutex::new(Progress { running: count, tokens: TokenCount(0), first_token: None }),
        });
        let mut sequences = Vec::with_capacity(count as usize);
        for number in 0..count {
            let permit = permits.split(1).expect("one permit per sequence was taken");
            let (waiting, events) = Waiting::new(sequence(&valid, number), Instant::now());
            self.batcher.submit(waiting).await?;
            let (record, ending) = (record.clone(), self.ending.clone());
            sequences.push(Generating { events, record, permit: Some(permit), ending });
        }
        Ok(sequences)
    }
}

/// One of several sequences of a request. They differ in nothing but the seed.
fn sequence(request: &ValidRequest, number: u32) -> ValidRequest {
    let mut request = request.clone();
    request.sampling.seed = request.sampling.seed.wrapping_add(number.into());
    request
}

fn refused(metrics: &Metrics, id: Uuid, error: &InferError) {
    if let Some(failure) = error.counted_as() {
        metrics.request_failed(failure);
    }
    tracing::error!(request_id = %id.simple(), "{error}");
}

/// A sequence on its way. To be read to its end, or dropped.
#[derive(Debug)]
pub(crate) struct Generating {
    events: mpsc::Receiver<Result<Event, ShardError>>,
    record: Arc<Record>,
    /// Given back with the last event: reading the end of the answer takes no place from others.
    permit: Option<OwnedSemaphorePermit>,
    ending: CancellationToken,
}

impl Generating {
    /// Tokens of the prompt, as they were fed.
    pub(crate) fn prompt_tokens(&self) -> TokenCount {
        self.record.prompt_tokens
    }

    /// The next event; `None` after the last one or an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, InferError>> {
        self.permit.as_ref()?;
        let event = tokio::select! {
            biased;
            event = self.events.recv() => match event {
                Some(event) => event.map_err(InferError::Shard),
                None => Err(InferError::Incomplete),
            },
            () = self.ending.cancelled() => Err(InferError::ShuttingDown),
        };
        match &event {
            Ok(Event::Prompt(_)) => {}
            Ok(Event::Token(_)) => self.record.token(),
            Ok(Event::Last(_, finished)) => {
                self.permit = None;
                self.record.finished(finished);
            }
            Err(error) => {
                self.permit = None;
                refused(&self.record.metrics, self.record.id, error);
            }
        }
        Some(event)
    }

    /// The events as a stream that owns the sequence.
    pub(crate) fn into_events(mut self) -> impl Stream<Item = Result<Event, InferError>> {
        stream! {
            while let Some(event) = self.next().await {
                yield event;
            }
        }
    }

    /// Reads to the end.
    pub(crate) async fn collect(mut self) -> Result<Generation, InferError> {
        let (mut prompt, mut steps) = (Vec::new(), Vec::new());
        while let Some(event) = self.next().await {
            match event? {
                Event::Prompt(tokens) => prompt = tokens,
                Event::Token(step) => steps.push(step),
                Event::Last(step, finished) => {
                    steps.push(step);
                    let timings = self.record.timings(&finished);
                    let prompt_tokens = self.record.prompt_tokens;
                    return Ok(Generation { prompt, steps, finished, prompt_tokens, timings });
                }
            }
        }
        Err(InferError::Incomplete)
    }
}

/// What is written down about a request, however many sequences it has: one success, one log line.
#[derive(Debug)]
struct Record {
    id: Uuid,
    received: Instant,
    prompt_tokens: TokenCount,
    metrics: Metrics,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// Sequences that have not ended.
    running: u32,
    /// Generated by those that have.
    tokens: TokenCount,
    first_token: Option<Instant>,
}

impl Record {
    fn token(&self) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.first_token.get_or_insert_with(Instant::now);
    }

    fn finished(&self, finished: &Finished) {
        self.token();
        let tokens = {
            let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.running -= 1;
            progress.tokens.0 += finished.tokens.0;
            if progress.running > 0 {
                return;
            }
            progress.tokens
        };
        let timings = self.timings(finished);
        self.metrics.request_succeeded(&timings, tokens);
        tracing::info!(
            request_id = %self.id.simple(),
            tokens_prompt = self.prompt_tokens.0,
            tokens_generated = tokens.0,
            validation_ms = timings.validation.as_millis() as u64,
            queue_ms = timings.queue.as_millis() as u64,
            inference_ms = timings.inference.as_millis() as u64,
            total_ms = timings.total.as_millis() as u64,
            finish_reason = name(finished.reason),
            seed = finished.seed,
            "Success"
        );
    }

    /// Durations of a sequence that ends now.
    fn timings(&self, finished: &Finished) -> RequestTimings {
        let now = Instant::now();
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let first_token = progress.first_token.unwrap_or(now);
        RequestTimings {
            total: now.duration_since(self.received),
            validation: finished.queued.duration_since(self.received),
            queue: finished.started.duration_since(finished.queued),
            inference: now.duration_since(finished.started),
            first_token: first_token.duration_since(self.received),
        }
    }
}

/// A reason as the native API and the logs write it.
pub(crate) fn name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::EndOfSequence => "eos_token",
        FinishReason::StopSequence => "stop_sequence",
    }
}
