//! Blocks on demand, shared prefixes, rank, and what happens when the shards fail.

use std::time::Duration;

use super::*;
use crate::batching::{Finished, Grant, StepKind};
use crate::request::{Deadline, Priority};
use crate::shards::scripted::{marked, token};

fn bench() -> Bench {
    Bench::new(on_demand())
}

/// With room for so many blocks of 4 tokens.
fn small(blocks: u32) -> Bench {
    let mut limits = on_demand();
    limits.capacity.blocks = BlockCount(blocks + 1);
    Bench::new(limits)
}

fn prioritized(prompt: u32, max_new_tokens: u32, priority: u8) -> ValidRequest {
    ValidRequest { priority: Priority::new(priority).unwrap(), ..request(prompt, max_new_tokens, 0) }
}

/// Runs until everybody has ended, and returns what each got.
fn finish(bench: &mut Bench, events: Vec<Events>) -> Vec<Result<(Vec<TokenId>, Finished), ShardError>> {
    let mut streams: Vec<(Events, Vec<TokenId>, Option<_>)> =
        events.into_iter().map(|events| (events, Vec::new(), None)).collect();
    for _ in 0..5000 {
        bench.step();
        for (events, tokens, end) in streams.iter_mut().filter(|stream| stream.2.is_none()) {
            let (more, ending) = drain(events);
            tokens.extend(more);
            *end = ending;
        }
    }
    let result = |(_, tokens, end)| match end {
        Some(Ok(Event::Last(_, finished))) => Ok((tokens, finished)),
        Some(Err(error)) => Err(error),
        other => panic!("a stream has not ended: {other:?}"),
    };
    streams.into_iter().map(result).collect()
}

fn expected(prompt: u32, count: u32) -> Vec<TokenId> {
    let ids = request(prompt, 1, 0).prompt.ids;
    (0..count).map(|index| token(&ids, index)).collect()
}

#[test]
fn a_row_holds_blocks_for_what_it_has_and_for_one_step() {
    let mut bench = bench();
    let _events = bench.submit(6, 90);
    bench.step();
    assert_eq!(bench.scheduler.load().reserved, TokenCount(8));
    let granted: Vec<Vec<Grant>> = (0..7).map(|_| bench.step().grants).collect();
    // Positions 6 and 7 have slots; position 8 needs the next block.
    let sizes: Vec<usize> =
        granted.iter().map(|grants| grants.iter().map(|grant| grant.blocks.len()).sum()).collect();
    assert_eq!(sizes, [0, 0, 1, 0, 0, 0, 1]);
}

#[test]
fn requests_that_stop_early_never_reserve_what_they_might_have_used() {
    let mut bench = small(20);
    // Each could fill the cache.
    let events: Vec<Events> = (0..8).map(|_| bench.submit_request(request(4, 70, 5))).collect();
    bench.steps(2);
    assert_eq!(bench.scheduler.load().running, 8);
    for result in finish(&mut bench, events) {
        assert_eq!(result.unwrap().0.len(), 5);
    }
}

#[test]
fn the_newest_row_leaves_when_blocks_run_out_and_goes_on_later() {
    let mut bench = small(10);
    let events = vec![bench.submit(8, 30), bench.submit(9, 20)];
    let results = finish(&mut bench, events);
    assert_eq!(results[0].as_ref().unwrap().0, expected(8, 30));
    assert_eq!(results[1].as_ref().unwrap().0, expected(9, 20));
    assert!(bench.scheduler.take_tally().preempted > 0);
    assert_eq!(bench.scheduler.load().reserved, TokenCount(0));
}

#[test]
fn of_running_rows_the_least_urgent_leaves_first() {
    let mut bench = small(10);
    let events =
        vec![bench.submit_request(prioritized(8, 30, 2)), bench.submit_request(prioritized(9, 20, 7))];
    let mut preempted = None;
    for _ in 0..200 {
        let plan = bench.step();
        let ends = bench.scheduler.take_tally().preempted;
        if ends > 0 && preempted.is_none() {
            preempted = Some(plan.drops);
        }
    }
    assert_eq!(preempted, Some(ids(&[0])));
    drop(events);
}

#[test]
fn urgent_requests_overtake_those_that_have_not_waited_long() {
    let mut bench = Bench::new(at_most(1, on_demand()));
    let now = Instant::now();
    let mut submit = |priority: u8, age: u64| {
        let (waiting, events) = Waiting::new(prioritized(4, 1, priority), now - Duration::from_secs(age));
        bench.scheduler.submit(waiting);
        events
    };
    // Levels are worth ten seconds.
    let _events = [submit(5, 0), submit(9, 0), submit(5, 39), submit(5, 41), submit(0, 89), submit(0, 91)];
    let order: Vec<u64> = (0..6).map(|_| admitted(&bench.step())[0].0).collect();
    assert_eq!(order, [3, 5, 1, 2, 4, 0]);
}

#[test]
fn a_request_whose_time_is_over_ends_wherever_it_is() {
    let mut bench = Bench::new(at_most(1, on_demand()));
    let now = Instant::now();
    let deadline = |after: u64| {
        let after = Duration::from_secs(after);
        Some(Deadline { at: now + after, after })
    };
    let mut runs = bench.submit_request(ValidRequest { deadline: deadline(5), ..request(4, 50, 0) });
    let mut waits = bench.submit_request(ValidRequest { deadline: deadline(3), ..request(4, 50, 0) });
    bench.step_at(now);
    bench.step_at(now + Duration::from_secs(4));
    assert_eq!(drain(&mut waits).1, Some(Err(ShardError::Deadline(Duration::from_secs(3)))));
    assert_eq!(drain(&mut runs).1, None);
    bench.step_at(now + Duration::from_secs(5));
    assert_eq!(drain(&mut runs).1, Some(Err(ShardError::Deadline(Duration::from_secs(5)))));
    assert_eq!(bench.scheduler.load().reserved, TokenCount(0));
}

#[test]
fn the_next_turn_of_a_chat_computes_only_what_is_new() {
    let mut bench = bench();
    let events = vec![bench.submit(10, 12)];
    let (tokens, finished) = finish(&mut bench, events).remove(0).unwrap();
    assert_eq!(finished.cached, TokenCount(0));
    let mut next = request(10, 3, 0);
    next.prompt.ids =
        next.prompt.ids.iter().chain(&tokens).copied().chain([TokenId(77), TokenId(78)]).collect();
    let mut events = bench.submit_request(next);
    let plan = bench.step();
    // Of 10 + 12 tokens all but the last are computed: five whole blocks.
    assert_eq!(plan.batch.unwrap().admissions[0].cached, TokenCount(20));
    bench.steps(3);
    let Some(Ok(Event::Last(_, finished))) = drain(&mut events).1 else { panic!("no end") };
    assert_eq!(finished.cached, TokenCount(20));
    let tally = bench.scheduler.take_tally();
    assert_eq!((tally.cached_tokens, tally.prompt_tokens), (20, 34));
}

#[test]
fn prompts_whose_log_probabilities_are_wanted_are_computed_whole() {
    let mut bench = bench();
    let events = vec![bench.submit(12, 2)];
    finish(&mut bench, events).remove(0).unwrap();
    let _events = bench.submit_request(ValidRequest { prompt_logprobs: true, ..request(12, 2, 0) });
    assert_eq!(bench.step().batch.unwrap().admissions[0].cached, TokenCount(0));
}

#[test]
fn prompts_beyond_the_limit_share_nothing() {
    let limits = Limits { shared_prompt_max: TokenCount(11), ..on_demand() };
    let mut bench = Bench::new(limits);
    let mut cached = |prompt| {
        let events = vec![bench.submit(prompt, 2)];
        finish(&mut bench, events).remove(0).unwrap().1.cached.0
    };
    assert_eq!([cached(12), cached(12), cached(11), cached(11), cached(12)], [0, 0, 0, 8, 0]);
}

#[test]
fn rows_that_generate_have_a_token_in_every_step_beside_a_long_prompt() {
    let mut bench = bench();
    let mut short = bench.submit(4, 30);
    bench.step();
    let mut long = bench.submit(100, 2);
    let mut steps = 0;
    while drain(&mut long).0.is_empty() {
        drain(&mut short);
        bench.step();
        steps += 1;
        assert_eq!(drain(&mut short).0.len(), 1, "one token in every step");
    }
    assert_eq!(steps, 4, "31 tokens besides the other row in each step");
}

#[test]
fn of_unfinished_prompts_the_oldest_comes_first() {
    let mut bench = bench();
    let _events = [bench.submit_request(marked(50, 2, 91)), bench.submit_request(marked(50, 2, 92))];
    assert_eq!(admitted(&bench.step()), [(0, 32)]);
    let plan = bench.step();
    assert_eq!((plan.grants[0].tokens, admitted(&plan)), (Some(TokenCount(18)), vec![(1, 14)]));
}

#[test]
fn small_requests_overtake_a_large_one_that_does_not_fit_but_not_for_ever() {
    let mut bench = small(20);
    let _running = bench.submit(40, 30);
    bench.steps(3);
    let _large = bench.submit_request(marked(60, 2, 99));
    let (mut overtakers, mut events) = (0, Vec::new());
    loop {
        events.push(bench.submit_request(request(1, 1, 0)));
        let entering = admitted(&bench.step());
        if entering.iter().any(|(id, _)| *id == 1) {
            break;
        }
        overtakers += entering.len();
    }
    assert_eq!(overtakers, 16);
}

#[test]
fn a_refused_step_fails_those_that_were_to_join_and_nobody_else() {
    let mut bench = bench();
    let mut first = bench.submit(6, 9);
    bench.step();
    drain(&mut first);
    let mut second = bench.submit(5, 9);
    let refusal = ShardError::Refused("no such adapter".to_owned());
    bench.shards.failure = Some(refusal.clone());
    bench.step();
    assert_eq!(drain(&mut second).1, Some(Err(refusal)));
    let (mut tokens, mut end) = (1, None);
    while end.is_none() {
        bench.step();
        let (more, ending) = drain(&mut first);
        tokens += more.len();
        end = ending;
    }
    assert_eq!((tokens, end.unwrap().is_ok()), (9, true));
}

#[test]
fn streams_go_on_after_their_shards_as_if_nothing_had_happened() {
    for failing in 0..12 {
        let mut bench = small(24);
        let events = vec![bench.submit(8, 30), bench.submit(37, 9), bench.submit(5, 1)];
        bench.steps(failing);
        bench.shards.failure = Some(ShardError::Connection("gone".to_owned()));
        let results = finish(&mut bench, events);
        for (result, (prompt, count)) in results.into_iter().zip([(8, 30), (37, 9), (5, 1)]) {
            assert_eq!(result.unwrap().0, expected(prompt, count), "after {failing} steps");
        }
    }
}

#[test]
fn a_smaller_cache_after_a_failure_refuses_only_what_no_longer_fits() {
    let mut bench = bench();
    let (mut large, mut small) = (bench.submit(40, 40), bench.submit(8, 5));
    bench.step();
    bench.scheduler.interrupt(&ShardError::Hung("for long".to_owned()));
    bench.shards.reset();
    bench.limits.capacity.blocks = BlockCount(11);
    bench.scheduler.restart(bench.limits.capacity);
    assert!(matches!(drain(&mut large).1, Some(Err(ShardError::Capacity { .. }))));
    bench.steps(10);
    assert_eq!(drain(&mut small).0, expected(8, 5));
}

#[test]
fn a_request_that_makes_the_shards_fail_is_alone_with_it_and_gets_an_error() {
    let mut bench = bench();
    bench.shards.poison = Some(TokenId(666));
    let healthy: Vec<Events> = (4..8).map(|prompt| bench.submit(prompt, 25)).collect();
    bench.steps(3);
    let mut poison = bench.submit_request(marked(50, 5, 666));
    let late = bench.submit(9, 25);
    let results = finish(&mut bench, healthy.into_iter().chain([late]).collect());
    for (result, prompt) in results.into_iter().zip([4, 5, 6, 7, 9]) {
        assert_eq!(result.unwrap().0, expected(prompt, 25));
    }
    assert!(matches!(drain(&mut poison).1, Some(Err(ShardError::Poisonous(_)))));
    assert_eq!(bench.shards.restored, 3, "once in company, twice alone");
}

#[test]
fn requests_that_are_tried_and_others_take_turns() {
    let mut bench = bench();
    let _running = bench.submit(4, 60);
    bench.step();
    // It begins in the step that fails, so it is tried; the other one was generating.
    let _tried = bench.submit_request(marked(60, 5, 7));
    bench.shards.failure = Some(ShardError::Connection("gone".to_owned()));
    bench.step();
    let passes: Vec<(Vec<(u64, u32)>, usize)> = (0..4)
        .map(|_| {
            let plan = bench.step();
            let sits_out = |grant: &&Grant| grant.tokens == Some(TokenCount(0));
            (admitted(&plan), plan.grants.iter().filter(sits_out).count())
        })
        .collect();
    assert_eq!(passes, [(vec![(1, 32)], 0), (vec![(0, 5)], 1), (vec![], 1), (vec![], 0)]);
}

#[test]
fn nothing_but_departures_is_no_pass() {
    let mut bench = bench();
    let events = bench.submit(4, 20);
    bench.steps(2);
    drop(events);
    let plan = bench.step();
    assert_eq!((plan.kind(), plan.drops), (None, ids(&[0])));
    assert_eq!(bench.step().kind(), None::<StepKind>);
}
