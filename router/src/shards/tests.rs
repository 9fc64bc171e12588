//! The real shards against a scripted service, over real sockets.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::extensions::{INPUT_IDS, SAMPLING_MORE};
use proto::units::{BatchId, BlockCount, BlockId, RequestId, TokenCount, TokenId};
use proto::v3;

use super::scripted_server::ScriptedStack;
use super::{GrpcShards, Recovery, ShardError, Shards, StepOutput, WarmupLimits, connect, scripted};
use crate::adapters::Adapter;
use crate::availability::Availability;
use crate::batching::{
    Admission, Batcher, Capacity, Event, Grant, Limits, NewBatch, PromptPolicy, StepPlan, Waiting,
};
use crate::metrics::{BucketLimits, Metrics};
use crate::request::ValidRequest;
use crate::supervisor::Supervisor;

const DEADLINE: Duration = Duration::from_secs(10);

async fn shards(stack: &ScriptedStack) -> GrpcShards {
    let shards = connect(&stack.master(), DEADLINE).await.unwrap();
    stack.calls();
    shards
}

fn admission(id: u64, request: ValidRequest) -> Admission {
    let (prompt, output) = (request.prompt.length(), request.stopping.max_new_tokens);
    Admission {
        id: RequestId(id),
        request: Arc::new(request),
        blocks: vec![BlockId(7), BlockId(3)],
        reach: Some(TokenCount(prompt.0 + output.0 - 1)),
        generated: Vec::new(),
        cached: TokenCount(0),
        chunk: prompt,
    }
}

/// A plan that admits requests of the given ids and numbers of new tokens.
fn prefill(id: u64, requests: &[(u64, u32)], continues: bool) -> StepPlan {
    let admissions =
        requests.iter().map(|&(id, tokens)| admission(id, scripted::request(2, tokens, 0))).collect();
    let batch = Some(NewBatch { id: BatchId(id), admissions, joins: None });
    StepPlan { batch, continues, ..StepPlan::default() }
}

fn decode(drops: &[u64]) -> StepPlan {
    StepPlan { drops: drops.iter().copied().map(RequestId).collect(), continues: true, ..StepPlan::default() }
}

async fn step(shards: &mut GrpcShards, plan: StepPlan) -> StepOutput {
    shards.step(&plan).await.unwrap()
}

#[tokio::test]
async fn connecting_discovers_clears_and_asks() {
    let stack = ScriptedStack::start(2);
    stack.rank(1).info.dtype = "torch.bfloat16".to_owned();
    let shards = connect(&stack.master(), DEADLINE).await.unwrap();
    assert_eq!(stack.calls(), ["discover", "clear all", "info"]);
    assert_eq!(shards.info().dtype, "torch.bfloat16", "the last rank speaks for all");
    assert_eq!(stack.rank(1).calls, ["clear all", "info"]);
}

#[tokio::test]
async fn connecting_waits_for_the_socket() {
    let mut stack = ScriptedStack::prepare(1);
    let path = stack.master();
    let connecting = tokio::spawn(async move { connect(&path, DEADLINE).await });
    tokio::task::yield_now().await;
    stack.listen();
    assert!(connecting.await.unwrap().is_ok());
}

#[tokio::test]
async fn connecting_gives_up_and_names_the_socket() {
    let stack = ScriptedStack::prepare(1);
    let error = connect(&stack.master(), Duration::ZERO).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("Could not connect to Text Generation server: "), "{text}");
    assert!(text.contains("shard-0: No such file or directory"), "{text}");
}

#[tokio::test]
async fn a_model_without_shards_is_an_error() {
    let stack = ScriptedStack::start(1);
    stack.rank(0).urls.clear();
    assert_eq!(connect(&stack.master(), DEADLINE).await.unwrap_err(), ShardError::Empty);
}

#[tokio::test]
async fn rows_that_leave_are_filtered_out_in_the_order_of_the_shards() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9), (1, 1), (2, 9)], false)).await;
    step(&mut shards, decode(&[1])).await;
    assert_eq!(stack.calls(), ["prefill 0 with 0,1,2", "filter 0 to 0,2", "decode 0"]);
}

#[tokio::test]
async fn a_batch_of_which_nobody_stays_is_cleared() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9), (1, 9)], false)).await;
    let plan = StepPlan { continues: false, ..decode(&[0, 1]) };
    assert_eq!(step(&mut shards, plan).await.generations, []);
    assert_eq!(stack.calls(), ["prefill 0 with 0,1", "clear 0"]);
}

#[tokio::test]
async fn a_batch_that_stopped_as_a_whole_needs_no_call() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    let output = step(&mut shards, prefill(0, &[(0, 1)], false)).await;
    assert_eq!(output.generations[0].end.as_ref().unwrap().text, "t");
    step(&mut shards, StepPlan { continues: false, ..decode(&[0]) }).await;
    assert_eq!(stack.calls(), ["prefill 0 with 0"]);
}

#[tokio::test]
async fn new_rows_join_the_cached_batch_in_one_call() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9)], false)).await;
    let output = step(&mut shards, prefill(1, &[(1, 9)], true)).await;
    assert_eq!(output.generations.len(), 2);
    step(&mut shards, decode(&[])).await;
    assert_eq!(stack.calls(), ["prefill 0 with 0", "prefill 1 with 1 onto 0", "decode 0"]);
}

#[tokio::test]
async fn batches_that_were_prefilled_alone_are_joined_by_a_decode() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9)], false)).await;
    step(&mut shards, prefill(1, &[(1, 9)], false)).await;
    step(&mut shards, decode(&[])).await;
    step(&mut shards, decode(&[0])).await;
    let calls = ["prefill 0 with 0", "prefill 1 with 1", "decode 0,1", "filter 0 to 1", "decode 0"];
    assert_eq!(stack.calls(), calls);
}

#[tokio::test]
async fn each_request_is_answered_by_its_owner_and_the_slowest_rank_tells_the_time() {
    let stack = ScriptedStack::start(3);
    let mut shards = shards(&stack).await;
    let output = step(&mut shards, prefill(0, &[(0, 9), (1, 9), (2, 9)], false)).await;
    let order: Vec<u64> = output.generations.iter().map(|generation| generation.request.0).collect();
    assert_eq!(order, [2, 0, 1], "the last rank's come first");
    assert_eq!(output.timings.total, Duration::from_micros(3));
}

#[tokio::test]
async fn a_failed_prefill_clears_what_it_touched() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9)], false)).await;
    stack.rank(0).failure = Some("out of memory".to_owned());
    let error = shards.step(&prefill(1, &[(1, 9)], false)).await.unwrap_err();
    assert_eq!(error.to_string(), "Server error: out of memory");
    step(&mut shards, decode(&[])).await;
    assert_eq!(stack.calls(), ["prefill 0 with 0", "prefill 1 with 1", "clear 1", "decode 0"]);
}

#[tokio::test]
async fn a_failed_decode_clears_every_batch() {
    let stack = ScriptedStack::start(2);
    let mut shards = shards(&stack).await;
    step(&mut shards, prefill(0, &[(0, 9)], false)).await;
    step(&mut shards, prefill(1, &[(1, 9)], false)).await;
    stack.rank(1).failure = Some("device lost".to_owned());
    let error = shards.step(&decode(&[])).await.unwrap_err();
    assert_eq!(error, ShardError::Server("device lost".to_owned()), "one rank is enough");
    let calls = ["prefill 0 with 0", "prefill 1 with 1", "decode 0,1", "clear 0", "clear 1"];
    assert_eq!(stack.calls(), calls);
    let error = shards.step(&decode(&[])).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Server error: unexpected answer: the batch of the running requests is gone"
    );
}

#[tokio::test]
async fn dead_shards_are_a_connection_error() {
    let mut stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    stack.stop().await;
    let error = shards.step(&prefill(0, &[(0, 9)], false)).await.unwrap_err();
    assert!(matches!(error, ShardError::Connection(_)), "{error:?}");
    assert!(matches!(shards.health().check().await, Err(ShardError::Connection(_))));
}

#[tokio::test]
async fn health_is_bad_when_one_rank_hangs() {
    let stack = ScriptedStack::start(2);
    let shards = shards(&stack).await;
    let health = shards.health();
    assert_eq!(health.check().await, Ok(()));
    stack.rank(1).hangs = true;
    // Time passes only while everybody waits, so the limit is reached at once.
    tokio::time::pause();
    let error = health.check().await.unwrap_err();
    assert_eq!(error, ShardError::Connection("no answer within 10 s".to_owned()));
}

#[tokio::test]
async fn a_request_travels_whole() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    let mut request = scripted::request(6, 3, 0);
    request.stopping.stop_sequences = vec!["stop".to_owned()];
    request.top_n_tokens = 2;
    let mut cut = admission(4, request);
    cut.chunk = TokenCount(5);
    let batch = Some(NewBatch { id: BatchId(0), admissions: vec![cut], joins: None });
    step(&mut shards, StepPlan { batch, ..StepPlan::default() }).await;
    let request = stack.rank(0).prefilled.remove(0);
    assert_eq!((request.id, request.truncate, request.chunk_len), (4, 6, Some(5)));
    assert_eq!((request.blocks, request.slots), (vec![7, 3], vec![28, 29, 30, 31, 12, 13, 14, 15]));
    assert_eq!(
        (request.inputs.as_str(), request.add_special_tokens, request.top_n_tokens),
        ("a b c", true, 2)
    );
    let text = v3::input_chunk::Chunk::Text("a b c".to_owned());
    assert_eq!(request.input_chunks.unwrap().chunks, [v3::InputChunk { chunk: Some(text) }]);
    assert_eq!(request.stopping_parameters.unwrap().stop_sequences, ["stop"]);
    assert_eq!((request.parameters.unwrap().seed, request.input_ids), (7, Vec::new()));
}

#[tokio::test]
async fn extensions_are_spoken_to_shards_that_announce_them() {
    let stack = ScriptedStack::start(1);
    stack.rank(0).info.extensions = [INPUT_IDS, SAMPLING_MORE, "news"].map(str::to_owned).to_vec();
    let mut shards = shards(&stack).await;
    let mut request = scripted::request(3, 3, 0);
    request.sampling.min_p = 0.25;
    request.sampling.logit_bias = vec![(TokenId(9), -1.0)];
    let batch = Some(NewBatch { id: BatchId(0), admissions: vec![admission(0, request)], joins: None });
    step(&mut shards, StepPlan { batch, ..StepPlan::default() }).await;
    let request = stack.rank(0).prefilled.remove(0);
    assert_eq!((request.input_ids, request.chunk_len), (vec![0, 1, 2], None));
    assert_eq!((request.inputs, request.input_chunks.unwrap().chunks), (String::new(), Vec::new()));
    let parameters = request.parameters.unwrap();
    assert_eq!((parameters.min_p, parameters.logit_bias.len()), (0.25, 1));
}

#[tokio::test]
async fn rows_of_one_batch_may_have_different_adapters() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    let mut plan = prefill(0, &[(0, 3), (1, 3)], false);
    for (id, name, wire_id) in [(2, "poet", "poet"), (3, "poet", "poet#1")] {
        let mut request = scripted::request(2, 3, 0);
        request.adapter = Some(Adapter::new(name, wire_id).0);
        plan.batch.as_mut().unwrap().admissions.push(admission(id, request));
    }
    step(&mut shards, plan).await;
    let prefilled = &stack.rank(0).prefilled;
    let adapters: Vec<_> = prefilled.iter().map(|request| request.adapter_id.as_deref()).collect();
    assert_eq!(adapters, [None, None, Some("poet"), Some("poet#1")]);
}

#[tokio::test]
async fn shards_that_do_not_announce_it_load_no_adapters() {
    let stack = ScriptedStack::start(1);
    assert!(shards(&stack).await.adapters().is_none());
}

#[tokio::test]
async fn warmup_runs_on_every_rank_and_takes_the_least() {
    let stack = ScriptedStack::start(2);
    for (rank, capacity) in [800, 640].into_iter().enumerate() {
        stack.rank(rank).warm = v3::WarmupResponse {
            max_supported_total_tokens: Some(capacity),
            max_input_tokens: 99,
            max_total_tokens: 100,
        };
    }
    let limits = WarmupLimits {
        max_input_tokens: None,
        max_total_tokens: Some(TokenCount(100)),
        max_batch_prefill_tokens: TokenCount(64),
        max_batch_size: None,
    };
    let warm = shards(&stack).await.warmup(limits).await.unwrap();
    assert_eq!((warm.capacity, warm.max_input_tokens), (Some(TokenCount(640)), TokenCount(99)));
    let sent = stack.rank(1).warmed.take().unwrap();
    assert_eq!(
        (sent.max_prefill_tokens, sent.max_total_tokens, sent.max_input_tokens),
        (64, Some(100), None)
    );
}

#[tokio::test]
async fn the_batcher_serves_over_real_sockets() {
    let stack = ScriptedStack::start(2);
    let shards = shards(&stack).await;
    let limits = Limits {
        capacity: Capacity::new(BlockCount(100), shards.info()),
        max_batch_prefill_tokens: TokenCount(64),
        max_batch_size: None,
        max_concurrent_requests: 8,
        prompts: PromptPolicy::Chunked,
        extensions: shards.info().extensions,
        shared_prompt_max: TokenCount(0),
        stretch: None,
    };
    let bounds = BucketLimits { max_input_tokens: TokenCount(100), max_total_tokens: TokenCount(100) };
    let batcher = Batcher::start(shards, limits, Metrics::new(bounds), Availability::starting());
    let (waiting, mut events) = Waiting::new(scripted::request(5, 3, 0), Instant::now());
    batcher.submit(waiting).await.unwrap();
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event.unwrap());
    }
    let Some(Event::Last(_, finished)) = last else { panic!("{last:?}") };
    assert_eq!((finished.text.as_str(), finished.tokens), ("ttt", TokenCount(3)));
}

/// A stack whose shards understand everything, and a router's end of it that brings shards back.
async fn recoverable(world: usize) -> (ScriptedStack, GrpcShards) {
    let stack = ScriptedStack::start(world);
    for index in 0..world {
        let mut rank = stack.rank(index);
        rank.info.extensions =
            ["input_ids", "resume", "block_grants", "adapters"].map(str::to_owned).to_vec();
        rank.warm.max_supported_total_tokens = Some(400);
        (rank.warm.max_input_tokens, rank.warm.max_total_tokens) = (99, 100);
    }
    let shards = shards(&stack).await;
    let limits = WarmupLimits {
        max_input_tokens: Some(TokenCount(99)),
        max_total_tokens: Some(TokenCount(100)),
        max_batch_prefill_tokens: TokenCount(64),
        max_batch_size: None,
    };
    let recovery = Recovery::new(&stack.master(), limits, None, None, Supervisor::none());
    let shards = shards.recovered_by(recovery);
    (stack, shards)
}

#[tokio::test]
async fn grants_and_drops_travel_with_the_step() {
    let (stack, mut shards) = recoverable(1).await;
    let admission = |id| {
        let admission = admission(id, scripted::request(2, 9, 0));
        Admission { reach: None, blocks: vec![BlockId(id as u32 + 1)], ..admission }
    };
    let admissions = vec![admission(1), admission(2)];
    let batch = Some(NewBatch { id: BatchId(0), admissions, joins: None });
    step(&mut shards, StepPlan { batch, ..StepPlan::default() }).await;
    assert!(stack.rank(0).prefilled.iter().all(|request| request.slots.is_empty()));
    let grants = vec![
        Grant { id: RequestId(2), blocks: vec![BlockId(7), BlockId(9)], tokens: None },
        Grant { id: RequestId(3), blocks: vec![], tokens: Some(TokenCount(0)) },
    ];
    let plan = StepPlan { drops: vec![RequestId(1)], continues: true, grants, ..StepPlan::default() };
    step(&mut shards, plan).await;
    // A row that the shards have forgotten is not dropped again.
    step(&mut shards, decode(&[1])).await;
    let calls = stack.calls();
    assert_eq!(
        calls,
        ["prefill 0 with 1,2", "decode 0, 2 gets [7, 9], 3 gets [] and 0 tokens, without 1", "decode 0"]
    );
}

#[tokio::test]
async fn a_request_goes_on_after_an_internal_error_of_its_shards() {
    let (stack, shards) = recoverable(2).await;
    let limits = Limits {
        capacity: Capacity::new(BlockCount(100), shards.info()),
        max_batch_prefill_tokens: TokenCount(64),
        max_batch_size: None,
        max_concurrent_requests: 8,
        prompts: PromptPolicy::Chunked,
        extensions: shards.info().extensions,
        shared_prompt_max: TokenCount(u32::MAX),
        stretch: None,
    };
    let bounds = BucketLimits { max_input_tokens: TokenCount(100), max_total_tokens: TokenCount(100) };
    let availability = Availability::starting();
    let batcher = Batcher::start(shards, limits, Metrics::new(bounds), availability.clone());
    let (waiting, mut events) = Waiting::new(scripted::request(5, 6, 0), Instant::now());
    batcher.submit(waiting).await.unwrap();
    let (mut tokens, mut end) = (Vec::new(), None);
    while let Some(event) = events.recv().await {
        match event.unwrap() {
            Event::Prompt(_) => {}
            Event::Token(step) => tokens.push(step.token.id.0),
            Event::Last(step, finished) => {
                tokens.push(step.token.id.0);
                end = Some(finished);
            }
        }
        if tokens.len() == 2 {
            stack.rank(1).failure = Some("out of order".to_owned());
        }
    }
    assert_eq!(tokens, [1, 2, 3, 4, 5, 6]);
    assert_eq!(end.map(|finished| finished.tokens), Some(TokenCount(6)));
    let resumed = stack.rank(0).prefilled[0].clone();
    assert!(resumed.generated >= 2, "{resumed:?}");
    assert_eq!(resumed.input_ids.len() as u32, 5 + resumed.generated);
    let warmed = stack.rank(0).warmed.clone().unwrap();
    assert_eq!((warmed.max_input_tokens, warmed.max_total_tokens), (Some(99), Some(100)));
    assert_eq!(availability.check(), Ok(()));
}

#[tokio::test]
async fn adapters_that_were_loaded_are_loaded_again() {
    let (stack, mut shards) = recoverable(2).await;
    let adapters = shards.adapters().unwrap();
    adapters.load("poet#1", "/data/poet").await.unwrap();
    adapters.load("judge#2", "/data/judge").await.unwrap();
    adapters.unload("judge#2").await.unwrap();
    (0..2).for_each(|index| stack.rank(index).adapters.clear());
    let capacity = shards.restore(&ShardError::Server("lost".to_owned())).await.unwrap();
    assert_eq!(capacity.blocks, BlockCount(100));
    for index in 0..2 {
        assert_eq!(stack.rank(index).adapters, ["poet#1"]);
    }
}

#[tokio::test]
async fn a_refusal_counts_as_one_only_if_all_ranks_refuse() {
    let (stack, mut shards) = recoverable(2).await;
    let refuse = |ranks: &[usize]| {
        ranks.iter().for_each(|index| stack.rank(*index).refusal = Some("no".to_owned()));
    };
    refuse(&[0, 1]);
    let error = shards.step(&prefill(0, &[(1, 9)], false)).await.unwrap_err();
    assert_eq!(error, ShardError::Refused("no".to_owned()));
    refuse(&[1]);
    let error = shards.step(&prefill(1, &[(1, 9)], false)).await.unwrap_err();
    assert_eq!(error, ShardError::Server("no".to_owned()));
}

#[tokio::test]
async fn shards_that_are_not_to_be_brought_back_stay_away() {
    let stack = ScriptedStack::start(1);
    let mut shards = shards(&stack).await;
    let error = shards.restore(&ShardError::Connection("gone".to_owned())).await.unwrap_err();
    assert!(matches!(error, ShardError::Abandoned(_)), "{error}");
}
