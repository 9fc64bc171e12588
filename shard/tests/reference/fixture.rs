//! Checkpoints of every family with the numbers that the reference library has for them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shard::backend::Device;
use shard::collective::Ranks;
use shard::doctor::fixtures::{Bounds, Fixture};
use shard::doctor::runner::{Logits, Request, Runner, argmax};
use shard::layers::Adapter;
use shard::model::Blueprint;

use crate::ranks;

/// What f32 arithmetic explains.
const EXACT: Bounds = Bounds::all(0.002, 0.0);

/// Where the fixtures are: in the repository that this was built from, or else in that which it is run in.
pub(crate) fn root() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures");
    if built.exists() { built } else { PathBuf::from("integration-tests/fixtures") }
}

/// All fixtures, or those of the checkpoints that `FIXTURES` names.
fn all() -> Vec<Fixture> {
    let only = std::env::var("FIXTURES").unwrap_or_default();
    let only: Vec<String> = only.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    Fixture::find(&root(), &only).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Without adapters.
pub(crate) fn checkpoints() -> Vec<Fixture> {
    all().into_iter().filter(|fixture| fixture.adapter.is_none()).collect()
}

/// With an adapter.
pub(crate) fn adapters() -> Vec<Fixture> {
    all().into_iter().filter(|fixture| fixture.adapter.is_some()).collect()
}

pub(crate) fn cpu(threads: usize) -> Device {
    let threads = NonZeroUsize::new(threads).expect("at least one thread");
    Device::cpu(threads).expect("the CPU is always there")
}

/// A fixture's model on so many threads.
fn runner(fixture: &Fixture, threads: usize) -> Runner {
    Runner::open(&fixture.checkpoint, &cpu(threads), Ranks::alone()).expect("the checkpoint is good")
}

/// The largest difference of a log-probability.
pub(crate) fn check(fixture: &Fixture, device: &Device, ranks: Ranks, bounds: Bounds) -> anyhow::Result<f64> {
    let furthest = fixture.compare(&fixture.answers(device, ranks)?, bounds)?;
    Ok(furthest.difference)
}

/// Attention heads, under whatever name the family has them.
fn heads(directory: &Path) -> usize {
    let contents = std::fs::read(directory.join("config.json")).expect("a checkpoint has a configuration");
    let config: serde_json::Value = serde_json::from_slice(&contents).expect("it is JSON");
    let inside = if config["text_config"].is_object() { &config["text_config"] } else { &config };
    let names = ["num_attention_heads", "n_head", "n_heads"];
    let heads = names.iter().find_map(|name| inside[name].as_u64()).expect("every family has heads");
    heads as usize
}

/// A table of fixtures and what was found, and an error if one of them is not as it should be.
pub(crate) fn report(found: BTreeMap<String, (anyhow::Result<f64>, Bounds)>) {
    let (mut wrong, all) = (0, found.len());
    assert!(all > 0, "no fixture was checked");
    for (name, (found, bounds)) in found {
        match found {
            Ok(worst) if worst < bounds.logprob => println!("{name:28} {worst:.6}"),
            Ok(worst) => {
                wrong += 1;
                println!("{name:28} {worst:.6} too far");
            }
            Err(reason) => {
                wrong += 1;
                println!("{name:28} {reason:#}");
            }
        }
    }
    assert_eq!(wrong, 0, "of {all} fixtures");
}

#[test]
fn every_family_answers_as_the_reference_library_does() {
    let mut found = BTreeMap::new();
    for fixture in checkpoints() {
        found.insert(fixture.name(), (check(&fixture, &cpu(2), Ranks::alone(), EXACT), EXACT));
    }
    report(found);
}

#[test]
fn every_family_answers_alike_on_several_ranks() {
    let mut found = BTreeMap::new();
    for fixture in checkpoints() {
        let directory = &fixture.checkpoint;
        for world in [2, 4] {
            if let Err(error) = Blueprint::read(directory, world, None) {
                let odd = !heads(directory).is_multiple_of(world);
                let refused = error.to_string().contains(&format!("cannot be split over {world} shards"));
                assert!(refused && (odd || world == 4), "{}: {error}", directory.display());
                continue;
            }
            let results = ranks::run(world, |ranks| check(&fixture, &cpu(1), ranks, EXACT));
            for (rank, result) in results.into_iter().enumerate() {
                found.insert(format!("{} {rank}/{world}", fixture.name()), (result, EXACT));
            }
        }
    }
    report(found);
}

#[test]
fn adapters_answer_as_the_reference_library_does_on_one_rank_and_on_two() {
    let mut found = BTreeMap::new();
    for fixture in adapters() {
        let name = fixture.name();
        found.insert(name.clone(), (check(&fixture, &cpu(2), Ranks::alone(), EXACT), EXACT));
        if heads(&fixture.checkpoint).is_multiple_of(2) {
            let results = ranks::run(2, |ranks| check(&fixture, &cpu(1), ranks, EXACT));
            for (rank, result) in results.into_iter().enumerate() {
                found.insert(format!("{name} {rank}/2"), (result, EXACT));
            }
        }
    }
    report(found);
}

#[test]
fn requests_with_different_adapters_do_not_change_each_other_in_a_batch() {
    let (all, adapters) = (checkpoints(), adapters());
    for fixture in all {
        let adapters = adapters.iter().filter(|adapted| adapted.checkpoint == fixture.checkpoint);
        let mut runner = runner(&fixture, 2);
        let loaded = adapters.filter_map(|adapted| adapted.adapter.as_deref());
        let loaded = loaded.map(|directory| runner.adapter(directory).expect("the adapter is good"));
        let choices: Vec<Option<Arc<Adapter>>> = std::iter::once(None).chain(loaded.map(Some)).collect();
        if choices.len() == 1 {
            continue;
        }
        let mut requests: Vec<Request> = Vec::new();
        for (prompt, adapter) in
            fixture.prompts.iter().flat_map(|prompt| choices.iter().map(move |choice| (prompt, choice)))
        {
            let ids = &prompt.input_ids[..prompt.input_ids.len().min(20)];
            let mut request = runner.request(ids, 0).expect("there is room");
            request.adapter = adapter.clone();
            requests.push(request);
        }
        let together = step(&mut runner, &mut requests.iter_mut().collect::<Vec<_>>(), usize::MAX);
        for (request, together) in requests.iter().zip(&together) {
            let mut alone = runner.request(&request.ids, 0).expect("there is room");
            alone.adapter = request.adapter.clone();
            let alone = step(&mut runner, &mut [&mut alone], usize::MAX);
            assert_eq!(bits(&alone), bits(std::slice::from_ref(together)), "{}", fixture.name());
        }
        let different = together.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(different > 0, "the adapters of {} change nothing", fixture.name());
    }
}

pub(crate) fn step(runner: &mut Runner, requests: &mut [&mut Request], tokens_max: usize) -> Vec<Logits> {
    runner.step(requests, tokens_max).expect("the step is well formed")
}

/// Computes the prompts in chunks, each alone or all together, then some greedy tokens; returns all logits.
fn run(fixture: &Fixture, threads: usize, chunk: usize, together: bool) -> Vec<Logits> {
    let mut runner = runner(fixture, threads);
    // Eight requests: the prompts, and the prompts without their beginning.
    let whole = fixture.prompts.iter().map(|prompt| &prompt.input_ids[..]);
    let part = fixture.prompts.iter().map(|prompt| &prompt.input_ids[3..]);
    let requests = whole.chain(part).map(|ids| runner.request(ids, 5).expect("there is room"));
    let mut requests: Vec<Request> = requests.collect();
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
        let answers = step(runner, members, chunk);
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
fn chunks_neighbours_and_threads_do_not_change_a_bit_in_any_family() {
    for fixture in checkpoints() {
        let name = fixture.name();
        let alone = bits(&run(&fixture, 1, usize::MAX, false));
        let same = |threads, chunk, together| bits(&run(&fixture, threads, chunk, together)) == alone;
        assert!(same(1, 7, false), "{name}: chunks of 7");
        assert!(same(1, usize::MAX, true), "{name}: all requests together");
        assert!(same(2, 7, true), "{name}: together, in chunks of 7, on two threads");
    }
}

#[test]
fn a_row_has_the_same_logits_when_it_is_the_only_one_asked_for() {
    for fixture in checkpoints() {
        let mut runner = runner(&fixture, 2);
        for prompt in &fixture.prompts {
            let [mut every, mut only] =
                [(); 2].map(|()| runner.request(&prompt.input_ids, 0).expect("there is room"));
            let every = step(&mut runner, &mut [&mut every], usize::MAX).remove(0);
            let every = every.into_iter().next_back().expect("a prompt has tokens");
            let only = runner.last_logits(&mut only).expect("the step is well formed");
            assert_eq!(bits(&[vec![every]]), bits(&[vec![only]]), "{}", prompt.name);
        }
    }
}
