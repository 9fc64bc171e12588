//! Thousands of random turns: arrivals, departures and failures, against shards that hold every plan to the contract.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::request::ValidRequest;
use crate::shards::scripted::{length, token};

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
        }
    }

    fn turn(&mut self) {
        while self.random.random_bool(0.3) {
            self.arrive();
        }
        if self.random.random_bool(0.05) {
            self.leave();
        }
        if self.random.random_bool(0.01) {
            self.bench.shards.failure = Some(ShardError::Server("scripted".to_owned()));
        }
        let plan = self.bench.step();
        for (id, _) in admitted(&plan) {
            assert!(self.last_admitted < Some(id), "request {id} starts after {:?}", self.last_admitted);
            self.last_admitted = Some(id);
        }
        self.listen();
    }

    fn arrive(&mut self) {
        let ends_after = if self.random.random_bool(0.5) { self.random.random_range(1..8) } else { 0 };
        // Some prompts are longer than a pass, and some requests longer than the cache.
        let prompt = if self.random.random_bool(0.2) { 200 } else { 20 };
        let request =
            request(self.random.random_range(1..=prompt), self.random.random_range(1..=24), ends_after);
        let (waiting, events) = Waiting::new(request.clone(), Instant::now());
        self.bench.scheduler.submit(waiting);
        self.clients.insert(self.submitted, Client { request, events, tokens: Vec::new() });
        self.submitted += 1;
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
    fn settle(mut self) {
        for _ in 0..20_000 {
            if self.clients.is_empty() {
                break;
            }
            self.bench.step();
            self.listen();
        }
        self.bench.steps(2);
        assert!(self.clients.is_empty(), "{} requests never end", self.clients.len());
        assert_eq!(self.finished + self.failed + self.left, self.submitted);
        assert!(self.finished > self.submitted / 4, "{} of {} finished", self.finished, self.submitted);
        let load = self.bench.scheduler.load();
        assert_eq!((load.waiting, load.running, load.reserved), (0, 0, TokenCount(0)));
        assert_eq!(self.bench.shards.rows(), []);
    }
}

/// The scheduler checks its blocks after every step by itself, and the scripted shards check every plan.
fn check(limits: &Limits) {
    for seed in 0..8 {
        let mut simulation = Simulation::new(limits.clone(), seed);
        (0..1000).for_each(|_| simulation.turn());
        simulation.settle();
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
