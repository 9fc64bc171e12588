//! What a step costs before and after the shards: plan and apply, with 256 rows running and 1000 requests waiting.

use std::num::NonZeroUsize;
use std::time::Instant;

use divan::Bencher;
use proto::units::{BlockCount, BlockSize, RequestId, TokenCount, TokenId};
use router::batching::{
    Capacity, Event, FinishReason, Limits, PromptPolicy, Scheduler, Step, StepPlan, Token, Waiting,
};
use router::request::{Priority, Prompt, Sampling, Stopping, ValidRequest};
use router::shards::{End, Extensions, Generation, ShardError, StepOutput};
use tokio::sync::mpsc::Receiver;

const RUNNING: usize = 256;
const WAITING: usize = 1000;
const FINISHING: usize = 8;

fn main() {
    divan::main();
}

/// A full batch in the middle of its output, and a long queue.
struct Busy {
    scheduler: Scheduler,
    now: Instant,
    /// Clients that listen.
    _clients: Vec<Receiver<Result<Event, ShardError>>>,
}

/// When rows get their blocks.
#[derive(Clone, Copy, Debug)]
enum Policy {
    UpFront,
    OnDemand,
}

const POLICIES: [Policy; 2] = [Policy::UpFront, Policy::OnDemand];

impl Busy {
    fn new(policy: Policy) -> Self {
        let capacity = Capacity {
            blocks: BlockCount(20_000),
            block_size: BlockSize::new(16).expect("16 is not 0"),
            speculate: TokenCount(0),
        };
        let limits = Limits {
            capacity,
            max_batch_prefill_tokens: TokenCount(1 << 20),
            max_batch_size: NonZeroUsize::new(RUNNING),
            max_concurrent_requests: RUNNING + WAITING,
            prompts: PromptPolicy::Chunked,
            extensions: match policy {
                Policy::UpFront => Extensions::default(),
                Policy::OnDemand => {
                    Extensions { input_ids: true, resume: true, block_grants: true, ..Extensions::default() }
                }
            },
            shared_prompt_max: TokenCount(u32::MAX),
            stretch: None,
        };
        let mut busy = Self { scheduler: Scheduler::new(limits), now: Instant::now(), _clients: Vec::new() };
        for _ in 0..RUNNING + WAITING {
            let (waiting, client) = Waiting::new(request(), busy.now);
            busy.scheduler.submit(waiting);
            busy._clients.push(client);
        }
        let plan = busy.plan();
        assert_eq!(plan.batch.map_or(0, |batch| batch.admissions.len()), RUNNING);
        busy.scheduler.apply(output(0));
        busy
    }

    fn plan(&mut self) -> StepPlan {
        self.scheduler.plan(self.now)
    }
}

fn request() -> ValidRequest {
    let ids = (0..512).map(TokenId).collect();
    ValidRequest {
        prompt: Prompt { text: "word ".repeat(512), ids, add_special_tokens: true },
        sampling: Sampling {
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            count_penalty: 0.0,
            min_p: 0.0,
            logit_bias: Vec::new(),
            watermark: false,
            seed: 0,
        },
        stopping: Stopping {
            max_new_tokens: TokenCount(256),
            stop_sequences: Vec::new(),
            ignore_eos_token: false,
        },
        prompt_logprobs: false,
        top_n_tokens: 0,
        adapter: None,
        priority: Priority::default(),
        deadline: None,
    }
}

/// One token for every running row; the first `finishing` ones stop.
fn output(finishing: usize) -> StepOutput {
    let generation = |row: usize| {
        let token = Token { id: TokenId(7), text: "word".to_owned(), logprob: -0.5, special: false };
        let end = || End {
            text: "word".repeat(20),
            tokens: TokenCount(20),
            reason: FinishReason::EndOfSequence,
            seed: None,
        };
        Generation {
            request: RequestId(row as u64),
            prompt: None,
            earlier: Vec::new(),
            newest: Step { token, alternatives: Vec::new() },
            end: (row < finishing).then(end),
        }
    };
    StepOutput { generations: (0..RUNNING).map(generation).collect(), ..StepOutput::default() }
}

/// The usual step: nobody leaves, nobody fits.
#[divan::bench(args = POLICIES)]
fn plan_a_decode(bencher: Bencher<'_, '_>, policy: Policy) {
    let mut busy = Busy::new(policy);
    bencher.bench_local(|| busy.plan());
}

/// Eight rows have finished, eight waiting requests take their places.
#[divan::bench(args = POLICIES)]
fn plan_eight_admissions(bencher: Bencher<'_, '_>, policy: Policy) {
    let finished = || {
        let mut busy = Busy::new(policy);
        busy.plan();
        busy.scheduler.apply(output(FINISHING));
        busy
    };
    bencher.with_inputs(finished).bench_local_refs(Busy::plan);
}

/// 256 tokens go out to their clients.
#[divan::bench(args = POLICIES)]
fn apply_a_decode(bencher: Bencher<'_, '_>, policy: Policy) {
    let planned = || {
        let mut busy = Busy::new(policy);
        busy.plan();
        (busy, Some(output(0)))
    };
    bencher.with_inputs(planned).bench_local_refs(|(busy, output)| {
        busy.scheduler.apply(output.take().expect("each input is used once"));
    });
}
