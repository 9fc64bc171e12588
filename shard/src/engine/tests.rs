//! The engine as a router sees it, over a model whose next token is a hash of the history that it reads back from the cache:
//! a wrong slot, position or order shows as a wrong token.

use std::num::NonZeroUsize;

use kernels::{DType, OpError};
use proto::units::{BatchId, BlockCount, BlockId, RequestId, SlotIndex, TokenCount, TokenId};

use super::Engine;
use super::answer::{FinishReason, Generation, StepReport};
use super::core::{BLOCK_SIZE, Parts};
use super::error::EngineError;
use super::request::{NewBatch, NewRequest, Placement, Prompt, Stopping};
use super::slots::SlotTable;
use super::warmup::{MemoryShare, Warmup};
use crate::backend::{Device, Tensor};
use crate::cache::PagedKv;
use crate::model::{Model, ModelShape, StepInput};
use crate::sampling::SamplingParams;
use crate::sampling::tests::greedy;
use crate::text::tokenizer::tests::{DOLOR, END, byte_tokenizer};

const VOCABULARY: usize = 259;
/// A token that makes the model panic when it is fed.
const POISON: u32 = 13;
/// A token after which the logits are not numbers.
const NAN: u32 = 14;

/// Its cache holds ids and positions, its logits are a hash of those it finds at the slots of its sequence.
struct Hashing {
    shape: ModelShape,
    device: Device,
    /// `(id, position)` by slot.
    cells: Vec<(u32, u32)>,
    logits: Tensor,
}

impl Hashing {
    fn new() -> Self {
        let shape = ModelShape {
            vocabulary: VOCABULARY,
            layers: 1,
            kv_heads: 1,
            head_dim: 8,
            positions_max: 256,
            dtype: DType::F32,
        };
        let device = device();
        let logits = device.upload(Vec::new(), VOCABULARY).unwrap();
        Self { shape, device, cells: vec![(0, 0); 1 << 16], logits }
    }
}

impl Model for Hashing {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn forward(&mut self, input: &StepInput<'_>, _: &mut PagedKv) -> Result<&Tensor, OpError> {
        assert!(!input.ids.contains(&POISON), "poisoned");
        for ((id, position), slot) in input.ids.iter().zip(input.positions).zip(input.slots) {
            self.cells[*slot as usize] = (*id, *position);
        }
        let mut logits = Vec::new();
        for token in input.logits_at {
            let token = *token as usize;
            let sequence = input.sequences.iter().find(|sequence| sequence.rows.contains(&token)).unwrap();
            let position = sequence.start + token - sequence.rows.start;
            let past = sequence.slots[..=position].iter().map(|slot| self.cells[*slot as usize]);
            logits.extend(row_of(past));
        }
        self.logits = self.device.upload(logits, VOCABULARY)?;
        Ok(&self.logits)
    }
}

/// Logits after a history of ids and positions.
fn row_of(past: impl Iterator<Item = (u32, u32)>) -> Vec<f32> {
    let mix =
        |hash: u64, value: u32| (hash ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let mut last = 0;
    let hash = past.fold(1, |hash, (id, position)| {
        last = id;
        mix(mix(hash, id), position)
    });
    let spread =
        |id: u32| if last == NAN { f32::NAN } else { (mix(hash, id) >> 40) as f32 / (1 << 21) as f32 };
    // Control tokens, and those with a meaning in these tests, are never the best.
    let plain = |id: u32| (97..123).contains(&id);
    (0..VOCABULARY as u32).map(|id| spread(id) - if plain(id) { 0.0 } else { 20.0 }).collect()
}

fn device() -> Device {
    Device::cpu(NonZeroUsize::MIN).unwrap()
}

/// The greedy continuation by the definition of the model, without an engine.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let row = row_of(ids.iter().copied().zip(0..));
        let best = (0..VOCABULARY).fold(0, |best, id| if row[id] > row[best] { id } else { best });
        ids.push(best as u32);
    }
    ids.split_off(prompt.len())
}

fn request(id: u64, prompt: &str, tokens_max: u32) -> NewRequest {
    NewRequest {
        id: RequestId(id),
        prompt: Prompt::Ids(prompt.bytes().map(u32::from).collect()),
        sampling: greedy(),
        stopping: Stopping {
            tokens_max: TokenCount(tokens_max),
            strings: Vec::new(),
            ignore_end_of_sequence: false,
        },
        prompt_logprobs: false,
        top: 0,
        placement: at_blocks(&[10 * id as u32 + 1, 10 * id as u32 + 5, 10 * id as u32 + 3]),
        cached: TokenCount(0),
        chunk: None,
    }
}

fn at_blocks(blocks: &[u32]) -> Placement {
    let slots =
        blocks.iter().flat_map(|id| BlockId(*id).slots(BLOCK_SIZE)).map(|SlotIndex(slot)| slot).collect();
    Placement::Given { blocks: BlockCount(blocks.len() as u32), slots: SlotTable::from_wire(slots) }
}

fn ids_of(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// An engine after its warm-up, and the calls of a router, waited for.
struct Shard {
    engine: Engine,
    runtime: tokio::runtime::Runtime,
}

impl Shard {
    /// `prefill_max` is the chunk budget.
    fn start(prefill_max: u32) -> Self {
        let parts = Parts {
            model: Box::new(Hashing::new()),
            device: device(),
            tokenizer: byte_tokenizer(),
            // About a megabyte, 1 KiB per block.
            memory: MemoryShare(1e-4),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let shard = Self { engine: Engine::start(parts).unwrap(), runtime };
        let warmup = Warmup {
            batch: NewBatch { id: BatchId(0), requests: vec![request(0, &"warm".repeat(100), 1)] },
            prefill_max: TokenCount(prefill_max),
            input_max: None,
            total_max: None,
        };
        shard.runtime.block_on(shard.engine.warm_up(warmup)).unwrap();
        shard
    }

    fn prefill(
        &self,
        id: u64,
        requests: Vec<NewRequest>,
        onto: Option<u64>,
    ) -> Result<StepReport, EngineError> {
        let batch = NewBatch { id: BatchId(id), requests };
        self.runtime.block_on(self.engine.prefill(batch, onto.map(BatchId)))
    }

    fn decode(&self, ids: &[u64]) -> Result<StepReport, EngineError> {
        self.runtime.block_on(self.engine.decode(ids.iter().copied().map(BatchId).collect()))
    }

    fn filter(&self, id: u64, keep: &[u64]) -> Result<Vec<u64>, EngineError> {
        let keep = keep.iter().copied().map(RequestId).collect();
        let batch = self.runtime.block_on(self.engine.filter(BatchId(id), keep))?;
        Ok(batch.requests.iter().map(|id| id.0).collect())
    }

    /// One request alone, to its end.
    fn alone(&self, request: NewRequest) -> Vec<Generation> {
        let mut report = self.prefill(99, vec![request], None).unwrap();
        let mut generations = report.generations;
        while report.batch.is_some() {
            report = self.decode(&[99]).unwrap();
            generations.append(&mut report.generations);
        }
        generations
    }
}

fn tokens(generations: &[Generation]) -> Vec<u32> {
    generations.iter().map(|generation| generation.token.id.0).collect()
}

fn requests(report: &StepReport) -> Vec<u64> {
    report.generations.iter().map(|generation| generation.request.0).collect()
}

/// The tokens of one request among several reports.
fn tokens_of(request: u64, reports: &[StepReport]) -> Vec<u32> {
    let all = reports.iter().flat_map(|report| &report.generations);
    all.filter(|generation| generation.request.0 == request).map(|generation| generation.token.id.0).collect()
}

#[test]
fn a_request_runs_to_exactly_its_number_of_tokens() {
    let shard = Shard::start(100);
    let generations = shard.alone(request(1, "hello", 6));
    assert_eq!(tokens(&generations), expected(&ids_of("hello"), 6));
    let end = generations[5].end.as_ref().unwrap();
    assert_eq!((end.reason, end.tokens, end.seed), (FinishReason::Length, TokenCount(6), None));
    let texts: String = generations.iter().map(|generation| generation.token.text.as_str()).collect();
    assert_eq!(end.text, texts);
    assert!(generations[..5].iter().all(|generation| generation.end.is_none()));
}

#[test]
fn chunks_change_nothing_and_emit_nothing_before_the_prompt_is_done() {
    let shard = Shard::start(3);
    let whole = tokens(&shard.alone(request(1, "a long prompt", 5)));
    let mut chunked = request(1, "a long prompt", 5);
    chunked.chunk = Some(TokenCount(4));
    let mut reports = vec![shard.prefill(7, vec![chunked], None).unwrap()];
    assert_eq!(reports[0].batch.as_ref().unwrap().tokens_next, TokenCount(3));
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[7]).unwrap());
    }
    // 4 + 3 + 3 + 3 prompt tokens, the last three chunks by the shard's own budget.
    let counts: Vec<usize> = reports.iter().map(|report| report.generations.len()).collect();
    assert_eq!(counts, [0, 0, 0, 1, 1, 1, 1, 1]);
    assert_eq!(tokens_of(1, &reports), whole);
}

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
fn a_cached_prefix_changes_nothing() {
    let shard = Shard::start(100);
    let whole = tokens(&shard.alone(request(1, "a shared prefix and more", 4)));
    let mut again = request(2, "a shared prefix and more", 4);
    // Block 11 holds the first sixteen tokens, computed above for request 1.
    again.placement = at_blocks(&[11, 40, 41]);
    again.cached = TokenCount(16);
    assert_eq!(tokens(&shard.alone(again)), whole);
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
fn prompt_logprobs_gather_across_chunks_and_come_once() {
    let shard = Shard::start(3);
    let mut wanted = request(1, "logprobs!", 2);
    wanted.prompt_logprobs = true;
    let whole = shard.alone(wanted.clone());
    let prompt = whole[0].prompt.clone().unwrap();
    assert_eq!(whole[1].prompt, None);
    assert_eq!(
        (prompt.ids.len(), prompt.logprobs.len(), prompt.texts.concat().as_str()),
        (9, 9, "logprobs!")
    );
    assert!(prompt.logprobs[0].is_nan() && prompt.logprobs[1..].iter().all(|logprob| *logprob < 0.0));
    let row = row_of(ids_of("logp").into_iter().zip(0..));
    let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    assert!((f64::from(prompt.logprobs[4]) - (f64::from(row[usize::from(b'r')]) - total.ln())).abs() < 1e-4);
    let mut chunked = wanted.clone();
    chunked.chunk = Some(TokenCount(2));
    assert_eq!(shard.alone(chunked)[0].prompt.as_ref().unwrap().logprobs[1..], prompt.logprobs[1..]);
    let mut cached = wanted;
    cached.cached = TokenCount(3);
    let logprobs = shard.alone(cached)[0].prompt.clone().unwrap().logprobs;
    assert!(logprobs[..4].iter().all(|logprob| logprob.is_nan()));
    assert_eq!(logprobs[4..], prompt.logprobs[4..]);
}

#[test]
fn alternatives_come_best_first_with_the_chosen_one_in_front() {
    let shard = Shard::start(100);
    let mut request = request(1, "top", 1);
    request.top = 4;
    let generation = shard.alone(request).remove(0);
    assert_eq!(generation.top.len(), 4);
    assert_eq!(generation.top[0].id, generation.token.id);
    assert!(generation.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
}

#[test]
fn a_stop_string_ends_the_text_also_inside_a_token() {
    let shard = Shard::start(100);
    let text: String = expected(&ids_of("stop"), 6).iter().map(|id| char::from(*id as u8)).collect();
    let mut across = request(1, "stop", 20);
    across.stopping.strings = vec!["unlikely".to_owned(), text[2..5].to_owned()];
    let generations = shard.alone(across);
    assert_eq!(generations.len(), 5);
    let end = generations[4].end.as_ref().unwrap();
    assert_eq!((end.reason, end.text.as_str()), (FinishReason::StopString, &text[..5]));
    let mut inside = request(1, "stop", 20);
    inside.stopping.strings = vec!["ol".to_owned()];
    inside.sampling.logit_bias = vec![(TokenId(DOLOR), 100.0)];
    let generation = shard.alone(inside).remove(0);
    assert_eq!((generation.token.id, generation.token.text.as_str()), (TokenId(DOLOR), " dol"));
    assert_eq!(generation.end.unwrap().text, " dol");
}

#[test]
fn the_end_token_stops_unless_it_is_ignored_and_its_text_is_left_out() {
    let shard = Shard::start(100);
    let mut ends = request(1, "end", 3);
    ends.sampling.logit_bias = vec![(TokenId(END), 100.0)];
    let generations = shard.alone(ends.clone());
    assert_eq!((generations.len(), generations[0].token.text.as_str()), (1, "<end>"));
    assert!(generations[0].token.special);
    let end = generations[0].end.as_ref().unwrap();
    assert_eq!((end.reason, end.text.as_str()), (FinishReason::EndOfSequence, ""));
    ends.stopping.ignore_end_of_sequence = true;
    assert_eq!(shard.alone(ends.clone()).len(), 3);
    ends.stopping = Stopping { tokens_max: TokenCount(1), ignore_end_of_sequence: false, strings: vec![] };
    assert_eq!(shard.alone(ends)[0].end.as_ref().unwrap().reason, FinishReason::Length);
}

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
    check(
        |bad| bad.sampling.logit_bias = vec![(TokenId(999), 1.0)],
        "token 999 is outside of the vocabulary",
    );
    check(|bad| bad.cached = TokenCount(6), "cache_len 6 must be below the prompt's 6 tokens");
    check(|bad| bad.chunk = Some(TokenCount(7)), "chunk_len 7 must be between 1 and the 6 prompt tokens");
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
fn logits_that_are_not_numbers_are_an_error() {
    let shard = Shard::start(100);
    let mut bad = request(2, "x", 4);
    bad.prompt = Prompt::Ids(vec![NAN]);
    let error = shard.prefill(1, vec![bad], None).unwrap_err();
    assert_eq!(error.to_string(), "request 2: the model's logits are not numbers");
}

#[test]
fn steps_before_the_warm_up_are_refused() {
    let parts = Parts {
        model: Box::new(Hashing::new()),
        device: device(),
        tokenizer: byte_tokenizer(),
        memory: MemoryShare(1e-4),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let engine = Engine::start(parts).unwrap();
    let batch = NewBatch { id: BatchId(0), requests: vec![request(1, "x", 1)] };
    let error = runtime.block_on(engine.prefill(batch, None)).unwrap_err();
    assert!(matches!(error, EngineError::NotWarm), "{error}");
}
