use std::time::Duration;

use super::*;
use crate::batching::{FinishReason, JoinReason, Step, StepKind, Token};
use crate::shards::{End, Generation, StepOutput};

fn chunked() -> Bench {
    Bench::new(limits(PromptPolicy::Chunked))
}

fn whole() -> Bench {
    Bench::new(limits(WHOLE))
}

fn step(token: u32) -> Step {
    let token = Token { id: TokenId(token), text: String::new(), logprob: -1.0, special: false };
    Step { token, alternatives: Vec::new() }
}

#[test]
fn a_request_runs_from_its_prompt_to_its_last_token() {
    let mut bench = chunked();
    let mut events = bench.submit(5, 3);
    assert_eq!(bench.step().kind(), Some(StepKind::Prefill));
    assert_eq!(bench.step().kind(), Some(StepKind::Decode));
    bench.step();
    let (tokens, end) = drain(&mut events);
    assert_eq!(tokens, [5000, 5001, 5002].map(TokenId));
    let Some(Ok(Event::Last(_, finished))) = end else { panic!("{end:?}") };
    assert_eq!((finished.tokens, finished.reason), (TokenCount(3), FinishReason::Length));
    assert_eq!(bench.step().kind(), None);
    assert_eq!(bench.scheduler.load().reserved, TokenCount(0));
}

#[test]
fn the_end_says_when_the_request_was_queued_and_when_it_started() {
    let mut bench = chunked();
    let mut events = bench.submit(1, 1);
    let now = Instant::now() + Duration::from_secs(9);
    let plan = bench.scheduler.plan(now);
    let output = bench.shards.run(&plan).unwrap();
    bench.scheduler.apply(output);
    let Some(Ok(Event::Last(_, finished))) = drain(&mut events).1 else { panic!("no end") };
    assert_eq!(finished.started, now);
    assert!(finished.queued < now);
}

#[test]
fn new_requests_join_those_that_run() {
    let mut bench = chunked();
    let _first = bench.submit(5, 9);
    assert_eq!(bench.step().batch.unwrap().joins, None);
    let _second = bench.submit(6, 9);
    let plan = bench.step();
    assert_eq!((admitted(&plan), plan.continues), (vec![(1, 6)], true));
    assert_eq!(plan.batch.unwrap().joins, Some(JoinReason::Chunking));
    assert_eq!(bench.shards.rows(), ids(&[0, 1]));
}

#[test]
fn a_long_prompt_is_cut_to_the_budget() {
    let mut bench = chunked();
    let _short = bench.submit(20, 9);
    let _long = bench.submit(100, 9);
    assert_eq!(admitted(&bench.step()), [(0, 20), (1, 12)]);
}

#[test]
fn decode_rows_never_wait_for_a_long_prompt() {
    let mut bench = chunked();
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
fn what_unfinished_prompts_and_running_rows_feed_is_not_given_twice() {
    let mut bench = chunked();
    let _running = bench.submit(4, 30);
    bench.step();
    let _long = bench.submit(70, 2);
    assert_eq!(admitted(&bench.step()), [(1, 31)]);
    let _late = bench.submit(10, 2);
    assert_eq!(admitted(&bench.step()), [], "the long prompt takes the whole pass");
    assert_eq!(admitted(&bench.step()), [(2, 10)], "its last piece of 8 leaves room");
}

#[test]
fn the_batch_never_grows_beyond_its_limit() {
    let mut bench = Bench::new(at_most(2, limits(PromptPolicy::Chunked)));
    let _events: Vec<Events> = (0..3).map(|_| bench.submit(4, 2)).collect();
    assert_eq!(admitted(&bench.step()), [(0, 4), (1, 4)]);
    assert_eq!(admitted(&bench.step()), []);
    assert_eq!(admitted(&bench.step()), [(2, 4)]);
}

#[test]
fn an_older_request_that_fits_is_never_overtaken() {
    let mut bench = chunked();
    let _running = bench.submit(30, 91); // 30 of 40 blocks
    let _large = bench.submit(20, 41); // 15 blocks
    let _small = bench.submit(4, 1); // 1 block
    assert_eq!(admitted(&bench.step()), [(0, 30)]);
    bench.steps(89);
    assert_eq!(admitted(&bench.step()), [], "the small one waits behind the large one");
    assert_eq!(admitted(&bench.step()), [(1, 20), (2, 4)]);
}

#[test]
fn blocks_are_leased_for_all_tokens_but_the_last() {
    let mut bench = chunked();
    let _events = bench.submit(6, 3);
    let plan = bench.step();
    let admission = &plan.batch.as_ref().unwrap().admissions[0];
    assert_eq!((admission.reach, admission.blocks.len()), (Some(TokenCount(8)), 2));
    assert_eq!(bench.scheduler.load().reserved, TokenCount(8));
}

#[test]
fn a_request_that_can_never_run_is_refused_and_stalls_nobody() {
    let mut bench = chunked();
    let mut huge = bench.submit(100, 62);
    let mut small = bench.submit(4, 1);
    let error = ShardError::Capacity { need: TokenCount(161), usable: TokenCount(160) };
    assert_eq!(drain(&mut huge).1, Some(Err(error)));
    bench.step();
    assert_eq!(drain(&mut small).0.len(), 1);
}

#[test]
fn a_whole_prompt_beyond_the_budget_is_refused() {
    let mut bench = whole();
    let mut long = bench.submit(33, 1);
    let error = ShardError::Prompt { tokens: TokenCount(33), limit: TokenCount(32) };
    assert_eq!(drain(&mut long).1, Some(Err(error)));
}

#[test]
fn what_the_shards_do_not_understand_is_refused_by_name() {
    let mut bench = chunked();
    let mut wish = request(4, 2, 0);
    wish.sampling.min_p = 0.1;
    let (waiting, mut events) = Waiting::new(wish, Instant::now());
    bench.scheduler.submit(waiting);
    assert_eq!(drain(&mut events).1, Some(Err(ShardError::Unsupported("min_p"))));
}

#[test]
fn a_cancelled_request_in_the_queue_never_reaches_a_shard() {
    let mut bench = chunked();
    drop(bench.submit(4, 2));
    let _stays = bench.submit(4, 2);
    drop(bench.submit(4, 2));
    assert_eq!(admitted(&bench.step()), [(1, 4)]);
    assert_eq!(bench.scheduler.load().waiting, 0);
}

#[test]
fn cancelling_frees_blocks_before_the_next_step() {
    let mut bench = chunked();
    let leaves = bench.submit(30, 91);
    bench.step();
    let _next = bench.submit(20, 121); // needs the blocks of the first
    assert_eq!(admitted(&bench.step()), []);
    drop(leaves);
    let plan = bench.step();
    assert_eq!((plan.drops.clone(), admitted(&plan)), (ids(&[0]), vec![(1, 20)]));
    assert!(!plan.continues, "nobody is left to continue");
}

#[test]
fn a_client_that_leaves_in_mid_prompt_is_dropped_at_once() {
    let mut bench = chunked();
    let _stays = bench.submit(4, 30);
    let leaves = bench.submit(100, 2);
    bench.step();
    drop(leaves);
    let plan = bench.step();
    assert_eq!((plan.drops, plan.continues), (ids(&[1]), true));
    assert_eq!(bench.shards.rows(), ids(&[0]));
}

#[test]
fn finished_rows_are_dropped_before_the_others_go_on() {
    let mut bench = chunked();
    let _short = bench.submit(4, 1);
    let _long = bench.submit(4, 9);
    bench.step();
    assert_eq!(bench.shards.rows(), ids(&[0, 1]));
    assert_eq!(bench.step().drops, ids(&[0]));
    assert_eq!(bench.shards.rows(), ids(&[1]));
}

#[test]
fn every_request_of_a_failed_step_hears_why_and_the_next_one_runs() {
    let mut bench = chunked();
    let mut events: Vec<Events> = (0..2).map(|_| bench.submit(4, 9)).collect();
    bench.step();
    events.push(bench.submit(4, 9));
    let error = ShardError::Server("out of memory".to_owned());
    bench.shards.failure = Some(error.clone());
    bench.step();
    for stream in &mut events {
        assert_eq!(drain(stream).1, Some(Err(error.clone())));
    }
    let mut next = bench.submit(4, 1);
    assert_eq!(bench.step().drops, [], "the shards have forgotten the failed rows");
    assert_eq!(drain(&mut next).0.len(), 1);
}

#[test]
fn a_failed_prefill_of_whole_prompts_spares_the_running_rows() {
    let mut bench = whole();
    let mut runs = bench.submit(4, 9);
    bench.steps(2);
    let mut fails = bench.submit(4, 9);
    bench.shards.failure = Some(ShardError::Empty);
    bench.step();
    assert_eq!(drain(&mut fails).1, Some(Err(ShardError::Empty)));
    bench.steps(7);
    let (tokens, end) = drain(&mut runs);
    assert!(tokens.len() == 9 && matches!(end, Some(Ok(_))), "{end:?}");
}

#[test]
fn whole_prompts_are_computed_alone_and_then_all_rows_together() {
    let mut bench = whole();
    let _events: Vec<Events> = (0..2).map(|_| bench.submit(4, 9)).collect();
    bench.steps(2);
    let _late = bench.submit(4, 9);
    let plan = bench.step();
    assert_eq!((admitted(&plan), plan.continues), (vec![(2, 4)], false));
    assert_eq!(plan.batch.unwrap().joins, Some(JoinReason::Backpressure));
    let plan = bench.step();
    assert_eq!((plan.kind(), plan.continues), (Some(StepKind::Decode), true));
    assert_eq!(bench.shards.rows(), ids(&[0, 1, 2]));
}

#[test]
fn too_few_whole_prompts_wait_until_they_waited_long_enough() {
    let mut bench = whole();
    let mut events: Vec<Events> = (0..4).map(|_| bench.submit(4, 20)).collect();
    bench.step();
    events.push(bench.submit(4, 9)); // one, where two would be worth it
    let kinds: Vec<bool> = (0..4).map(|_| bench.step().batch.is_some()).collect();
    assert_eq!(kinds, [false, false, false, true]);
}

#[test]
fn too_few_that_fit_are_put_back_in_their_order() {
    let mut bench = whole();
    let mut events: Vec<Events> = (0..4).map(|_| bench.submit(4, 33)).collect(); // 9 blocks each
    bench.step();
    events.extend((0..3).map(|_| bench.submit(4, 13))); // 4 blocks each, of which one fits
    for _ in 0..3 {
        assert_eq!(admitted(&bench.step()), []);
        assert_eq!(bench.scheduler.load().waiting, 3);
    }
    assert_eq!(admitted(&bench.step()), [(4, 4)]);
}

#[test]
fn several_tokens_of_one_step_become_several_events() {
    let mut bench = chunked();
    let mut events = bench.submit(4, 9);
    bench.scheduler.plan(Instant::now());
    let end = End {
        text: "abc".to_owned(),
        tokens: TokenCount(3),
        reason: FinishReason::StopSequence,
        seed: Some(1),
    };
    let request = RequestId(0);
    let generation = Generation {
        request,
        prompt: Some(Vec::new()),
        earlier: vec![step(1), step(2)],
        newest: step(3),
        end: Some(end),
    };
    bench.scheduler.apply(StepOutput { generations: vec![generation], ..StepOutput::default() });
    assert_eq!(events.try_recv(), Ok(Ok(Event::Prompt(Vec::new()))));
    let (tokens, end) = drain(&mut events);
    assert_eq!(tokens, [1, 2, 3].map(TokenId));
    let Some(Ok(Event::Last(_, finished))) = end else { panic!("{end:?}") };
    assert_eq!((finished.text.as_str(), finished.reason), ("abc", FinishReason::StopSequence));
}

#[test]
fn a_shard_that_sends_more_than_was_asked_for_loses_only_that_request() {
    let mut bench = chunked();
    let _flooded = bench.submit(4, 1);
    let _other = bench.submit(4, 9);
    bench.scheduler.plan(Instant::now());
    let generation = |id, earlier| Generation {
        request: RequestId(id),
        prompt: None,
        earlier: (0..earlier).map(step).collect(),
        newest: step(9),
        end: None,
    };
    let generations = vec![generation(0, 9), generation(1, 0)];
    bench.scheduler.apply(StepOutput { generations, ..StepOutput::default() });
    assert_eq!(bench.scheduler.load().running, 1);
}

#[test]
fn a_row_that_should_have_a_token_and_has_none_is_not_waited_for() {
    let mut bench = chunked();
    let mut forgotten = bench.submit(4, 9);
    bench.scheduler.plan(Instant::now());
    bench.scheduler.apply(StepOutput::default());
    assert!(matches!(drain(&mut forgotten).1, Some(Err(ShardError::Answer(_)))));
    assert_eq!(bench.scheduler.load().running, 0);
}

#[test]
fn guesses_are_leased_room_for() {
    let mut limits = limits(WHOLE);
    limits.capacity.speculate = TokenCount(3);
    let mut bench = Bench::new(limits);
    let _events = bench.submit(6, 3);
    assert_eq!(bench.step().batch.unwrap().admissions[0].reach, Some(TokenCount(11)));
}

#[test]
fn a_scheduler_that_is_dropped_gives_its_leases_back() {
    let mut bench = chunked();
    let _events = bench.submit(4, 9);
    bench.step();
    drop(bench);
}
