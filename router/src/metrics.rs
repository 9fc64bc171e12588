//! Every series the router exports: names, units, labels and buckets. Updated here and nowhere else.
//!
//! Names follow Text Generation Inference, so that its dashboards work: durations are in seconds, and no name has a unit
//! or `_total` behind it. Every series exists from the start, with the value 0.

use std::sync::Arc;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use proto::units::{BlockCount, TokenCount};

use crate::batching::{JoinReason, Load, StepKind};
use crate::shards::Timings;

/// Guesses per step that the buckets of `tgi_request_skipped_tokens` tell apart. Longer runs do not pay off in practice,
/// and are counted in the last bucket.
const SKIPPED_TOKENS_MAX: u32 = 16;

/// All series. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Series>);

/// The limits that the buckets of token counts spread over, known after warm-up.
#[derive(Clone, Copy, Debug)]
pub struct BucketLimits {
    /// Longest prompt.
    pub max_input_tokens: TokenCount,
    /// Longest prompt and output together.
    pub max_total_tokens: TokenCount,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It asked for something that is not allowed.
    Validation,
    /// There was no permit left.
    Overloaded,
    /// A shard, or the connection to it, failed.
    Generation,
    /// The stream ended without an end.
    Incomplete,
    /// The chat template failed.
    Template,
    /// The client left before its end had been handed to it.
    Dropped,
    /// It did not end within the time that its client gave it.
    Timeout,
}

/// Where the time of a finished request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTimings {
    /// From its arrival to its end.
    pub total: Duration,
    /// From its arrival to the queue.
    pub validation: Duration,
    /// From the queue to a batch.
    pub queue: Duration,
    /// From the batch to its end.
    pub inference: Duration,
    /// From its arrival to its first token.
    pub first_token: Duration,
}

#[derive(Debug)]
struct Series {
    registry: Registry,
    request_count: IntCounter,
    request_success: IntCounter,
    request_failure: IntCounterVec,
    request_duration: Histogram,
    request_duration_seconds: Histogram,
    request_validation_duration: Histogram,
    request_queue_duration: Histogram,
    request_inference_duration: Histogram,
    request_mean_time_per_token_duration: Histogram,
    request_time_to_first_token: Histogram,
    request_generated_tokens: Histogram,
    request_input_length: Histogram,
    request_max_new_tokens: Histogram,
    request_skipped_tokens: Histogram,
    queue_size: IntGauge,
    batch_next_size: Histogram,
    batch_current_size: IntGauge,
    batch_current_max_tokens: IntGauge,
    batch_max_total_tokens: IntGauge,
    batch_waiting: IntGauge,
    batch_concat: IntCounterVec,
    batch_inference_count: IntCounterVec,
    batch_inference_success: IntCounterVec,
    batch_inference_failure: IntCounterVec,
    batch_inference_duration: HistogramVec,
    batch_forward_duration: HistogramVec,
    batch_decode_duration: HistogramVec,
    batch_filter_duration: HistogramVec,
    batch_concat_duration: HistogramVec,
    kv_cache_utilization: Gauge,
    kv_cache_cached_blocks: IntGauge,
    prefix_cache_hit_tokens: IntCounter,
    prefix_cache_lookup_tokens: IntCounter,
    request_preempted: IntCounter,
    shard_restarts: IntCounter,
}

/// What requests count. Each ends in exactly one success or failure, which its record in `infer.rs` sees to.
impl Metrics {
    /// All series at 0, in a registry of their own.
    pub fn new(limits: BucketLimits) -> Self {
        Self(Arc::new(Series::new(limits)))
    }

    /// A request has arrived. Once per HTTP generation request, prompt of a list, or chat.
    pub fn request_received(&self) {
        self.0.request_count.inc();
    }

    /// A request has passed validation.
    pub fn request_validated(&self, input: TokenCount, max_new_tokens: TokenCount) {
        self.0.request_input_length.observe(f64::from(input.0));
        self.0.request_max_new_tokens.observe(f64::from(max_new_tokens.0));
    }

    /// A request has failed.
    pub fn request_failed(&self, failure: Failure) {
        self.0.request_failure.with_label_values(&[failure.label()]).inc();
    }

    /// A request has delivered its end, with `generated` tokens: those of all its sequences, or of the best if only that
    /// was wanted.
    pub fn request_succeeded(&self, timings: &RequestTimings, generated: TokenCount) {
        let series = &self.0;
        let inference = timings.inference.as_secs_f64();
        series.request_success.inc();
        series.request_duration.observe(timings.total.as_secs_f64());
        series.request_duration_seconds.observe(timings.total.as_secs_f64());
        series.request_validation_duration.observe(timings.validation.as_secs_f64());
        series.request_queue_duration.observe(timings.queue.as_secs_f64());
        series.request_inference_duration.observe(inference);
        series.request_time_to_first_token.observe(timings.first_token.as_secs_f64());
        series.request_mean_time_per_token_duration.observe(inference / f64::from(generated.0.max(1)));
        series.request_generated_tokens.observe(f64::from(generated.0));
    }

    /// All series in Prometheus' text format.
    pub fn render(&self) -> String {
        TextEncoder::new()
            .encode_to_string(&self.0.registry.gather())
            .expect("series are valid and text is in memory")
    }
}

/// What the batcher counts.
impl Metrics {
    /// A request is on its way into the queue.
    pub(crate) fn queue_entered(&self) {
        self.0.queue_size.inc();
    }

    /// It did not get there.
    pub(crate) fn queue_refused(&self) {
        self.0.queue_size.dec();
    }

    /// The size of the cache, the reserved block left out.
    pub(crate) fn capacity(&self, tokens: TokenCount) {
        self.0.batch_max_total_tokens.set(i64::from(tokens.0));
    }

    /// How busy the scheduler is; `inbox` requests have not reached it yet.
    pub(crate) fn load(&self, load: &Load, inbox: usize) {
        self.0.queue_size.set((load.waiting + inbox) as i64);
        self.0.batch_waiting.set(load.waiting as i64);
        self.0.batch_current_size.set(load.running as i64);
        self.0.batch_current_max_tokens.set(i64::from(load.reserved.0));
        self.0.kv_cache_utilization.set(load.cache_used);
    }

    /// New rows enter a batch.
    pub(crate) fn batch_formed(&self, size: usize, joins: Option<JoinReason>) {
        self.0.batch_next_size.observe(size as f64);
        if let Some(reason) = joins {
            self.0.batch_concat.with_label_values(&[reason.label()]).inc();
        }
    }

    /// A step goes to the shards.
    pub(crate) fn step_sent(&self, kind: StepKind) {
        self.0.batch_inference_count.with_label_values(&[kind.label()]).inc();
    }

    /// A step was not carried out.
    pub(crate) fn step_failed(&self, kind: StepKind) {
        self.0.batch_inference_failure.with_label_values(&[kind.label()]).inc();
    }

    /// A step is complete: `inference` from the call to the delivered tokens, `filter` for delivering them and dropping
    /// rows.
    pub(crate) fn step_done(&self, kind: StepKind, inference: Duration, filter: Duration, timings: &Timings) {
        let method = [kind.label()];
        self.0.batch_inference_success.with_label_values(&method).inc();
        self.0.batch_inference_duration.with_label_values(&method).observe(inference.as_secs_f64());
        self.0.batch_filter_duration.with_label_values(&method).observe(filter.as_secs_f64());
        self.0.batch_forward_duration.with_label_values(&method).observe(timings.forward.as_secs_f64());
        self.0.batch_decode_duration.with_label_values(&method).observe(timings.decode.as_secs_f64());
        if let Some(concat) = timings.concat {
            // Dashboards look for all of them under "decode"; those of prefills can be told apart besides.
            let concats = &self.0.batch_concat_duration;
            concats.with_label_values(&[StepKind::Decode.label()]).observe(concat.as_secs_f64());
            if kind == StepKind::Prefill {
                concats.with_label_values(&method).observe(concat.as_secs_f64());
            }
        }
    }

    /// A row generated `tokens` tokens in one step.
    pub(crate) fn generation(&self, tokens: usize) {
        self.0.request_skipped_tokens.observe(tokens.saturating_sub(1) as f64);
    }

    /// So many requests had to leave the batch, and resume later.
    pub fn preempted(&self, requests: u64) {
        self.0.request_preempted.inc_by(requests);
    }

    /// The shards are there again after a failure.
    pub fn shard_restarted(&self) {
        self.0.shard_restarts.inc();
    }

    /// Requests have entered a batch for the first time: of the `total` tokens of their prompts, the keys and values of
    /// `cached` were there already.
    pub fn prompts_cached(&self, cached: u64, total: u64) {
        self.0.prefix_cache_hit_tokens.inc_by(cached);
        self.0.prefix_cache_lookup_tokens.inc_by(total);
    }

    /// So many blocks are held by no request, and kept for those that may come.
    pub fn blocks_cached(&self, blocks: BlockCount) {
        self.0.kv_cache_cached_blocks.set(blocks.0.into());
    }
}

impl Series {
    fn new(limits: BucketLimits) -> Self {
        let registry = Registry::new();
        let make = Make { registry: &registry };
        let tokens = hundredths(limits.max_total_tokens);
        let inputs = hundredths(limits.max_input_tokens);
        let skipped = (0..=SKIPPED_TOKENS_MAX).map(f64::from).collect();
        let sizes = (1..=1024).map(f64::from).collect();
        let failures = Failure::ALL.map(Failure::label);
        let reasons = JoinReason::ALL.map(JoinReason::label);
        Self {
            request_count: make.counter("tgi_request_count", "Generation requests received"),
            request_success: make.counter("tgi_request_success", "Requests that delivered their end"),
            request_failure: make.counters(
                "tgi_request_failure",
                "Requests that failed, by cause",
                "err",
                &failures,
            ),
            request_duration: make.durations("tgi_request_duration", "Arrival to end, in seconds"),
            request_duration_seconds: make.durations(
                "tgi_request_duration_seconds",
                "Same as tgi_request_duration: arrival to end, in seconds",
            ),
            request_validation_duration: make
                .durations("tgi_request_validation_duration", "Arrival to queue, in seconds"),
            request_queue_duration: make
                .durations("tgi_request_queue_duration", "Queue to batch, in seconds"),
            request_inference_duration: make
                .durations("tgi_request_inference_duration", "Batch to end, in seconds"),
            request_mean_time_per_token_duration: make.durations(
                "tgi_request_mean_time_per_token_duration",
                "Batch to end divided by generated tokens, in seconds",
            ),
            request_time_to_first_token: make
                .durations("tgi_request_time_to_first_token", "Arrival to first token, in seconds"),
            request_generated_tokens: make.histogram(
                "tgi_request_generated_tokens",
                "Generated tokens of a request",
                tokens.clone(),
            ),
            request_input_length: make.histogram(
                "tgi_request_input_length",
                "Prompt tokens of a request",
                inputs,
            ),
            request_max_new_tokens: make.histogram(
                "tgi_request_max_new_tokens",
                "Most tokens a request may generate",
                tokens,
            ),
            request_skipped_tokens: make.histogram(
                "tgi_request_skipped_tokens",
                "Speculated tokens accepted in one step of one request",
                skipped,
            ),
            queue_size: make.gauge("tgi_queue_size", "Requests in the queue and on their way into it"),
            batch_next_size: make.histogram(
                "tgi_batch_next_size",
                "Requests that enter a batch together",
                sizes,
            ),
            batch_current_size: make.gauge("tgi_batch_current_size", "Requests running"),
            batch_current_max_tokens: make
                .gauge("tgi_batch_current_max_tokens", "Cache tokens reserved by the running requests"),
            batch_max_total_tokens: make
                .gauge("tgi_batch_max_total_tokens", "Cache tokens that requests can reserve together"),
            batch_waiting: make.gauge(
                "tgi_batch_waiting",
                "Requests that the last plan left waiting for a place in the batch",
            ),
            batch_concat: make.counters(
                "tgi_batch_concat",
                "New requests joined running ones",
                "reason",
                &reasons,
            ),
            batch_inference_count: make.steps("tgi_batch_inference_count", "Steps sent to the shards"),
            batch_inference_success: make.steps("tgi_batch_inference_success", "Steps carried out"),
            batch_inference_failure: make.steps("tgi_batch_inference_failure", "Steps not carried out"),
            batch_inference_duration: make
                .step_durations("tgi_batch_inference_duration", "Step sent to tokens delivered, in seconds"),
            batch_forward_duration: make.step_durations(
                "tgi_batch_forward_duration",
                "Forward pass and sampling on the slowest shard, in seconds",
            ),
            batch_decode_duration: make.step_durations(
                "tgi_batch_decode_duration",
                "Text and stopping on the slowest shard, in seconds",
            ),
            batch_filter_duration: make.step_durations(
                "tgi_batch_filter_duration",
                "Delivering tokens and dropping requests, in seconds",
            ),
            batch_concat_duration: make.step_durations(
                "tgi_batch_concat_duration",
                "Joining batches on the slowest shard, in seconds; decode has all, prefill those of prefills",
            ),
            kv_cache_utilization: make
                .share("tgi_kv_cache_utilization", "Reserved share of the cache blocks, 0 to 1"),
            kv_cache_cached_blocks: make.gauge(
                "tgi_kv_cache_cached_blocks",
                "Cache blocks that no request holds, kept for prompts that begin alike",
            ),
            prefix_cache_hit_tokens: make.counter(
                "tgi_prefix_cache_hit_tokens",
                "Prompt tokens found in the cache when their request entered a batch first",
            ),
            prefix_cache_lookup_tokens: make.counter(
                "tgi_prefix_cache_lookup_tokens",
                "Prompt tokens of the requests that entered a batch, found in the cache or not",
            ),
            request_preempted: make.counter(
                "tgi_request_preempted",
                "Times that a running request gave up its place, to resume later",
            ),
            shard_restarts: make
                .counter("tgi_shard_restarts", "Times that the shards came back after a failure"),
            registry,
        }
    }
}

/// Makes series and registers them.
struct Make<'a> {
    registry: &'a Registry,
}

impl Make<'_> {
    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn share(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn durations(&self, name: &str, help: &str) -> Histogram {
        self.histogram(name, help, duration_buckets())
    }

    /// Counters by the values of one label, all of which exist from the start.
    fn counters(&self, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
        let counters = self.register(IntCounterVec::new(Opts::new(name, help), &[label]));
        values.iter().for_each(|value| drop(counters.with_label_values(&[value])));
        counters
    }

    fn steps(&self, name: &str, help: &str) -> IntCounterVec {
        self.counters(name, help, "method", &StepKind::ALL.map(StepKind::label))
    }

    fn step_durations(&self, name: &str, help: &str) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(duration_buckets());
        let durations = self.register(HistogramVec::new(options, &["method"]));
        StepKind::ALL.iter().for_each(|kind| drop(durations.with_label_values(&[kind.label()])));
        durations
    }

    fn register<C: Collector + Clone + 'static>(&self, series: prometheus::Result<C>) -> C {
        let series = series.expect("names, labels and buckets are valid");
        self.registry.register(Box::new(series.clone())).expect("names are unique");
        series
    }
}

/// 0.0001 × 1.5^k for k = 1 to 35, by repeated multiplication as in the reference, so that the bounds print alike.
fn duration_buckets() -> Vec<f64> {
    std::iter::successors(Some(0.0001 * 1.5), |bound| Some(bound * 1.5)).take(35).collect()
}

/// 100 equal steps up to a limit.
fn hundredths(limit: TokenCount) -> Vec<f64> {
    let step = f64::from(limit.0.max(1)) / 100.0;
    (1..=100).map(|index| step * f64::from(index)).collect()
}

impl Failure {
    const ALL: [Self; 7] = [
        Self::Validation,
        Self::Overloaded,
        Self::Generation,
        Self::Incomplete,
        Self::Template,
        Self::Dropped,
        Self::Timeout,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Overloaded => "overloaded",
            Self::Generation => "generation",
            Self::Incomplete => "incomplete",
            Self::Template => "template",
            Self::Dropped => "dropped",
            Self::Timeout => "timeout",
        }
    }
}

impl StepKind {
    const ALL: [Self; 2] = [Self::Prefill, Self::Decode];

    fn label(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl JoinReason {
    const ALL: [Self; 3] = [Self::Chunking, Self::Backpressure, Self::WaitExceeded];

    fn label(self) -> &'static str {
        match self {
            Self::Chunking => "chunking",
            Self::Backpressure => "backpressure",
            Self::WaitExceeded => "wait_exceeded",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(BucketLimits { max_input_tokens: TokenCount(1000), max_total_tokens: TokenCount(2000) })
    }

    fn timings() -> RequestTimings {
        let ms = Duration::from_millis;
        RequestTimings {
            total: ms(500),
            validation: ms(1),
            queue: ms(99),
            inference: ms(400),
            first_token: ms(150),
        }
    }

    #[track_caller]
    fn assert_series(text: &str, series: &[&str]) {
        for line in series {
            assert!(text.lines().any(|found| found == *line), "`{line}` is missing in\n{text}");
        }
    }

    #[test]
    fn every_series_exists_from_the_start() {
        let text = metrics().render();
        assert_series(
            &text,
            &[
                "# TYPE tgi_request_count counter",
                "tgi_request_count 0",
                "tgi_request_success 0",
                "tgi_request_failure{err=\"overloaded\"} 0",
                "tgi_request_failure{err=\"dropped\"} 0",
                "# TYPE tgi_queue_size gauge",
                "tgi_queue_size 0",
                "tgi_batch_current_size 0",
                "tgi_batch_concat{reason=\"wait_exceeded\"} 0",
                "tgi_batch_inference_count{method=\"prefill\"} 0",
                "tgi_batch_concat_duration_count{method=\"decode\"} 0",
                "# TYPE tgi_request_skipped_tokens histogram",
                "tgi_request_skipped_tokens_bucket{le=\"0\"} 0",
                "tgi_kv_cache_utilization 0",
                "# TYPE tgi_kv_cache_cached_blocks gauge",
                "tgi_kv_cache_cached_blocks 0",
                "# TYPE tgi_request_preempted counter",
                "tgi_request_preempted 0",
                "tgi_shard_restarts 0",
                "tgi_prefix_cache_hit_tokens 0",
                "tgi_prefix_cache_lookup_tokens 0",
                "tgi_request_failure{err=\"timeout\"} 0",
            ],
        );
    }

    #[test]
    fn what_the_cache_saves_and_what_is_done_twice_is_counted() {
        let metrics = metrics();
        metrics.prompts_cached(32, 40);
        metrics.prompts_cached(0, 5);
        metrics.blocks_cached(BlockCount(7));
        metrics.blocks_cached(BlockCount(3));
        metrics.preempted(2);
        metrics.preempted(0);
        metrics.shard_restarted();
        assert_series(
            &metrics.render(),
            &[
                "tgi_prefix_cache_hit_tokens 32",
                "tgi_prefix_cache_lookup_tokens 45",
                "tgi_kv_cache_cached_blocks 3",
                "tgi_request_preempted 2",
                "tgi_shard_restarts 1",
            ],
        );
    }

    #[test]
    fn the_alias_carries_the_same_observations() {
        let metrics = metrics();
        metrics.request_succeeded(&timings(), TokenCount(4));
        let text = metrics.render();
        assert_series(
            &text,
            &[
                "tgi_request_duration_sum 0.5",
                "tgi_request_duration_count 1",
                "tgi_request_duration_seconds_sum 0.5",
                "tgi_request_duration_seconds_count 1",
                "tgi_request_mean_time_per_token_duration_sum 0.1",
                "tgi_request_time_to_first_token_sum 0.15",
                "tgi_request_generated_tokens_sum 4",
                "tgi_request_success 1",
            ],
        );
    }

    #[test]
    fn buckets_are_those_of_the_reference() {
        let text = metrics().render();
        let count = |prefix: &str| text.lines().filter(|line| line.starts_with(prefix)).count();
        assert_eq!(count("tgi_request_duration_bucket"), 36);
        assert_eq!(count("tgi_request_input_length_bucket"), 101);
        assert_eq!(count("tgi_batch_next_size_bucket"), 1025);
        assert_series(
            &text,
            &[
                "tgi_request_duration_bucket{le=\"0.00015000000000000001\"} 0",
                "tgi_request_input_length_bucket{le=\"10\"} 0",
                "tgi_request_generated_tokens_bucket{le=\"2000\"} 0",
            ],
        );
    }

    #[test]
    fn concatenations_are_all_found_under_decode() {
        let metrics = metrics();
        let timings = Timings { concat: Some(Duration::from_secs(1)), ..Timings::default() };
        for kind in StepKind::ALL {
            metrics.step_done(kind, Duration::ZERO, Duration::ZERO, &timings);
        }
        let text = metrics.render();
        assert_series(
            &text,
            &[
                "tgi_batch_concat_duration_count{method=\"decode\"} 2",
                "tgi_batch_concat_duration_count{method=\"prefill\"} 1",
            ],
        );
    }
}
