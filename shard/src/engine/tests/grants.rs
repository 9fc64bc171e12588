//! Blocks and tokens step by step: what a router grants decides when something is computed, never what comes of it.

use std::collections::HashMap;

use proto::units::{BlockId, RequestId, TokenCount};

use super::resumption::{requests as cases, resumed, shard_with_adapter};
use super::{NAN, Shard, at_blocks, expected, ids_of, request, requests, tokens, tokens_of};
use crate::engine::answer::{Failure, Generation, StepReport};
use crate::engine::error::EngineError;
use crate::engine::request::{NewRequest, Placement, Prompt};
use crate::engine::step_plan::{Grant, StepPlan};
use crate::sampling::NotNumbers;

pub(super) fn at_first_blocks(blocks: &[u32]) -> Placement {
    Placement::Granted { blocks: blocks.iter().copied().map(BlockId).collect() }
}

pub(super) fn grant(request: u64, blocks: &[u32], tokens: Option<u32>) -> Grant {
    let blocks = blocks.iter().copied().map(BlockId).collect();
    Grant { request: RequestId(request), blocks, tokens: tokens.map(TokenCount) }
}

pub(super) fn plan(grants: Vec<Grant>) -> StepPlan {
    StepPlan { grants, ..StepPlan::default() }
}

fn drops(ids: &[u64]) -> StepPlan {
    StepPlan { drops: ids.iter().copied().map(RequestId).collect(), ..StepPlan::default() }
}

/// What a router knows of a request that it grants blocks to.
struct Leased {
    blocks: Vec<u32>,
    granted: usize,
    computed: usize,
    given: usize,
}

impl Leased {
    /// Lets the request begin with `chunk` tokens and no more blocks than they need.
    fn begin(request: &mut NewRequest, blocks: &[u32], chunk: usize) -> Self {
        let Prompt::Ids(ids) = &request.prompt else { panic!("{request:?}") };
        let chunk = chunk.min(ids.len());
        let granted = chunk.div_ceil(16);
        request.placement = at_first_blocks(&blocks[..granted]);
        request.chunk = Some(TokenCount(chunk as u32));
        Self { blocks: blocks.to_vec(), granted, computed: chunk, given: ids.len() }
    }

    /// Up to `wanted` tokens, and the blocks that they need beyond those that are there.
    fn grant(&mut self, request: u64, wanted: usize) -> Grant {
        let left = self.given.saturating_sub(self.computed).max(1);
        let tokens = wanted.min(left);
        self.computed += tokens;
        let needed = self.computed.div_ceil(16).max(self.granted);
        let blocks = &self.blocks[self.granted..needed];
        self.granted = needed;
        grant(request, blocks, Some(tokens as u32))
    }
}

/// Runs requests together, each with six blocks of its own; in step `n`, request `id` feeds up to `wanted(n, id)` tokens.
fn run(shard: &Shard, mut new: Vec<NewRequest>, wanted: impl Fn(usize, u64) -> usize) -> Vec<StepReport> {
    let mut leased = HashMap::new();
    for request in &mut new {
        let first = 6 * request.id.0 as u32;
        let blocks = [4, 1, 3, 0, 5, 2].map(|block| first + block);
        leased.insert(request.id.0, Leased::begin(request, &blocks, wanted(0, request.id.0).max(1)));
    }
    let mut reports = vec![shard.prefill(7, new, None).unwrap()];
    let mut running: Vec<u64> = leased.keys().copied().collect();
    for step in 1.. {
        let last = reports.last().unwrap();
        running.retain(|id| {
            let own = last.generations.iter().find(|generation| generation.request.0 == *id);
            own.is_none_or(|generation| generation.end.is_none())
        });
        if last.batch.is_none() {
            assert!(running.is_empty());
            return reports;
        }
        assert!(step < 500, "it never ends");
        let grants =
            running.iter().map(|id| leased.get_mut(id).unwrap().grant(*id, wanted(step, *id))).collect();
        reports.push(shard.decode_by(&[7], plan(grants)).unwrap());
    }
    unreachable!("steps are counted without end");
}

fn generations_of(id: u64, reports: &[StepReport]) -> Vec<Generation> {
    let all = reports.iter().flat_map(|report| &report.generations);
    all.filter(|generation| generation.request.0 == id).cloned().collect()
}

#[test]
fn blocks_that_come_one_at_a_time_are_as_good_as_all_of_them_up_front() {
    let shard = shard_with_adapter(100);
    for (name, request) in cases() {
        let whole = shard.alone(request.clone());
        for chunk in [1, 7, 16, 100] {
            let reports = run(&shard, vec![request.clone()], |_, _| chunk);
            assert_eq!(generations_of(1, &reports), whole, "{name}, {chunk} tokens at a time");
        }
    }
}

#[test]
fn who_sits_out_and_when_changes_nothing() {
    let shard = shard_with_adapter(100);
    let mut new: Vec<NewRequest> = cases().into_iter().map(|(_, request)| request).collect();
    let whole: Vec<_> = new.iter().map(|request| shard.alone(request.clone())).collect();
    for (request, id) in new.iter_mut().zip(1..) {
        request.id.0 = id;
    }
    // In some steps nobody has a turn.
    let turns = |step: usize, id: u64| match (step * 7 + id as usize * 3) % 11 {
        _ if step % 13 == 12 => 0,
        0..5 => 0,
        other => other - 4,
    };
    let reports = run(&shard, new, turns);
    assert!(reports.iter().any(|report| report.generations.is_empty() && report.batch.is_some()));
    for (whole, id) in whole.iter().zip(1..) {
        let mut own = generations_of(id, &reports);
        own.iter_mut().for_each(|generation| generation.request.0 = 1);
        assert_eq!(own, *whole, "request {id}");
    }
}

#[test]
fn a_step_in_which_all_sit_out_does_nothing_and_the_batch_stays() {
    let shard = Shard::start(100);
    let first = shard.prefill(0, vec![request(1, "one", 5), request(2, "two", 5)], None).unwrap();
    let nothing = plan(vec![grant(1, &[], Some(0)), grant(2, &[], Some(0))]);
    let still = shard.decode_by(&[0], nothing).unwrap();
    assert_eq!((still.generations.len(), &still.batch), (0, &first.batch));
    assert_eq!(tokens_of(1, &[first, shard.decode(&[0]).unwrap()]), expected(&ids_of("one"), 2));
}

#[test]
fn the_summary_speaks_of_the_blocks_that_are_there_and_of_the_shards_own_plan() {
    let shard = Shard::start(100);
    let mut long = request(1, &"long".repeat(10), 5);
    long.placement = at_first_blocks(&[8]);
    long.chunk = Some(TokenCount(10));
    let batch = shard.prefill(0, vec![long, request(2, "x", 5)], None).unwrap().batch.unwrap();
    assert_eq!((batch.tokens_max, batch.tokens_next), (TokenCount(16 + 48), TokenCount(30 + 1)));
    let granted = plan(vec![grant(1, &[3], Some(22))]);
    let batch = shard.decode_by(&[0], granted).unwrap().batch.unwrap();
    assert_eq!((batch.tokens_max, batch.tokens_next), (TokenCount(32 + 48), TokenCount(8 + 1)));
}

#[test]
fn a_router_may_say_how_much_of_a_prompt_is_computed_without_granting_blocks() {
    let shard = Shard::start(3);
    let long = "long".repeat(10);
    let mut first = request(1, &long, 4);
    first.chunk = Some(TokenCount(4));
    let mut reports = vec![shard.prefill(0, vec![first], None).unwrap()];
    reports.push(shard.decode_by(&[0], plan(vec![grant(1, &[], Some(20))])).unwrap());
    // Left to itself the shard computes three.
    reports.push(shard.decode(&[0]).unwrap());
    reports.push(shard.decode_by(&[0], plan(vec![grant(1, &[], Some(13))])).unwrap());
    assert_eq!(tokens_of(1, &reports), expected(&ids_of(&long), 1));
}

#[test]
fn leaving_with_a_step_is_as_good_as_being_filtered_out_before_it() {
    let start = || {
        let shard = Shard::start(100);
        shard.prefill(0, vec![request(1, "one", 6), request(2, "two", 6)], None).unwrap();
        shard.prefill(1, vec![request(3, "three", 6), request(4, "four", 6)], None).unwrap();
        shard
    };
    let shown = |report: StepReport| format!("{:?} {:?}", report.generations, report.batch);
    let (by_filter, by_step) = (start(), start());
    by_filter.filter(0, &[2]).unwrap();
    by_filter.filter(1, &[3]).unwrap();
    // Some of them were never there.
    let together = by_step.decode_by(&[0, 1], drops(&[1, 4, 77])).unwrap();
    assert_eq!(requests(&together), [2, 3]);
    assert_eq!(shown(together), shown(by_filter.decode(&[0, 1]).unwrap()));
    by_filter.filter(0, &[3]).unwrap();
    let joined = by_step.prefill_by(2, vec![request(5, "five", 6)], Some(0), drops(&[2])).unwrap();
    assert_eq!(shown(joined), shown(by_filter.prefill(2, vec![request(5, "five", 6)], Some(0)).unwrap()));
    assert_eq!(shown(by_step.decode(&[0]).unwrap()), shown(by_filter.decode(&[0]).unwrap()));
}

#[test]
fn all_may_leave_a_batch_that_others_join_and_come_back_with_them() {
    let shard = Shard::start(100);
    let mut reports = vec![shard.prefill(0, vec![request(1, "one", 6), request(2, "two", 6)], None).unwrap()];
    reports.push(shard.decode(&[0]).unwrap());
    let known = tokens_of(1, &reports);
    let again = resumed(&request(1, "one", 6), &known);
    reports.push(shard.prefill_by(1, vec![again], Some(0), drops(&[1, 2])).unwrap());
    assert_eq!(reports.last().unwrap().batch.as_ref().unwrap().requests, [RequestId(1)]);
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[0]).unwrap());
    }
    assert_eq!(tokens_of(1, &reports), expected(&ids_of("one"), 6));
}

#[test]
fn a_plan_that_cannot_be_is_refused_by_name_and_changes_nothing() {
    let shard = Shard::start(100);
    let mut long = request(1, &"long".repeat(10), 5);
    long.placement = at_first_blocks(&[8, 9]);
    long.chunk = Some(TokenCount(30));
    let mut reports =
        vec![shard.prefill(0, vec![long, request(2, "two", 5), request(3, "x", 1)], None).unwrap()];
    let limit = shard.blocks;
    let refused = |plan: StepPlan, text: &str| {
        for onto_decode in [true, false] {
            let result = match onto_decode {
                true => shard.decode_by(&[0], plan.clone()),
                false => shard.prefill_by(1, vec![request(9, "new", 2)], Some(0), plan.clone()),
            };
            let error = result.unwrap_err();
            assert!(error.is_refusal(), "{error:?}");
            assert_eq!(error.to_string(), text);
        }
    };
    let grants = |grants: &[Grant]| plan([&[grant(1, &[5], Some(10))], grants].concat());
    refused(StepPlan::default(), "request 1: 32 slots for 40 token positions");
    refused(plan(vec![grant(1, &[], Some(3))]), "request 1: 32 slots for 33 token positions");
    refused(plan(vec![grant(1, &[5], Some(11))]), "request 1: 11 tokens are granted, 10 are left");
    refused(grants(&[grant(2, &[], Some(2))]), "request 2: 2 tokens are granted, 1 are left");
    refused(grants(&[grant(3, &[], Some(1))]), "request 3: 1 tokens are granted, 0 are left");
    refused(grants(&[grant(2, &[6], None)]), "request 2 came with its slots and takes no further blocks");
    refused(grants(&[grant(4, &[6], None)]), "a grant names request 4, which is in no batch of this step");
    refused(grants(&[grant(9, &[6], None)]), "a grant names request 9, which is in no batch of this step");
    refused(grants(&[grant(1, &[6], None)]), "two grants name request 1");
    refused(grants(&[grant(2, &[5], None)]), "block 5 is granted twice");
    refused(plan(vec![grant(1, &[5, 5], None)]), "block 5 is granted twice");
    refused(plan(vec![grant(1, &[9], None)]), "request 1: block 9 is there twice");
    refused(plan(vec![grant(1, &[0], None)]), "request 1: block 0 is reserved");
    refused(
        plan(vec![grant(1, &[limit], None)]),
        &format!("request 1: block {limit} is outside of the cache of {limit} blocks"),
    );
    let leaves = StepPlan { grants: vec![grant(1, &[5], None)], ..drops(&[1]) };
    refused(leaves, "a grant names request 1, which is in no batch of this step");
    let nobody = shard.decode_by(&[0], drops(&[1, 2, 3])).unwrap_err();
    assert_eq!(nobody.to_string(), "all requests of the batches leave; clear the batches instead");
    let alone = shard.prefill_by(1, vec![request(9, "new", 2)], None, grants(&[])).unwrap_err();
    assert_eq!(alone.to_string(), "a grant names request 1, which is in no batch of this step");
    reports.push(shard.decode_by(&[0], grants(&[])).unwrap());
    assert_eq!(tokens_of(1, &reports), expected(&ids_of(&"long".repeat(10)), 1));
    assert_eq!(tokens_of(2, &reports), expected(&ids_of("two"), 2));
}

#[test]
fn blocks_that_come_with_a_request_must_reach_as_far_as_its_first_step() {
    let shard = Shard::start(100);
    let refused = |blocks: &[u32], cached: u32, chunk: u32, text: &str| {
        let mut bad = request(8, &"long".repeat(10), 4);
        bad.placement = at_first_blocks(blocks);
        (bad.cached, bad.chunk) = (TokenCount(cached), Some(TokenCount(chunk)));
        let error = shard.prefill(1, vec![bad], None).unwrap_err();
        assert!(error.is_refusal(), "{error:?}");
        assert_eq!(error.to_string(), text);
    };
    refused(&[5], 0, 17, "request 8: 16 slots for 17 token positions");
    refused(&[5, 6], 16, 17, "request 8: 32 slots for 33 token positions");
    refused(&[5, 5], 0, 17, "request 8: block 5 is there twice");
    refused(&[5, 0], 0, 17, "request 8: block 0 is reserved");
    refused(
        &[1 << 30],
        0,
        1,
        &format!("request 8: block {} is outside of the cache of {} blocks", 1 << 30, shard.blocks),
    );
}

#[test]
fn a_request_without_numbers_ends_alone_where_the_router_knows_how() {
    let shard = Shard::start(100);
    let bad = |placement: Placement| {
        let mut bad = request(2, "x", 4);
        bad.prompt = Prompt::Ids(vec![97, NAN]);
        bad.placement = placement;
        bad
    };
    let failure = Failure { request: RequestId(2), reason: NotNumbers };
    let mut company = vec![request(1, "one", 4), bad(at_first_blocks(&[20])), request(3, "three", 4)];
    let report = shard.prefill(0, company.clone(), None).unwrap();
    assert_eq!((requests(&report), &report.failures[..]), (vec![1, 3], &[failure][..]));
    assert_eq!(report.batch.as_ref().unwrap().tokens_next, TokenCount(2));
    let mut reports = vec![report];
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[0]).unwrap());
    }
    assert!(reports[1..].iter().all(|report| report.failures.is_empty()));
    assert_eq!(tokens_of(1, &reports), expected(&ids_of("one"), 4));
    assert_eq!(tokens_of(3, &reports), expected(&ids_of("three"), 4));
    // One that has been away, too.
    let mut again = bad(at_blocks(&[20]));
    again.generated = TokenCount(1);
    let report = shard.prefill(0, vec![again], None).unwrap();
    assert_eq!((report.failures, report.batch), (vec![failure], None));
    // But where somebody would wait for an answer, all learn that there is none.
    company[1] = bad(at_blocks(&[20]));
    assert!(matches!(shard.prefill(0, company, None), Err(EngineError::Logits { .. })));
}

#[test]
fn a_request_that_was_granted_blocks_goes_on_elsewhere() {
    let shard = shard_with_adapter(100);
    for (name, request) in cases() {
        let whole = shard.alone(request.clone());
        let known = whole.len() / 2;
        let again = resumed(&request, &tokens(&whole)[..known]);
        assert_eq!(generations_of(1, &run(&shard, vec![again], |_, _| 9)), whole[known..], "{name}");
    }
}
