use std::path::PathBuf;

use serde::Deserialize;

use crate::steps::{Logits, Request, Runner, argmax, log_softmax};

/// Largest difference in a log-probability that f32 arithmetic explains.
const TOLERANCE: f64 = 0.001;

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    input_ids: Vec<u32>,
    prefill_logprobs: Vec<Option<f64>>,
    generated_ids: Vec<u32>,
    logprobs: Vec<f64>,
    top: Vec<Top>,
}

#[derive(Deserialize)]
struct Top {
    ids: Vec<u32>,
    logprobs: Vec<f64>,
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/llama")
}

fn prompts() -> Vec<Prompt> {
    let path = directory().join("expected.json");
    let contents = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice::<Expected>(&contents).expect("expected.json has the documented form").prompts
}

fn check_logprob(what: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() < TOLERANCE, "{what}: found {found}, expected {expected}");
}

#[test]
fn prompts_and_greedy_continuations_are_the_reference_librarys() {
    let mut runner = Runner::new(&directory(), 2);
    for prompt in prompts() {
        let mut request = runner.request(&prompt.input_ids, prompt.generated_ids.len());
        let mut logits = runner.step(&mut [&mut request], usize::MAX).remove(0);
        for (at, expected) in prompt.prefill_logprobs.iter().enumerate().skip(1) {
            let found = log_softmax(&logits[at - 1])[prompt.input_ids[at] as usize];
            let what = format!("{}, prompt token {at}", prompt.name);
            check_logprob(&what, found, expected.expect("only the first token has none"));
        }
        for (step, &expected) in prompt.generated_ids.iter().enumerate() {
            let last = logits.last().expect("a step has rows");
            let what = format!("{}, generated token {step}", prompt.name);
            assert_eq!(argmax(last), expected, "{what}");
            let logprobs = log_softmax(last);
            check_logprob(&what, logprobs[expected as usize], prompt.logprobs[step]);
            let Top { ids, logprobs: expected } = &prompt.top[step];
            for (&id, &expected) in ids.iter().zip(expected) {
                check_logprob(&format!("{what}, token {id} of the best"), logprobs[id as usize], expected);
            }
            request.ids.push(prompt.generated_ids[step]);
            logits = runner.step(&mut [&mut request], usize::MAX).remove(0);
        }
    }
}

/// Computes the prompts in chunks, each alone or all together, then some greedy tokens; returns all logits.
fn run(threads: usize, chunk: usize, together: bool) -> Vec<Logits> {
    let mut runner = Runner::new(&directory(), threads);
    let mut requests: Vec<Request> =
        prompts().iter().map(|prompt| runner.request(&prompt.input_ids, 5)).collect();
    let mut logits: Vec<Logits> = requests.iter().map(|_| vec![]).collect();
    let groups: Vec<Vec<usize>> = match together {
        true => vec![(0..requests.len()).collect()],
        false => (0..requests.len()).map(|request| vec![request]).collect(),
    };
    for group in groups {
        let members = group[0]..group[group.len() - 1] + 1;
        let mut members: Vec<&mut Request> = requests[members].iter_mut().collect();
        for token in 0..5 {
            advance(&mut runner, &mut members, chunk, &mut logits[group[0]..]);
            for (member, logits) in members.iter_mut().zip(&logits[group[0]..]) {
                let last = logits.last().expect("every request was advanced");
                if token < 4 {
                    member.ids.push(argmax(last));
                }
            }
        }
    }
    logits
}

/// Steps until every token so far is computed.
fn advance(runner: &mut Runner, members: &mut [&mut Request], chunk: usize, logits: &mut [Logits]) {
    loop {
        let answers = runner.step(members, chunk);
        if answers.iter().all(Vec::is_empty) {
            return;
        }
        for (logits, answer) in logits.iter_mut().zip(answers) {
            logits.extend(answer);
        }
    }
}

fn bits(logits: &[Logits]) -> Vec<Vec<Vec<u32>>> {
    let row = |row: &Vec<f32>| row.iter().map(|logit| logit.to_bits()).collect();
    logits.iter().map(|request| request.iter().map(row).collect()).collect()
}

#[test]
fn chunks_neighbours_and_threads_do_not_change_a_bit() {
    let alone = bits(&run(1, usize::MAX, false));
    let same = |threads, chunk, together| bits(&run(threads, chunk, together)) == alone;
    assert!(same(1, 7, false), "chunks of 7");
    assert!(same(1, usize::MAX, true), "all prompts together");
    assert!(same(2, 7, true), "together, in chunks of 7, on two threads");
    assert!(same(3, usize::MAX, true), "three threads");
}

#[test]
fn a_row_has_the_same_logits_when_it_is_the_only_one_asked_for() {
    let mut runner = Runner::new(&directory(), 2);
    for prompt in prompts() {
        let (mut every, mut only) =
            (runner.request(&prompt.input_ids, 0), runner.request(&prompt.input_ids, 0));
        let every = runner.step(&mut [&mut every], usize::MAX).remove(0).pop().expect("a prompt has tokens");
        let only = runner.last_logits(&mut only);
        assert_eq!(bits(&[vec![every]]), bits(&[vec![only]]), "{}", prompt.name);
    }
}
