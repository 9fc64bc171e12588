//! What goes wrong, and that it costs nobody else.

use proto::units::{BatchId, RequestId, TokenCount};

use super::{BREAKS, NAN, POISON, Shard, at_blocks, expected, ids_of, parts, request, requests, tokens};
use crate::engine::Engine;
use crate::engine::answer::StepReport;
use crate::engine::error::EngineError;
use crate::engine::request::{NewBatch, NewRequest, Prompt};
use crate::engine::step_plan::StepPlan;

#[test]
fn a_request_that_cannot_be_served_is_named_and_costs_nobody_else() {
    let shard = Shard::start(100);
    shard.prefill(0, vec![request(1, "fine", 9)], None).unwrap();
    let check = |change: fn(&mut NewRequest), text: &str| {
        let mut bad = request(8, "prompt", 4);
        change(&mut bad);
        for onto in [None, Some(0)] {
            let error = shard.prefill(1, vec![request(7, "good", 4), bad.clone()], onto).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    };
    check(|bad| bad.prompt = Prompt::Ids(vec![]), "request 8: the prompt has no tokens");
    check(|bad| bad.prompt = Prompt::Ids(vec![1, 300]), "token 300 is outside of the vocabulary of 259");
    check(|bad| bad.cached = TokenCount(6), "cache_len 6 must be below the request's 6 tokens");
    check(
        |bad| bad.chunk = Some(TokenCount(7)),
        "chunk_len 7 must be between 1 and the 6 tokens that are not cached",
    );
    check(|bad| bad.chunk = Some(TokenCount(0)), "chunk_len 0");
    check(|bad| bad.stopping.tokens_max = TokenCount(0), "max_new_tokens must be at least 1");
    check(|bad| bad.stopping.tokens_max = TokenCount(u32::MAX), "exceed the model's 256 positions");
    check(|bad| bad.stopping.tokens_max = TokenCount(44), "48 slots for 49 token positions");
    check(|bad| bad.placement = at_blocks(&[1_000_000]), "slot 16000015 is outside of the cache of");
    check(|bad| bad.id = RequestId(7), "request 7 is in batch 1 twice");
    assert!(shard.prefill(1, vec![], None).unwrap_err().to_string().contains("batch 1 has no requests"));
    assert!(
        shard.prefill(0, vec![request(2, "x", 4)], None).unwrap_err().to_string().contains("exists already")
    );
    let onto_itself = shard.prefill(1, vec![request(1, "x", 4)], Some(0)).unwrap_err();
    assert!(onto_itself.to_string().contains("request 1 is in batch 0 twice"));
    assert_eq!(requests(&shard.decode(&[0]).unwrap()), [1]);
}

#[test]
fn unknown_and_repeated_batches_cost_the_known_ones_nothing() {
    let shard = Shard::start(100);
    shard.prefill(0, vec![request(1, "fine", 9)], None).unwrap();
    let text = |result: Result<StepReport, EngineError>| result.unwrap_err().to_string();
    assert_eq!(text(shard.decode(&[0, 3])), "Batch ID 3 not found in cache.");
    assert_eq!(text(shard.decode(&[0, 0])), "batch 0 is named twice");
    assert_eq!(text(shard.decode(&[])), "no batch is named");
    assert_eq!(text(shard.prefill(4, vec![request(2, "x", 1)], Some(3))), "Batch ID 3 not found in cache.");
    assert_eq!(shard.filter(3, &[1]).unwrap_err().to_string(), "Batch ID 3 not found in cache.");
    assert_eq!(requests(&shard.decode(&[0]).unwrap()), [1]);
}

#[test]
fn a_panic_costs_its_own_batch_and_the_engine_goes_on() {
    let shard = Shard::start(100);
    shard.prefill(0, vec![request(1, "fine", 9)], None).unwrap();
    let mut poisoned = request(2, "x", 4);
    poisoned.prompt = Prompt::Ids(vec![POISON]);
    let error = shard.prefill(1, vec![poisoned], None).unwrap_err();
    assert_eq!(error.to_string(), "the engine failed in this step: poisoned");
    assert_eq!(shard.engine.health(), Ok(()));
    assert!(shard.decode(&[1]).is_err());
    assert_eq!(tokens(&shard.decode(&[0]).unwrap().generations), expected(&ids_of("fine"), 2)[1..]);
}

#[test]
fn a_device_that_fails_ends_the_engine_and_the_error_names_operation_and_requests() {
    let shard = Shard::start(100);
    let mut fatal = request(2, "x", 4);
    fatal.prompt = Prompt::Ids(vec![BREAKS]);
    let error = shard.prefill(1, vec![request(1, "fine", 4), fatal], None).unwrap_err();
    assert_eq!(error.to_string(), "the device failed in a step of requests 1, 2: norm: an illegal address");
    assert!(matches!(shard.decode(&[1]), Err(EngineError::Gone)));
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let shard = Shard::start(100);
    let mut bad = request(2, "x", 4);
    bad.prompt = Prompt::Ids(vec![NAN]);
    let error = shard.prefill(1, vec![bad], None).unwrap_err();
    assert_eq!(error.to_string(), "request 2: the model's logits are not numbers");
}

#[test]
fn steps_before_the_warm_up_are_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let engine = Engine::start(parts()).unwrap();
    let batch = NewBatch { id: BatchId(0), requests: vec![request(1, "x", 1)] };
    let error = runtime.block_on(engine.prefill(batch, None, StepPlan::default())).unwrap_err();
    assert!(matches!(error, EngineError::NotWarm), "{error}");
}
