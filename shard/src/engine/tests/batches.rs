//! Requests together: joining, filtering, stopping, and the same tokens in any company.

use proto::units::{BatchId, BlockCount, RequestId, TokenCount};

use super::{Shard, expected, ids_of, request, requests, tokens, tokens_of};
use crate::engine::request::Placement;
use crate::engine::slots::SlotTable;
use crate::sampling::SamplingParams;
use crate::sampling::tests::greedy;

#[test]
fn prompts_and_decodes_share_a_step() {
    let shard = Shard::start(100);
    let mut reports =
        vec![shard.prefill(0, vec![request(1, "first", 5), request(2, "second", 5)], None).unwrap()];
    let mut late = request(3, "third, in two chunks", 4);
    late.chunk = Some(TokenCount(9));
    let report = shard.prefill(1, vec![late], Some(0)).unwrap();
    assert_eq!(requests(&report), [1, 2]);
    assert!(report.timings.concat.is_some());
    assert_eq!(report.batch.as_ref().unwrap().id, BatchId(0));
    assert_eq!(report.batch.as_ref().unwrap().requests, [1, 2, 3].map(RequestId));
    reports.push(report);
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[0]).unwrap());
    }
    assert_eq!(tokens_of(1, &reports), expected(&ids_of("first"), 5));
    assert_eq!(tokens_of(2, &reports), expected(&ids_of("second"), 5));
    assert_eq!(tokens_of(3, &reports), expected(&ids_of("third, in two chunks"), 4));
}

#[test]
fn decoding_two_batches_joins_them_in_order_under_the_first_id() {
    let shard = Shard::start(100);
    shard.prefill(5, vec![request(3, "c", 9), request(1, "a", 9)], None).unwrap();
    shard.prefill(4, vec![request(2, "b", 9)], None).unwrap();
    let report = shard.decode(&[5, 4]).unwrap();
    assert_eq!(requests(&report), [3, 1, 2]);
    assert_eq!(report.batch.unwrap().id, BatchId(5));
    assert!(report.timings.concat.is_some());
    assert_eq!(shard.decode(&[4]).unwrap_err().to_string(), "Batch ID 4 not found in cache.");
    assert_eq!(requests(&shard.decode(&[5]).unwrap()), [3, 1, 2]);
}

#[test]
fn a_filter_keeps_its_order_and_the_rest_goes_on_unchanged() {
    let shard = Shard::start(100);
    let new = vec![request(1, "one", 6), request(2, "two", 6), request(3, "three", 6)];
    let mut reports = vec![shard.prefill(0, new, None).unwrap()];
    assert_eq!(shard.filter(0, &[3, 1]).unwrap(), [3, 1]);
    for _ in 0..5 {
        reports.push(shard.decode(&[0]).unwrap());
        assert_eq!(requests(reports.last().unwrap()), [3, 1]);
    }
    assert_eq!(tokens_of(1, &reports), expected(&ids_of("one"), 6));
    assert_eq!(tokens_of(3, &reports), expected(&ids_of("three"), 6));
    assert!(shard.filter(0, &[1]).is_err(), "a batch that has stopped is gone");
}

#[test]
fn a_partly_stopped_batch_comes_back_whole_and_the_stopped_cost_nothing() {
    let shard = Shard::start(100);
    let report = shard.prefill(0, vec![request(1, "short", 1), request(2, "long", 3)], None).unwrap();
    assert!(report.generations[0].end.is_some() && report.generations[1].end.is_none());
    let batch = report.batch.unwrap();
    assert_eq!((batch.requests.len(), batch.tokens_next), (2, TokenCount(1)));
    assert_eq!(requests(&shard.decode(&[0]).unwrap()), [2]);
    let last = shard.decode(&[0]).unwrap();
    assert_eq!(requests(&last), [2]);
    assert_eq!(last.batch, None);
}

#[test]
fn the_shard_numbers_blocks_when_the_router_does_not() {
    let shard = Shard::start(100);
    let numbered = |id: u64, prompt: &str, count| {
        let mut request = request(id, prompt, count);
        request.placement = Placement::Numbered;
        request
    };
    let long = "more than one block of tokens";
    let report = shard.prefill(0, vec![numbered(1, long, 20), numbered(2, "b", 3)], None).unwrap();
    // 48 positions are three blocks, 3 are one.
    assert_eq!(report.batch.as_ref().unwrap().tokens_max, TokenCount(64));
    let mut reports = vec![report];
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[0]).unwrap());
    }
    assert_eq!(tokens_of(1, &reports), expected(&ids_of(long), 20));
    assert_eq!(tokens_of(2, &reports), expected(&ids_of("b"), 3));
}

#[test]
fn the_liveness_batch_disturbs_nobody() {
    let shard = Shard::start(100);
    let mut reports = vec![shard.prefill(0, vec![request(1, "live", 4)], None).unwrap()];
    for _ in 0..3 {
        let mut probe = request(0, "l", 1);
        probe.id = RequestId(proto::LIVENESS_ID);
        probe.placement = Placement::Given { blocks: BlockCount(1), slots: SlotTable::from_wire(vec![0]) };
        let report = shard.prefill(proto::LIVENESS_ID, vec![probe], None).unwrap();
        assert_eq!((report.generations.len(), report.batch), (1, None));
        reports.push(shard.decode(&[0]).unwrap());
    }
    assert_eq!(tokens_of(1, &reports), expected(&ids_of("live"), 4));
}

#[test]
fn clearing_forgets_one_batch_or_all() {
    let shard = Shard::start(100);
    let clear = |id: Option<u64>| shard.runtime.block_on(shard.engine.clear(id.map(BatchId))).unwrap();
    for id in 0..3 {
        shard.prefill(id, vec![request(id, "x", 9)], None).unwrap();
    }
    clear(Some(1));
    clear(Some(77));
    assert!(shard.decode(&[1]).is_err());
    shard.decode(&[0]).unwrap();
    clear(None);
    assert!(shard.decode(&[0]).is_err() && shard.decode(&[2]).is_err());
}

#[test]
fn a_seed_gives_the_same_tokens_alone_and_in_company_and_after_joining() {
    let shard = Shard::start(4);
    let sampled = |id: u64| {
        let mut request = request(id, "a random walk", 8);
        request.sampling = SamplingParams { temperature: 1.5, top_p: 0.9, seed: 40 + id, ..greedy() };
        request.top = 3;
        request
    };
    let alone = [1, 2].map(|id| shard.alone(sampled(id)));
    assert_ne!(tokens(&alone[0]), tokens(&alone[1]));
    assert_eq!(alone[0][7].end.as_ref().unwrap().seed, Some(41));
    let mut chunked = sampled(1);
    chunked.chunk = Some(TokenCount(2));
    let mut reports = vec![shard.prefill(0, vec![request(5, "other", 30), chunked], None).unwrap()];
    reports.push(shard.prefill(1, vec![sampled(2), request(6, "another", 30)], None).unwrap());
    reports.push(shard.decode(&[1, 0]).unwrap());
    shard.filter(1, &[1, 6, 2]).unwrap();
    for _ in 0..12 {
        reports.push(shard.decode(&[1]).unwrap());
    }
    for (id, alone) in [1, 2].into_iter().zip(&alone) {
        assert_eq!(tokens_of(id, &reports), tokens(alone));
        let together = reports.iter().flat_map(|report| &report.generations);
        assert!(together.filter(|generation| generation.request.0 == id).eq(alone));
    }
}

#[test]
fn a_request_that_has_just_stopped_still_counts_in_the_next_chunk() {
    let shard = Shard::start(16);
    let mut long = request(2, &"long".repeat(10), 4);
    long.chunk = Some(TokenCount(10));
    let report = shard.prefill(0, vec![request(1, "short", 1), long], None).unwrap();
    assert_eq!(report.batch.unwrap().tokens_next, TokenCount(15));
}
