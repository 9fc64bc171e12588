//! Checkpoints of every family with the numbers that the reference library has for them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use shard::layers::Adapter;
use shard::model::Blueprint;

use crate::ranks;
use crate::steps::{Logits, Request, Runner, argmax, log_softmax};

/// How close a model has to come to what the reference library computes in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Largest difference in a log-probability.
    pub(crate) logprob: f64,
    /// Tokens have to be the same up to the first whose lead is less than this.
    pub(crate) margin: f64,
    /// Log-probabilities that may differ by more, as a share of all.
    pub(crate) strays: f64,
}

impl Bounds {
    pub(crate) const fn all(logprob: f64, margin: f64) -> Self {
        Self { logprob, margin, strays: 0.0 }
    }
}

/// What f32 arithmetic explains.
const EXACT: Bounds = Bounds::all(0.002, 0.0);

#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Prompt>,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Prompt {
    name: String,
    input_ids: Vec<u32>,
    prefill_logprobs: Vec<Option<f64>>,
    generated_ids: Vec<u32>,
    logprobs: Vec<f64>,
    top: Vec<Top>,
}

#[derive(Clone, Deserialize)]
struct Top {
    ids: Vec<u32>,
    logprobs: Vec<f64>,
}

impl Top {
    /// By how much the best is better than the second.
    fn lead(&self) -> f64 {
        match self.logprobs[..] {
            [first, second, ..] => first - second,
            _ => f64::INFINITY,
        }
    }
}

/// Where the fixtures are: in the repository that this was built from, or else in that which it is run in.
pub(crate) fn root() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures");
    if built.exists() { built } else { PathBuf::from("integration-tests/fixtures") }
}

/// All fixtures, or those that `FIXTURES` names.
pub(crate) fn directories() -> Vec<PathBuf> {
    let all = root();
    let only = std::env::var("FIXTURES").unwrap_or_default();
    let entries = std::fs::read_dir(&all).expect("the fixtures are part of the repository");
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("the directory can be read").path())
        .filter(|path| path.join("expected.json").exists())
        .filter(|path| only.is_empty() || only.split(',').any(|name| name == name_of(path)))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no fixture in {}", all.display());
    found
}

pub(crate) fn name_of(directory: &Path) -> String {
    directory.file_name().expect("a directory has a name").to_string_lossy().into_owned()
}

pub(crate) fn prompts(directory: &Path) -> Vec<Prompt> {
    let path = directory.join("expected.json");
    let contents = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let expected: Expected =
        serde_json::from_slice(&contents).expect("expected.json has the documented form");
    expected.prompts
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

/// The largest difference in any log-probability but for the strays; errors when a token is another.
pub(crate) fn compare(
    runner: &mut Runner,
    prompts: &[Prompt],
    adapter: Option<&Arc<Adapter>>,
    bounds: Bounds,
) -> Result<f64, String> {
    let mut differences: Vec<f64> = Vec::new();
    for prompt in prompts {
        let mut sure = true;
        let mut request = runner.request(&prompt.input_ids, prompt.generated_ids.len());
        request.adapter = adapter.cloned();
        let mut logits = runner.try_step(&mut [&mut request], usize::MAX)?.remove(0);
        for (at, expected) in prompt.prefill_logprobs.iter().enumerate().skip(1) {
            let found = log_softmax(&logits[at - 1])[prompt.input_ids[at] as usize];
            differences.push((found - expected.expect("only the first token has none")).abs());
        }
        for (step, &expected) in prompt.generated_ids.iter().enumerate() {
            let last = logits.last().expect("a step has rows");
            let logprobs = log_softmax(last);
            let found = argmax(last);
            sure &= prompt.top[step].lead() >= bounds.margin;
            if sure && found != expected {
                return Err(format!("{}, token {step}: {found}, {expected} expected", prompt.name));
            }
            differences.push((logprobs[expected as usize] - prompt.logprobs[step]).abs());
            let Top { ids, logprobs: expected } = &prompt.top[step];
            for (&id, &expected) in ids.iter().zip(expected) {
                differences.push((logprobs[id as usize] - expected).abs());
            }
            request.ids.push(prompt.generated_ids[step]);
            logits = runner.try_step(&mut [&mut request], usize::MAX)?.remove(0);
        }
    }
    // NaN comes last.
    differences.sort_by(f64::total_cmp);
    let strays = (differences.len() as f64 * bounds.strays) as usize;
    Ok(differences[differences.len() - 1 - strays])
}

/// A table of fixtures and what was found, and an error if one of them is not as it should be.
pub(crate) fn report(found: BTreeMap<String, (Result<f64, String>, Bounds)>) {
    let (mut wrong, all) = (0, found.len());
    for (name, (found, bounds)) in found {
        match found {
            Ok(worst) if worst < bounds.logprob => println!("{name:28} {worst:.6}"),
            Ok(worst) => {
                wrong += 1;
                println!("{name:28} {worst:.6} too far");
            }
            Err(reason) => {
                wrong += 1;
                println!("{name:28} {reason}");
            }
        }
    }
    assert_eq!(wrong, 0, "of {all} fixtures");
}

#[test]
fn every_family_answers_as_the_reference_library_does() {
    let mut found = BTreeMap::new();
    for directory in directories() {
        let worst = Runner::open(&directory, 2)
            .and_then(|mut runner| compare(&mut runner, &prompts(&directory), None, EXACT));
        found.insert(name_of(&directory), (worst, EXACT));
    }
    report(found);
}

#[test]
fn every_family_answers_alike_on_several_ranks() {
    let mut found = BTreeMap::new();
    for directory in directories() {
        for world in [2, 4] {
            if let Err(error) = Blueprint::read(&directory, world, None) {
                let odd = !heads(&directory).is_multiple_of(world);
                let refused = error.to_string().contains(&format!("cannot be split over {world} shards"));
                assert!(refused && (odd || world == 4), "{}: {error}", directory.display());
                continue;
            }
            let prompts = prompts(&directory);
            let results = ranks::run(world, |ranks| {
                let mut runner = Runner::open_ranks(&directory, 1, ranks)?;
                compare(&mut runner, &prompts, None, EXACT)
            });
            for (rank, result) in results.into_iter().enumerate() {
                found.insert(format!("{} {rank}/{world}", name_of(&directory)), (result, EXACT));
            }
        }
    }
    report(found);
}

/// Every fixture's adapters: the fixture, and the adapter's directory.
pub(crate) fn adapters() -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for directory in directories() {
        let Ok(entries) = std::fs::read_dir(directory.join("adapters")) else { continue };
        let adapters = entries.map(|entry| entry.expect("the directory can be read").path());
        found.extend(adapters.map(|adapter| (directory.clone(), adapter)));
    }
    found.sort();
    found
}

#[test]
fn adapters_answer_as_the_reference_library_does_on_one_rank_and_on_two() {
    let mut found = BTreeMap::new();
    let all = adapters();
    assert!(!all.is_empty(), "no fixture has an adapter");
    for (directory, adapter) in all {
        let prompts = prompts(&adapter);
        let run = |mut runner: Runner| {
            let adapter = runner.adapter(&adapter)?;
            compare(&mut runner, &prompts, Some(&adapter), EXACT)
        };
        let name = format!("{} + {}", name_of(&directory), name_of(&adapter));
        found.insert(name.clone(), (Runner::open(&directory, 2).and_then(run), EXACT));
        if heads(&directory).is_multiple_of(2) {
            let results = ranks::run(2, |ranks| Runner::open_ranks(&directory, 1, ranks).and_then(run));
            for (rank, result) in results.into_iter().enumerate() {
                found.insert(format!("{name} {rank}/2"), (result, EXACT));
            }
        }
    }
    report(found);
}

#[test]
fn requests_with_different_adapters_do_not_change_each_other_in_a_batch() {
    let mut by_model: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for (directory, adapter) in adapters() {
        by_model.entry(directory).or_default().push(adapter);
    }
    for (directory, adapters) in by_model {
        let mut runner = Runner::new(&directory, 2);
        let loaded = adapters.iter().map(|adapter| runner.adapter(adapter).expect("the adapter is good"));
        let choices: Vec<Option<Arc<Adapter>>> = std::iter::once(None).chain(loaded.map(Some)).collect();
        let prompts = prompts(&directory);
        let mut requests: Vec<Request> = Vec::new();
        for (prompt, adapter) in
            prompts.iter().flat_map(|prompt| choices.iter().map(move |choice| (prompt, choice)))
        {
            let mut request = runner.request(&prompt.input_ids[..prompt.input_ids.len().min(20)], 0);
            request.adapter = adapter.clone();
            requests.push(request);
        }
        let together = runner.step(&mut requests.iter_mut().collect::<Vec<_>>(), usize::MAX);
        for (request, together) in requests.iter().zip(&together) {
            let mut alone = runner.request(&request.ids, 0);
            alone.adapter = request.adapter.clone();
            let alone = runner.step(&mut [&mut alone], usize::MAX);
            assert_eq!(bits(&alone), bits(std::slice::from_ref(together)), "{}", directory.display());
        }
        let different = together.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(different > 0, "the adapters of {} change nothing", directory.display());
    }
}

/// Computes the prompts in chunks, each alone or all together, then some greedy tokens; returns all logits.
fn run(directory: &Path, threads: usize, chunk: usize, together: bool) -> Vec<Logits> {
    let mut runner = Runner::new(directory, threads);
    // Eight requests: the prompts, and the prompts without their beginning.
    let whole = prompts(directory).into_iter().map(|prompt| prompt.input_ids);
    let part = prompts(directory).into_iter().map(|prompt| prompt.input_ids[3..].to_vec());
    let mut requests: Vec<Request> = whole.chain(part).map(|ids| runner.request(&ids, 5)).collect();
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
fn chunks_neighbours_and_threads_do_not_change_a_bit_in_any_family() {
    for directory in directories() {
        let name = name_of(&directory);
        let alone = bits(&run(&directory, 1, usize::MAX, false));
        let same = |threads, chunk, together| bits(&run(&directory, threads, chunk, together)) == alone;
        assert!(same(1, 7, false), "{name}: chunks of 7");
        assert!(same(1, usize::MAX, true), "{name}: all requests together");
        assert!(same(2, 7, true), "{name}: together, in chunks of 7, on two threads");
    }
}

#[test]
fn a_row_has_the_same_logits_when_it_is_the_only_one_asked_for() {
    for directory in directories() {
        let mut runner = Runner::new(&directory, 2);
        for prompt in prompts(&directory) {
            let (mut every, mut only) =
                (runner.request(&prompt.input_ids, 0), runner.request(&prompt.input_ids, 0));
            let every =
                runner.step(&mut [&mut every], usize::MAX).remove(0).pop().expect("a prompt has tokens");
            let only = runner.last_logits(&mut only);
            assert_eq!(bits(&[vec![every]]), bits(&[vec![only]]), "{}", prompt.name);
        }
    }
}
