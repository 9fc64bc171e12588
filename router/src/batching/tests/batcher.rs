//! The task, on a paused clock: time passes only while everybody waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;

use super::*;
use crate::adapters::Adapter;
use crate::availability::Availability;
use crate::batching::{Batcher, Stopped};
use crate::metrics::{BucketLimits, Metrics};

const PAUSE: Duration = Duration::from_secs(1);

fn metrics() -> Metrics {
    Metrics::new(BucketLimits { max_input_tokens: TokenCount(100), max_total_tokens: TokenCount(200) })
}

fn start(limits: Limits, metrics: &Metrics, failure: Option<ShardError>) -> Batcher {
    let mut shards = ScriptedShards::new(limits.clone());
    shards.pause = PAUSE;
    shards.failure = failure;
    Batcher::start(shards, limits, metrics.clone(), Availability::starting())
}

async fn submit(batcher: &Batcher, prompt: u32, max_new_tokens: u32) -> Events {
    let (waiting, events) = Waiting::new(request(prompt, max_new_tokens, 0), Instant::now());
    batcher.submit(waiting).await.unwrap();
    events
}

/// Waits for the end of a stream; returns its number of tokens, or the error.
async fn finish(mut events: Events) -> Result<usize, ShardError> {
    let mut tokens = 0;
    while let Some(event) = events.recv().await {
        event?;
        tokens += 1;
    }
    Ok(tokens)
}

fn value(metrics: &Metrics, series: &str) -> f64 {
    let text = metrics.render();
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no series {series}")).parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn requests_run_together() {
    let batcher = start(limits(PromptPolicy::Chunked), &metrics(), None);
    let started = tokio::time::Instant::now();
    let streams = [submit(&batcher, 4, 5).await, submit(&batcher, 6, 5).await];
    for stream in streams {
        assert_eq!(finish(stream).await, Ok(5));
    }
    assert_eq!(started.elapsed(), 5 * PAUSE);
}

#[tokio::test(start_paused = true)]
async fn a_late_request_joins_in_the_next_step() {
    let batcher = start(limits(PromptPolicy::Chunked), &metrics(), None);
    let mut early = submit(&batcher, 4, 9).await;
    early.recv().await.unwrap().unwrap();
    let started = tokio::time::Instant::now();
    let late = submit(&batcher, 4, 1).await;
    assert_eq!(finish(late).await, Ok(1));
    assert_eq!(started.elapsed(), 2 * PAUSE, "the step under way, and its own");
    assert_eq!(finish(early).await, Ok(8));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_makes_room_for_the_next_one() {
    let batcher = start(at_most(1, limits(PromptPolicy::Chunked)), &metrics(), None);
    let mut leaves = submit(&batcher, 4, 100).await;
    leaves.recv().await.unwrap().unwrap();
    drop(leaves);
    let next = submit(&batcher, 4, 2).await;
    let started = tokio::time::Instant::now();
    assert_eq!(finish(next).await, Ok(2));
    assert!(started.elapsed() <= 3 * PAUSE);
}

#[tokio::test(start_paused = true)]
async fn a_failed_step_is_told_and_the_batcher_goes_on() {
    let metrics = metrics();
    let error = ShardError::Server("scripted".to_owned());
    let batcher = start(limits(PromptPolicy::Chunked), &metrics, Some(error.clone()));
    assert_eq!(finish(submit(&batcher, 4, 2).await).await, Err(error));
    assert_eq!(finish(submit(&batcher, 4, 2).await).await, Ok(2));
    assert!(batcher.is_alive());
    assert_eq!(value(&metrics, "tgi_batch_inference_failure{method=\"prefill\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_when_every_handle_is_gone_and_every_request_is_answered() {
    let batcher = start(limits(PromptPolicy::Chunked), &metrics(), None);
    let watch = batcher.inbox.downgrade();
    let stream = submit(&batcher, 4, 3).await;
    drop(batcher);
    assert_eq!(finish(stream).await, Ok(3));
    assert!(watch.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_adapter_is_held_from_the_queue_to_the_end() {
    let batcher = start(at_most(1, limits(PromptPolicy::Chunked)), &metrics(), None);
    let (adapter, mut released) = Adapter::new("poet", "poet");
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut request = request(4, 2, 0);
        request.adapter = Some(Arc::clone(&adapter));
        let (waiting, events) = Waiting::new(request, Instant::now());
        batcher.submit(waiting).await.unwrap();
        streams.push(events);
    }
    drop(adapter);
    for stream in streams {
        assert_eq!(released.try_recv(), Err(TryRecvError::Empty), "one runs, or waits");
        assert_eq!(finish(stream).await, Ok(2));
    }
    assert!(released.await.is_err(), "nobody holds it");
}

/// Panics in the first step.
struct Broken;

impl crate::shards::Shards for Broken {
    async fn step(&mut self, _: &StepPlan) -> Result<crate::shards::StepOutput, ShardError> {
        panic!("scripted")
    }

    async fn restore(&mut self, error: &ShardError) -> Result<Capacity, ShardError> {
        Err(error.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_batcher_that_died_says_so() {
    let metrics = metrics();
    let batcher =
        Batcher::start(Broken, limits(PromptPolicy::Chunked), metrics.clone(), Availability::starting());
    assert!(batcher.is_alive());
    let stream = submit(&batcher, 4, 2).await;
    assert_eq!(finish(stream).await, Ok(0), "the stream ends without an end");
    batcher.ended().await;
    assert!(!batcher.is_alive());
    let (waiting, _events) = Waiting::new(request(4, 2, 0), Instant::now());
    assert_eq!(batcher.submit(waiting).await, Err(Stopped));
}

#[tokio::test(start_paused = true)]
async fn gauges_follow_the_batch_and_return_to_zero() {
    let metrics = metrics();
    let batcher = start(at_most(1, limits(PromptPolicy::Chunked)), &metrics, None);
    let mut first = submit(&batcher, 4, 5).await;
    let second = submit(&batcher, 4, 5).await;
    assert_eq!(value(&metrics, "tgi_queue_size"), 2.0);
    first.recv().await.unwrap().unwrap();
    assert_eq!(value(&metrics, "tgi_queue_size"), 1.0);
    assert_eq!(value(&metrics, "tgi_batch_waiting"), 1.0);
    assert_eq!(value(&metrics, "tgi_batch_current_size"), 1.0);
    assert_eq!(value(&metrics, "tgi_batch_current_max_tokens"), 8.0);
    assert_eq!(value(&metrics, "tgi_kv_cache_utilization"), 0.05);
    assert_eq!(value(&metrics, "tgi_batch_max_total_tokens"), 160.0);
    finish(first).await.unwrap();
    finish(second).await.unwrap();
    for gauge in ["tgi_queue_size", "tgi_batch_current_size", "tgi_kv_cache_utilization"] {
        assert_eq!(value(&metrics, gauge), 0.0, "{gauge}");
    }
    assert_eq!(value(&metrics, "tgi_batch_inference_success{method=\"prefill\"}"), 2.0);
    assert_eq!(value(&metrics, "tgi_batch_inference_count{method=\"decode\"}"), 8.0);
    assert_eq!(value(&metrics, "tgi_batch_next_size_count"), 2.0);
}
