//! The front door of the batcher: permit, validate, submit, stream.
//!
//! A request holds a permit per sequence from before its validation until its stream ends or is dropped; with none left
//! the answer is "overloaded", at once. Dropping a stream closes its channel, which is how the batcher learns that the
//! client has left.
//!
//! What becomes of a request is counted here alone, once however many sequences it has: its [`Record`] takes the first
//! outcome, and one that goes away without any was dropped by its client.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_stream::stream;
use futures::Stream;
use futures::future::try_join_all;
use proto::units::TokenCount;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::adapters::{Adapter, UnknownAdapter};
use crate::batching::{Batcher, Event, FinishReason, Finished, PromptToken, Step, Stopped, Waiting};
use crate::chat::template::TemplateError;
use crate::metrics::{Failure, Metrics, RequestTimings};
use crate::request::params::Params;
use crate::request::terms::Terms;
use crate::request::validate::{ValidationError, Validator};
use crate::request::{Priority, ValidRequest};
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
    #[error(transparent)]
    UnknownAdapter(#[from] UnknownAdapter),
}

impl InferError {
    /// What the metrics call it.
    fn counted_as(&self) -> Failure {
        match self {
            Self::Validation(_) | Self::GrammarWithTools | Self::UnknownAdapter(_) => Failure::Validation,
            Self::Overloaded => Failure::Overloaded,
            Self::Template(_) => Failure::Template,
            Self::Incomplete | Self::ShuttingDown => Failure::Incomplete,
            Self::Shard(ShardError::Deadline(_)) => Failure::Timeout,
            Self::Stopped(_) | Self::Shard(_) => Failure::Generation,
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
    pub(crate) terms: Terms,
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

    /// Resolves when requests cannot be handed over any more.
    pub(crate) async fn ended(&self) {
        self.batcher.ended().await;
    }

    /// Generates all sequences of a request to their ends. The first failure fails them all. With `best_of`, the best
    /// sequence comes first.
    pub(crate) async fn generate(&self, request: Request) -> Result<Vec<Generation>, InferError> {
        let best_of = request.params.best_of.is_some();
        let record = self.record(request.id, request.received);
        let sequences = self.admit(request, &record).await?;
        let mut generations = try_join_all(sequences.into_iter().map(Generating::collect)).await?;
        if best_of {
            best_first(&mut generations);
        }
        record.generated(&generations, best_of);
        Ok(generations)
    }

    /// Admits a request and hands its sequences to the batcher.
    pub(crate) async fn start(&self, request: Request) -> Result<Vec<Generating>, InferError> {
        let record = self.record(request.id, request.received);
        self.admit(request, &record).await
    }

    /// Counts and logs a request that failed before it could be handed over.
    pub(crate) fn refuse(&self, id: Uuid, error: InferError) -> InferError {
        self.record(id, Instant::now()).failed(&error);
        error
    }

    /// Begins to follow a request.
    fn record(&self, id: Uuid, received: Instant) -> Arc<Record> {
        self.metrics.request_received();
        Arc::new(Record { id, received, metrics: self.metrics.clone(), progress: Mutex::default() })
    }

    async fn admit(&self, request: Request, record: &Arc<Record>) -> Result<Vec<Generating>, InferError> {
        self.try_admit(request, record).await.inspect_err(|error| record.failed(error))
    }

    async fn try_admit(&self, request: Request, record: &Arc<Record>) -> Result<Vec<Generating>, InferError> {
        let Request { received, inputs, params, terms, streamed, .. } = request;
        self.validator.check_sequences(&params, streamed)?;
        let adapter = self.validator.adapter(&params)?;
        let count = params.sequences();
        let permits = self.permits.clone().try_acquire_many_owned(count);
        let mut permits = permits.map_err(|_| InferError::Overloaded)?;

        let mut valid = self.validator.validate(inputs, params, adapter).await?;
        terms.apply(&mut valid, received);
        self.metrics.request_validated(valid.prompt.length(), valid.stopping.max_new_tokens);
        record.admitted(count, &valid);
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

/// Moves the sequence of the highest mean log-probability, the first of equals, in front of the others.
fn best_first(generations: &mut [Generation]) {
    let means = generations.iter().map(Generation::mean_logprob).enumerate();
    let best = means.reduce(|best, other| if other.1 > best.1 { other } else { best });
    if let Some((best, _)) = best {
        generations[..=best].rotate_right(1);
    }
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
        self.record.progress().prompt_tokens
    }

    /// The next event; `None` after the last one or an error. Whoever reads the last event of a request has had it all.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, InferError>> {
        let event = self.receive().await?;
        if let Ok(Event::Last(_, finished)) = &event {
            self.record.streamed(finished);
        }
        Some(event)
    }

    async fn receive(&mut self) -> Option<Result<Event, InferError>> {
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
            Ok(Event::Last(..)) => {
                self.permit = None;
                self.record.token();
            }
            Err(error) => {
                self.permit = None;
                self.record.failed(error);
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
    async fn collect(mut self) -> Result<Generation, InferError> {
        let (mut prompt, mut steps) = (Vec::new(), Vec::new());
        while let Some(event) = self.receive().await {
            match event? {
                Event::Prompt(tokens) => prompt = tokens,
                Event::Token(step) => steps.push(step),
                Event::Last(step, finished) => {
                    steps.push(step);
                    let timings = self.record.timings(&finished);
                    let prompt_tokens = self.prompt_tokens();
                    return Ok(Generation { prompt, steps, finished, prompt_tokens, timings });
                }
            }
        }
        Err(InferError::Incomplete)
    }
}

/// What is written down about a request, however many sequences it has: one outcome, one log line.
#[derive(Debug)]
struct Record {
    id: Uuid,
    received: Instant,
    metrics: Metrics,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    prompt_tokens: TokenCount,
    /// Name of the adapter, if the request has one.
    adapter: Option<String>,
    priority: Priority,
    first_token: Option<Instant>,
    /// Streams that have not ended.
    running: u32,
    /// Generated by those that have.
    tokens: TokenCount,
    /// Whether its outcome is counted.
    settled: bool,
}

impl Record {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admitted(&self, sequences: u32, request: &ValidRequest) {
        let mut progress = self.progress();
        progress.running = sequences;
        progress.prompt_tokens = request.prompt.length();
        progress.priority = request.priority;
        progress.adapter = request.adapter.as_deref().map(Adapter::name).map(str::to_owned);
    }

    fn token(&self) {
        self.progress().first_token.get_or_insert_with(Instant::now);
    }

    /// One of the streams has ended. The last of them gives the times.
    fn streamed(&self, finished: &Finished) {
        let tokens = {
            let mut progress = self.progress();
            progress.running -= 1;
            progress.tokens.0 += finished.tokens.0;
            if progress.running > 0 {
                return;
            }
            progress.tokens
        };
        self.succeeded(finished, &self.timings(finished), tokens);
    }

    /// All sequences are there. The client has got the first of them if it wanted the best, else all.
    fn generated(&self, generations: &[Generation], best_of: bool) {
        let slowest = generations.iter().max_by_key(|generation| generation.timings.total);
        let slowest = slowest.expect("a request has at least one sequence");
        let (told, tokens) = match best_of {
            true => (&generations[0], generations[0].finished.tokens.0),
            false => (slowest, generations.iter().map(|generation| generation.finished.tokens.0).sum()),
        };
        let timings = RequestTimings { total: slowest.timings.total, ..told.timings };
        self.succeeded(&told.finished, &timings, TokenCount(tokens));
    }

    fn succeeded(&self, finished: &Finished, timings: &RequestTimings, tokens: TokenCount) {
        if !self.settle() {
            return;
        }
        self.metrics.request_succeeded(timings, tokens);
        let progress = self.progress();
        tracing::info!(
            request_id = %self.id.simple(),
            adapter = progress.adapter,
            priority = (progress.priority != Priority::default()).then_some(progress.priority.get()),
            tokens_prompt = progress.prompt_tokens.0,
            tokens_cached = finished.cached.0,
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

    fn failed(&self, error: &InferError) {
        if self.settle() {
            self.metrics.request_failed(error.counted_as());
            tracing::error!(request_id = %self.id.simple(), "{error}");
        }
    }

    /// True for the first outcome, which is the one that counts.
    fn settle(&self) -> bool {
        !std::mem::replace(&mut self.progress().settled, true)
    }

    /// Durations of a sequence that ends now.
    fn timings(&self, finished: &Finished) -> RequestTimings {
        let now = Instant::now();
        let first_token = self.progress().first_token.unwrap_or(now);
        RequestTimings {
            total: now.duration_since(self.received),
            validation: finished.queued.duration_since(self.received),
            queue: finished.started.duration_since(finished.queued),
            inference: now.duration_since(finished.started),
            first_token: first_token.duration_since(self.received),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.settle() {
            self.metrics.request_failed(Failure::Dropped);
            tracing::info!(request_id = %self.id.simple(), "Dropped by its client");
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
