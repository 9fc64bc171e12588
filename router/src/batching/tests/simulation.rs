//! Random turns: arrivals, departures, failures, deadlines and priorities, against shards that hold every plan to the
//! contract and every cached key to its history.
//!
//! A short run is part of the tests. A long one, with figures, is
//! `SIMULATED_STEPS=10000000 cargo test -p router --release --lib simulation -- --ignored --nocapture`; what it finds is
//! found again with the seed that it names.

use std::collections::HashMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::request::{Deadline, Priority, ValidRequest};
use crate::shards::scripted::{length, token};

/// More would only wait.
const CLIENTS_MAX: usize = 100;

/// What a client saw of its request.
struct Client {
    request: ValidRequest,
    events: Events,
    tokens: Vec<TokenId>,
}

struct Simulation {
    bench: Bench,
    random: StdRng,
    clients: HashMap<u64, Client>,
    submitted: u64,
    finished: u64,
    failed: u64,
    left: u64,
    last_admitted: Option<u64>,
    now: Instant,
    figures: Figures,
}

/// What a simulation has been through.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    steps: u64,
    failures: u64,
    preempted: u64,
    cached_tokens: u64,
}

impl Simulation {
    fn new(limits: Limits, seed: u64) -> Self {
        Self {
            bench: Bench::new(limits),
            random: StdRng::seed_from_u64(seed),
            clients: HashMap::new(),
            submitted: 0,
            finished: 0,
            failed: 0,
            left: 0,
            last_admitted: None,
            now: Instant::now(),
            figures: Figures::default(),
        }
    }

    fn turn(&mut self) {
        let crowd = if self.bench.limits.on_demand() { 0.45 } else { 0.3 };
        while self.clients.len() < CLIENTS_MAX && self.random.random_bool(crowd) {
            self.arrive();
        }
        if self.random.random_bool(0.05) {
            self.leave();
        }
        if self.random.random_bool(0.01) {
            self.figures.failures += 1;
            self.bench.shards.failure = Some(ShardError::Server("scripted".to_owned()));
        }
        if self.bench.limits.on_demand() && self.random.random_bool(0.01) {
            self.bench.shards.failure = Some(ShardError::Refused("scripted".to_owned()));
        }
        self.now += Duration::from_millis(10);
        let plan = self.bench.step_at(self.now);
        self.figures.steps += 1;
        let tally = self.bench.scheduler.take_tally();
        self.figures.preempted += tally.preempted;
        self.figures.cached_tokens += tally.cached_tokens;
        if !self.bench.limits.on_demand() {
            for (id, _) in admitted(&plan) {
                assert!(self.last_admitted < Some(id), "request {id} starts after {:?}", self.last_admitted);
                self.last_admitted = Some(id);
            }
        }
        self.listen();
    }

    fn arrive(&mut self) {
        let ends_after = if self.random.random_bool(0.5) { self.random.random_range(1..8) } else { 0 };
        // Some prompts are longer than a pass, and some requests longer than the cache.
        let prompt = if self.random.random_bool(0.2) { 200 } else { 20 };
        let request =
            request(self.random.random_range(1..=prompt), self.random.random_range(1..=24), ends_after);
        let request = if self.bench.limits.on_demand() { self.with_terms(request) } else { request };
        let (waiting, events) = Waiting::new(request.clone(), self.now);
        self.bench.scheduler.submit(waiting);
        self.clients.insert(self.submitted, Client { request, events, tokens: Vec::new() });
        self.submitted += 1;
    }

    /// Some are urgent or not, some have little time, some want log-probabilities of their prompt.
    fn with_terms(&mut self, request: ValidRequest) -> ValidRequest {
        let after = Duration::from_millis(self.random.random_range(0..2000));
        ValidRequest {
            priority: Priority::new(self.random.random_range(3..7)).unwrap(),
            deadline: self.random.random_bool(0.05).then_some(Deadline { at: self.now + after, after }),
            prompt_logprobs: self.random.random_bool(0.1),
            ..request
        }
    }

    fn leave(&mut self) {
        if self.submitted > 0 {
            let oldest = self.submitted.saturating_sub(12);
            let client = self.clients.remove(&self.random.random_range(oldest..self.submitted));
            self.left += u64::from(client.is_some());
        }
    }

    /// Every client reads its events; those that have ended must have ended rightly.
    fn listen(&mut self) {
        let mut ended = Vec::new();
        for (id, client) in &mut self.clients {
            let (tokens, end) = drain(&mut client.events);
            client.tokens.extend(tokens);
            let prompt = &client.request.prompt.ids;
            let expected: Vec<TokenId> =
                (0..client.tokens.len() as u32).map(|index| token(prompt, index)).collect();
            assert_eq!(client.tokens, expected, "no token is lost, repeated or another request's");
            match end {
                None => continue,
                Some(Ok(_)) => {
                    let most = client.request.stopping.max_new_tokens;
                    assert_eq!(client.tokens.len() as u32, length(prompt, most));
                    self.finished += 1;
                }
                Some(Err(_)) => self.failed += 1,
            }
            assert_eq!(
                client.events.try_recv(),
                Err(mpsc::error::TryRecvError::Disconnected),
                "an end is the end"
            );
            ended.push(*id);
        }
        ended.iter().for_each(|id| drop(self.clients.remove(id)));
    }

    /// No more arrivals: everybody must come to an end.
    fn settle(mut self) -> Figures {
        for _ in 0..20_000 {
            if self.clients.is_empty() {
                break;
            }
            self.bench.step_at(self.now);
            self.now += Duration::from_millis(10);
            self.listen();
        }
        self.bench.steps(2);
        assert!(self.clients.is_empty(), "{} requests never end", self.clients.len());
        assert_eq!(self.finished + self.failed + self.left, self.submitted);
        assert!(self.finished > self.submitted / 4, "{} of {} finished", self.finished, self.submitted);
        let load = self.bench.scheduler.load();
        assert_eq!((load.waiting, load.running, load.reserved), (0, 0, TokenCount(0)));
        assert_eq!(self.bench.shards.rows(), []);
        self.figures
    }
}

/// The scheduler checks its blocks after every step by itself, and the scripted shards check every plan.
fn check(limits: &Limits) {
    for seed in 0..8 {
        let mut simulation = Simulation::new(limits.clone(), seed);
        (0..1000).for_each(|_| simulation.turn());
        let _ = simulation.settle();
    }
}

#[test]
fn every_request_ends_once_when_prompts_are_cut() {
    check(&limits(PromptPolicy::Chunked));
}

#[test]
fn every_request_ends_once_when_prompts_are_whole() {
    check(&limits(WHOLE));
}

#[test]
fn every_request_ends_once_in_small_batches() {
    check(&at_most(3, limits(PromptPolicy::Chunked)));
    check(&at_most(3, limits(WHOLE)));
}

#[test]
fn every_request_ends_once_when_a_pass_takes_fewer_tokens_than_rows_run() {
    check(&Limits { max_batch_prefill_tokens: TokenCount(5), ..limits(PromptPolicy::Chunked) });
}

#[test]
fn every_request_ends_once_with_speculation() {
    let mut limits = limits(WHOLE);
    limits.capacity.speculate = TokenCount(2);
    check(&limits);
}

#[test]
fn every_request_ends_once_with_blocks_of_one_token() {
    let mut limits = limits(PromptPolicy::Chunked);
    limits.capacity = Capacity {
        blocks: BlockCount(100),
        block_size: BlockSize::new(1).unwrap(),
        speculate: TokenCount(0),
    };
    check(&limits);
}

/// Several sizes of cache and pass, so that now blocks and now passes are short.
fn sizes() -> Vec<Limits> {
    let sized = |blocks: u32, pass: u32, rows: Option<usize>| {
        let mut limits = on_demand();
        limits.capacity.blocks = BlockCount(blocks);
        Limits {
            max_batch_prefill_tokens: TokenCount(pass),
            max_batch_size: rows.and_then(NonZeroUsize::new),
            ..limits
        }
    };
    vec![
        sized(41, 32, None),
        sized(26, 32, None),
        sized(80, 9, None),
        sized(41, 200, Some(4)),
        sized(120, 64, None),
    ]
}

/// So many turns for each size, from one seed on.
fn simulate(turns: u64, first_seed: u64) -> Figures {
    const TURNS_MAX: u64 = 20_000;
    let mut total = Figures::default();
    for (index, limits) in sizes().into_iter().enumerate() {
        let mut left = turns;
        let mut seed = first_seed + index as u64 * 1_000_000;
        while left > 0 {
            println!("seed {seed}, {} blocks", limits.capacity.blocks);
            let mut simulation = Simulation::new(limits.clone(), seed);
            (0..left.min(TURNS_MAX)).for_each(|_| simulation.turn());
            left -= left.min(TURNS_MAX);
            let figures = simulation.settle();
            total.steps += figures.steps;
            total.failures += figures.failures;
            total.preempted += figures.preempted;
            total.cached_tokens += figures.cached_tokens;
            seed += 1;
        }
    }
    total
}

#[test]
fn every_request_ends_once_and_rightly_with_blocks_on_demand() {
    let figures = simulate(4_000, 1);
    println!("{figures:?}");
    assert!(figures.preempted > 100 && figures.failures > 100 && figures.cached_tokens > 1000, "{figures:?}");
}

#[test]
#[ignore = "long: as many steps as SIMULATED_STEPS says, ten million if it says nothing"]
fn every_request_ends_once_and_rightly_in_a_long_run() {
    let steps = std::env::var("SIMULATED_STEPS").map_or(10_000_000, |steps| steps.parse().expect("a number"));
    let begin = Instant::now();
    let figures = simulate(steps / sizes().len() as u64, 1_000);
    println!("{figures:?} in {:.0?}", begin.elapsed());
}
