//! Two engines that serve one model together, as a router sees them that sends every command to both.

use std::sync::Arc;
use std::time::Duration;

use kernels::OpError;
use kernels::collective::{GroupSpec, LocalGroup};
use proto::units::{BatchId, RequestId, TokenCount};
use tokio::runtime::Runtime;

use super::grants::{at_first_blocks, grant, plan};
use super::resumption::{requests as cases, resumed};
use super::{Hashing, NAN, Shard, expected, ids_of, parts, request, tokens, tokens_of};
use crate::adapters::AdapterLayout;
use crate::backend::Tensor;
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::engine::Engine;
use crate::engine::answer::{Capacity, Failure, Generation, StepReport};
use crate::engine::commands::Parts;
use crate::engine::error::{EngineError, Unhealthy};
use crate::engine::request::{NewBatch, NewRequest, Prompt};
use crate::engine::step_plan::StepPlan;
use crate::engine::warmup::{MemoryShare, Warmup};
use crate::model::{Model, ModelShape, StepInput};
use crate::sampling::NotNumbers;

/// A token that makes rank 1 alone panic when it is fed.
const POISON_OF_ONE: u32 = 15;

/// A whole model on each rank, which meets the others once in every pass.
struct Together {
    whole: Hashing,
    group: Arc<LocalGroup>,
}

impl Model for Together {
    fn shape(&self) -> &ModelShape {
        self.whole.shape()
    }

    fn adapters(&self) -> Arc<AdapterLayout> {
        self.whole.adapters()
    }

    fn reserve(&mut self, tokens: usize, logits: usize) -> Result<(), OpError> {
        self.whole.reserve(tokens, logits)
    }

    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&mut Tensor, OpError> {
        assert!(self.group.rank() == 0 || !input.ids.contains(&POISON_OF_ONE), "poisoned");
        self.group
            .barrier()
            .map_err(|error| OpError::Unsupported { op: "forward", reason: error.to_string() })?;
        self.whole.forward(input, cache)
    }
}

/// Two ranks after their warm-up.
struct Pair {
    engines: Vec<Engine>,
    capacities: Vec<Capacity>,
    runtime: Runtime,
}

type Both<T> = [Result<T, EngineError>; 2];

impl Pair {
    /// The second rank finds less memory than the first.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let join = |rank| {
            let spec = GroupSpec { path: directory.path().join("group"), rank, world: 2 };
            Arc::new(LocalGroup::join(&spec, Duration::from_secs(60)).unwrap())
        };
        let (first, second) = std::thread::scope(|scope| {
            let second = scope.spawn(|| join(1));
            (join(0), second.join().unwrap())
        });
        let engines = [first, second].map(|group| {
            let memory = MemoryShare(1e-4 / (1 + group.rank()) as f64);
            let model = Box::new(Together { whole: Hashing::new(), group: Arc::clone(&group) });
            Engine::start(Parts { model, memory, ranks: Ranks::of(group), ..parts() }).unwrap()
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut pair = Self { engines: engines.to_vec(), capacities: Vec::new(), runtime };
        let warm_up = |engine: Engine| async move {
            let batch = NewBatch { id: BatchId(0), requests: vec![request(0, &"warm".repeat(10), 1)] };
            engine
                .warm_up(Warmup { batch, prefill_max: TokenCount(50), input_max: None, total_max: None })
                .await
        };
        pair.capacities = pair.both(warm_up).map(Result::unwrap).to_vec();
        pair
    }

    /// The same command to both, at the same time.
    fn both<T, F: Future<Output = Result<T, EngineError>>>(&self, command: impl Fn(Engine) -> F) -> Both<T> {
        let [first, second] = [0, 1].map(|rank| command(self.engines[rank].clone()));
        let soon = Duration::from_secs(60);
        let (first, second) = self.runtime.block_on(async {
            tokio::time::timeout(soon, async { tokio::join!(first, second) }).await.expect("nobody hangs")
        });
        [first, second]
    }

    fn prefill(&self, id: u64, requests: &[NewRequest]) -> Both<StepReport> {
        self.both(|engine| {
            let batch = NewBatch { id: BatchId(id), requests: requests.to_vec() };
            async move { engine.prefill(batch, None, StepPlan::default()).await }
        })
    }

    fn decode(&self, id: u64) -> Both<StepReport> {
        self.decode_by(id, &StepPlan::default())
    }

    fn decode_by(&self, id: u64, plan: &StepPlan) -> Both<StepReport> {
        self.both(|engine| {
            let plan = plan.clone();
            async move { engine.decode(vec![BatchId(id)], plan).await }
        })
    }

    /// All that each rank answers, until both say that the batch is done. They always hold the same batch.
    fn run(&self, requests: &[NewRequest]) -> [Vec<StepReport>; 2] {
        self.run_by(requests, |_| StepPlan::default())
    }

    /// The same by a plan for each step behind the first.
    fn run_by(&self, requests: &[NewRequest], plan: impl Fn(usize) -> StepPlan) -> [Vec<StepReport>; 2] {
        let mut reports = [Vec::new(), Vec::new()];
        let mut step = self.prefill(1, requests);
        loop {
            let [first, second] = step.map(Result::unwrap);
            assert_eq!(first.batch, second.batch);
            let more = first.batch.is_some();
            reports[0].push(first);
            reports[1].push(second);
            if !more {
                return reports;
            }
            step = self.decode_by(1, &plan(reports[0].len()));
        }
    }
}

fn generations(reports: &[StepReport]) -> Vec<Generation> {
    reports.iter().flat_map(|report| report.generations.iter().cloned()).collect()
}

#[test]
fn each_request_is_answered_by_the_rank_that_its_id_names() {
    let pair = Pair::start();
    let prompts = ["even", "odd", "even too", "odd too"];
    let mut requests: Vec<_> =
        prompts.iter().enumerate().map(|(id, prompt)| request(id as u64, prompt, 5)).collect();
    requests[1].prompt_logprobs = true;
    requests[2].prompt_logprobs = true;
    requests[3].top = 2;
    let reports = pair.run(&requests);
    for (id, prompt) in prompts.iter().enumerate() {
        let owner = id % 2;
        assert_eq!(tokens_of(id as u64, &reports[owner]), expected(&ids_of(prompt), 5), "{prompt}");
        assert_eq!(tokens_of(id as u64, &reports[1 - owner]), [0; 0], "{prompt}");
    }
    let alone = Shard::start(50);
    for request in requests {
        let owner = request.id.0 as usize % 2;
        let mut own = generations(&reports[owner]);
        own.retain(|generation| generation.request == request.id);
        // As text: the first log-probability of a prompt is not a number.
        assert_eq!(format!("{own:?}"), format!("{:?}", alone.alone(request)));
    }
}

#[test]
fn a_stop_string_ends_a_request_on_all_ranks_at_once() {
    let pair = Pair::start();
    let text =
        |prompt: &str| String::from_utf8(expected(&ids_of(prompt), 9).iter().map(|id| *id as u8).collect());
    let mut requests = [request(0, "even", 9), request(1, "odd", 9)];
    for (request, prompt) in requests.iter_mut().zip(["even", "odd"]) {
        request.stopping.strings = vec![text(prompt).unwrap()[2..4].to_owned()];
    }
    let reports = pair.run(&requests);
    assert!(reports[0].len() <= 4, "{} steps", reports[0].len());
    for (rank, reports) in reports.iter().enumerate() {
        let end = generations(reports).pop().unwrap().end.unwrap();
        assert!(end.text.ends_with(&requests[rank].stopping.strings[0]), "{end:?}");
    }
}

#[test]
fn a_request_goes_on_on_all_ranks_at_once() {
    let (pair, alone) = (Pair::start(), Shard::start(50));
    for ((name, mut request), id) in cases().into_iter().zip(1..) {
        if request.adapter.is_some() {
            continue;
        }
        request.id = RequestId(id);
        let text: String = alone.alone(request.clone()).iter().map(|one| one.token.text.as_str()).collect();
        // The last three characters but one.
        let end: String = text.chars().rev().skip(1).take(3).collect();
        request.stopping.strings = vec![end.chars().rev().collect()];
        let whole = alone.alone(request.clone());
        for known in [1, whole.len() - 1] {
            let again = resumed(&request, &tokens(&whole)[..known]);
            let reports = pair.run(&[again]);
            let owner = id as usize % 2;
            assert_eq!(generations(&reports[owner]), whole[known..], "{name}: after {known} tokens");
            assert_eq!(generations(&reports[1 - owner]), [], "{name}");
        }
    }
}

#[test]
fn blocks_are_granted_on_all_ranks_at_once() {
    let pair = Pair::start();
    let (long, short) = ("a prompt of more than one block", "b");
    let mut requests = [request(4, long, 10), request(5, short, 10), request(7, "who leaves", 10)];
    requests[0].placement = at_first_blocks(&[9]);
    requests[0].chunk = Some(TokenCount(12));
    requests[1].placement = at_first_blocks(&[12]);
    let reports = pair.run_by(&requests, |step| match step {
        1 => StepPlan {
            drops: [RequestId(7)].into(),
            ..plan(vec![grant(4, &[5], Some(7)), grant(5, &[], Some(0))])
        },
        2 => plan(vec![grant(4, &[], Some(0)), grant(5, &[], Some(0))]),
        3 => plan(vec![grant(4, &[8], Some(12))]),
        _ => StepPlan::default(),
    });
    assert_eq!(tokens_of(4, &reports[0]), expected(&ids_of(long), 10));
    assert_eq!(tokens_of(5, &reports[1]), expected(&ids_of(short), 10));
    assert_eq!(tokens_of(7, &reports[1]), expected(&ids_of("who leaves"), 1));
}

#[test]
fn a_plan_that_is_refused_on_all_ranks_ends_nobody() {
    let pair = Pair::start();
    let mut granted = request(4, "granted", 3);
    granted.placement = at_first_blocks(&[9]);
    for step in pair.prefill(1, &[granted]) {
        step.unwrap();
    }
    for step in pair.decode_by(1, &plan(vec![grant(4, &[9], None)])) {
        assert!(step.unwrap_err().is_refusal());
    }
    let [first, second] = pair.decode(1).map(Result::unwrap);
    assert_eq!(tokens_of(4, &[first]), expected(&ids_of("granted"), 2)[1..]);
    assert_eq!(second.generations, []);
}

#[test]
fn a_request_without_numbers_ends_on_all_ranks_and_its_owner_says_so() {
    let pair = Pair::start();
    for id in [2, 3] {
        let mut bad = request(id, "x", 4);
        bad.prompt = Prompt::Ids(vec![NAN]);
        bad.placement = at_first_blocks(&[40]);
        let reports = pair.run(&[request(4, "even", 3), bad, request(5, "odd", 3)]);
        let owner = id as usize % 2;
        assert_eq!(reports[owner][0].failures, [Failure { request: RequestId(id), reason: NotNumbers }]);
        assert_eq!(reports[1 - owner][0].failures, []);
        assert_eq!(tokens_of(4, &reports[0]), expected(&ids_of("even"), 3));
        assert_eq!(tokens_of(5, &reports[1]), expected(&ids_of("odd"), 3));
    }
}

#[test]
fn ranks_that_were_granted_different_blocks_or_tokens_are_told_so() {
    for plans in [[(5, 1), (6, 1)], [(5, 1), (5, 2)]] {
        let pair = Pair::start();
        let mut granted = request(4, "granted, but not the whole prompt", 3);
        granted.placement = at_first_blocks(&[9]);
        granted.chunk = Some(TokenCount(16));
        for step in pair.prefill(1, &[granted]) {
            step.unwrap();
        }
        let [first, second] = [0, 1].map(|rank: usize| {
            let (engine, (block, tokens)) = (pair.engines[rank].clone(), plans[rank]);
            let plan = plan(vec![grant(4, &[block], Some(tokens))]);
            async move { engine.decode(vec![BatchId(1)], plan).await }
        });
        let (first, second) = pair.runtime.block_on(async { tokio::join!(first, second) });
        for step in [first, second] {
            let text = step.unwrap_err().to_string();
            assert!(text.contains("is at call") && text.contains("but rank"), "{text}");
        }
    }
}

#[test]
fn the_caches_of_all_ranks_are_as_large_as_the_smallest() {
    let pair = Pair::start();
    assert_eq!(pair.capacities[0], pair.capacities[1]);
}

#[test]
fn a_step_that_fails_on_one_rank_fails_on_all_and_ends_them() {
    let pair = Pair::start();
    let mut poisoned = request(2, "x", 4);
    poisoned.prompt = Prompt::Ids(vec![POISON_OF_ONE]);
    let [whole, broken] = pair.prefill(1, &[poisoned]).map(|step| step.unwrap_err().to_string());
    assert_eq!(broken, "the engine failed in this step: poisoned");
    assert!(whole.contains("rank 1 has given up"), "{whole}");
    for engine in &pair.engines {
        pair.runtime.block_on(engine.ended());
        assert_eq!(engine.health(), Err(Unhealthy::Stopped));
    }
    assert!(pair.decode(1).iter().all(|step| matches!(step, Err(EngineError::Gone))));
}

#[test]
fn what_fails_alike_on_all_ranks_ends_nobody() {
    let pair = Pair::start();
    let mut not_numbers = request(2, "x", 4);
    not_numbers.prompt = Prompt::Ids(vec![NAN]);
    for step in pair.prefill(1, &[not_numbers]) {
        assert!(matches!(step, Err(EngineError::Logits { .. })), "{step:?}");
    }
    for step in pair.decode(7) {
        assert!(matches!(step, Err(EngineError::UnknownBatch(_))), "{step:?}");
    }
    let reports = pair.run(&[request(4, "fine", 3)]);
    assert_eq!(tokens_of(4, &reports[0]), expected(&ids_of("fine"), 3));
}

#[test]
fn ranks_at_different_steps_are_told_so() {
    let pair = Pair::start();
    let [first, second] = [0, 1].map(|rank| {
        let engine = pair.engines[rank].clone();
        let batch = NewBatch { id: BatchId(3), requests: vec![request(8 + rank as u64, "same", 4)] };
        async move { engine.prefill(batch, None, StepPlan::default()).await }
    });
    let (first, second) = pair.runtime.block_on(async { tokio::join!(first, second) });
    for step in [first, second] {
        let text = step.unwrap_err().to_string();
        assert!(text.contains("is at call") && text.contains("but rank"), "{text}");
    }
}

#[test]
fn a_request_is_owned_by_one_rank() {
    assert!([0, 1, u64::MAX].iter().all(|id| Ranks::alone().owns(RequestId(*id))));
}
