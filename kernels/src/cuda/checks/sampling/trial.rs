use std::collections::BTreeSet;

use crate::cuda::checks::{Checker, Finding};
use crate::cuda::{LISTED_MAX, Sampled, SamplerState, SamplingRow};
use crate::reference::{self, Past};
use crate::{OpError, Sampling};

/// A choice to be made.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    pub(super) logits: Vec<f32>,
    /// But for bias and mask, which are beside it.
    pub(super) sampling: Sampling<'static>,
    pub(super) bias: Vec<(u32, f32)>,
    pub(super) mask: Option<Vec<u32>>,
    pub(super) prompt: Vec<u32>,
    pub(super) generated: Vec<u32>,
    pub(super) alternatives: u32,
}

/// Relative to the largest logit: what f32 makes of a few operations.
const ROUNDING: f64 = 12.0 / (1 << 24) as f64;
/// Masses that are as close as that may end a filter at one token or at the next.
const CLOSE: f32 = 1e-5;

impl Trial {
    pub(super) fn new(logits: Vec<f32>, sampling: Sampling<'static>) -> Self {
        let (bias, mask, prompt, generated) = (Vec::new(), None, Vec::new(), Vec::new());
        Self { logits, sampling, bias, mask, prompt, generated, alternatives: 0 }
    }

    fn sampling(&self) -> Sampling<'_> {
        Sampling { bias: &self.bias, mask: self.mask.as_deref(), ..self.sampling }
    }

    /// Each token of the history, how often it is in the prompt and how often it was generated.
    fn seen(&self) -> impl Iterator<Item = (u32, [u32; 2])> {
        let count = |ids: &[u32], id: u32| ids.iter().filter(|seen| **seen == id).count() as u32;
        let ids: BTreeSet<u32> = self.prompt.iter().chain(&self.generated).copied().collect();
        ids.into_iter().map(move |id| (id, [count(&self.prompt, id), count(&self.generated, id)]))
    }

    /// What the definition makes of the logits.
    fn processed(&self, sampling: &Sampling<'_>) -> Option<Vec<f64>> {
        let past = Past { prompt: &self.prompt, generated: &self.generated };
        reference::process(&self.logits, sampling, past)
    }

    /// How far the answer is from the definition's, as a share of its bound. None when the definition itself stands on
    /// the edge, so that a rounding decides.
    fn error(&self, found: Option<&Sampled>) -> Option<f64> {
        let (row, found) = match (self.processed(&self.sampling()), found) {
            (None, None) => return Some(0.0),
            (Some(row), Some(found)) => (row, found),
            _ => return Some(f64::INFINITY),
        };
        if self.is_on_edge(&row) {
            return None;
        }
        let expected = reference::choose(&row, &self.sampling);
        if found.token != expected {
            return if self.is_close_race(&row, found.token, expected) { None } else { Some(f64::INFINITY) };
        }
        let logprobs = reference::logprobs(&row);
        let scale = self.scale();
        let error = |(id, logprob): (u32, f32)| {
            let expected = logprobs[id as usize];
            (f64::from(logprob) - expected).abs() / (ROUNDING * scale.max(expected.abs()))
        };
        if !self.lists(&row, found, ROUNDING * scale) {
            return Some(f64::INFINITY);
        }
        let all = found.alternatives.iter().copied().chain([(found.token, found.logprob)]);
        // Written so that NaN is the worst of all.
        Some(all.map(error).fold(0.0, |worst, error| if error <= worst { worst } else { error }))
    }

    /// What roundings are relative to.
    fn scale(&self) -> f64 {
        let finite = self.logits.iter().filter(|logit| logit.is_finite());
        let largest = finite.fold(0.0, |largest: f32, logit| largest.max(logit.abs()));
        f64::from(largest / self.sampling.temperature).max(1.0)
    }

    /// Whether a filter may end elsewhere by a rounding: because the masses are close to what it asks for, or because one of
    /// its candidates is close to the last one that stays, without being its equal.
    fn is_on_edge(&self, row: &[f64]) -> bool {
        let kept = |row: &[f64]| row.iter().map(|logit| *logit > f64::NEG_INFINITY).collect::<Vec<bool>>();
        let Sampling { top_p, typical_p, min_p, .. } = self.sampling;
        let moved = |wider: f32| {
            let of = |mass: f32| if mass < 1.0 { mass * (1.0 + wider) } else { mass };
            let (top_p, typical_p, min_p) = (of(top_p), of(typical_p), (min_p * (1.0 - wider)).min(1.0));
            self.processed(&Sampling { top_p, typical_p, min_p, ..self.sampling() })
        };
        if [CLOSE, -CLOSE].iter().any(|wider| moved(*wider).map(|moved| kept(&moved)) != Some(kept(row))) {
            return true;
        }
        let likely = self.sampling();
        let typical = Sampling { min_p: 0.0, ..likely };
        let heads = Sampling { typical_p: 1.0, ..typical };
        let best = Sampling { top_p: 1.0, ..heads };
        let all = Sampling { top_k: 0, ..best };
        let [Some(all), Some(best), Some(heads), Some(typical)] =
            [all, best, heads, typical].map(|sampling| self.processed(&sampling))
        else {
            return true;
        };
        let logprobs = reference::logprobs(&heads);
        let possible = logprobs.iter().filter(|logprob| **logprob > f64::NEG_INFINITY);
        let entropy: f64 = possible.map(|logprob| -logprob * logprob.exp()).sum();
        let distances: Vec<f64> = logprobs.iter().map(|logprob| (-logprob - entropy).abs()).collect();
        let rounding = ROUNDING * self.scale();
        let worse = |row: &[f64]| row.iter().map(|logit| -logit).collect::<Vec<f64>>();
        ends_close(&worse(&all), &kept(&best), rounding)
            || ends_close(&worse(&best), &kept(&heads), rounding)
            || ends_close(&distances, &kept(&typical), rounding)
    }

    /// Whether the alternatives are the definition's, where only such that differ by no more than roundings have changed
    /// places.
    fn lists(&self, row: &[f64], found: &Sampled, rounding: f64) -> bool {
        let mut expected = reference::alternatives(row, self.alternatives as usize);
        expected.truncate(LISTED_MAX);
        let mut found: Vec<u32> = found.alternatives.iter().map(|(id, _)| *id).collect();
        let in_place = found.iter().zip(&expected).all(|(&found, &expected)| {
            let [found_logit, logit] = [found, expected].map(|id| row[id as usize]);
            found == expected || (found_logit != logit && (found_logit - logit).abs() <= rounding)
        });
        found.sort_unstable();
        expected.sort_unstable();
        in_place && found == expected
    }

    fn is_close_race(&self, row: &[f64], found: u32, expected: u32) -> bool {
        let speeds = reference::race(row, self.sampling.seed, self.sampling.index);
        let Some(&speed) = speeds.get(found as usize) else { return false };
        self.sampling.draws && speed > speeds[expected as usize] * (1.0 - f64::from(CLOSE))
    }
}

/// Whether a candidate is as close to the worst that stays, and neither its equal nor gone before.
fn ends_close(measured: &[f64], stays: &[bool], rounding: f64) -> bool {
    let staying = measured.iter().zip(stays).filter(|(_, stays)| **stays);
    let last = staying.fold(f64::NEG_INFINITY, |last, (measure, _)| last.max(*measure));
    stays.contains(&false) && measured.iter().any(|one| *one != last && (one - last).abs() <= rounding)
}

/// Makes all choices in one step, and compares them with the definition's.
pub(super) fn compare(c: &mut Checker, case: &str, trials: &[Trial]) -> Result<(), OpError> {
    let found = run(c, trials)?;
    let mut on_edge = 0;
    for (index, (trial, found)) in trials.iter().zip(&found).enumerate() {
        let error = trial.error(found.as_ref()).unwrap_or_else(|| {
            on_edge += 1;
            0.0
        });
        let case = format!("{case}, row {index} of {}", trial.logits.len());
        c.findings.push(Finding { case, error });
    }
    // With random numbers an edge is rare; many of them mean that the check checks nothing.
    let error = f64::from(on_edge) / (1.0 + 0.05 * trials.len() as f64);
    c.findings.push(Finding { case: format!("{case}, {on_edge} rows on an edge"), error });
    Ok(())
}

/// Each choice is the same alone, and anywhere among others.
pub(super) fn is_independent(c: &mut Checker, case: &str, trials: &[Trial]) -> Result<(), OpError> {
    let together = run(c, trials)?;
    for (index, trial) in trials.iter().enumerate() {
        let alone = run(c, std::slice::from_ref(trial))?;
        c.equal(format!("{case}, row {index} alone"), &alone, &together[index..=index]);
    }
    let turned: Vec<Trial> = trials.iter().rev().cloned().collect();
    let mut turned = run(c, &turned)?;
    turned.reverse();
    c.equal(format!("{case}, rows turned around"), &turned, &together);
    Ok(())
}

/// The choices of a step, whose rows lie among the logits from the last to the second.
pub(super) fn run(c: &mut Checker, trials: &[Trial]) -> Result<Vec<Option<Sampled>>, OpError> {
    let (gpu, vocabulary) = (c.gpu(), trials[0].logits.len());
    let mut state = SamplerState::new(&gpu, vocabulary, trials.len(), trials.len())?;
    let has_history = |trial: &Trial| !trial.prompt.is_empty();
    for (slot, trial) in (0..).zip(trials).filter(|(_, trial)| has_history(trial)) {
        match is_restored(slot) {
            true => state.restore(slot, trial.prompt.len(), trial.seen())?,
            false => state.admit(slot, &trial.prompt)?,
        }
    }
    generate(c, trials, &mut state)?;
    let mut logits = vec![f32::NAN; vocabulary];
    trials.iter().rev().for_each(|trial| logits.extend(&trial.logits));
    let rows: Vec<SamplingRow<'_>> = (0..)
        .zip(trials)
        .map(|(slot, trial)| SamplingRow {
            logits: trials.len() as u32 - slot,
            sampling: trial.sampling(),
            history: has_history(trial).then_some(slot),
            alternatives: trial.alternatives,
        })
        .collect();
    let mut logits = gpu.upload(&logits)?;
    state.set(&rows)?;
    state.sample(logits.all_mut())?;
    state.fetch()?;
    // What is set next changes nothing about it.
    state.set(&[])?;
    state.sample(logits.all_mut())?;
    state.set(&rows)?;
    let mut chosen = c.unwritten(crate::cuda::Element::U32, trials.len())?;
    chosen.copy_from(state.chosen())?;
    let found = state.results()?;
    let tokens: Vec<u32> = found.iter().map(|one| one.as_ref().map_or(u32::MAX, |one| one.token)).collect();
    c.equal("ids on the device", &chosen.read::<u32>()?, &tokens);
    Ok(found)
}

/// Every other history comes from the host.
fn is_restored(slot: u32) -> bool {
    slot % 2 == 1
}

/// Has the sampler itself choose what was generated before, so that it is in the histories.
fn generate(c: &mut Checker, trials: &[Trial], state: &mut SamplerState) -> Result<(), OpError> {
    let vocabulary = trials[0].logits.len();
    let steps = trials.iter().map(|trial| trial.generated.len()).max().unwrap_or_default();
    for step in 0..steps {
        let mut logits = Vec::new();
        let mut rows = Vec::new();
        let mut expected = Vec::new();
        for (slot, trial) in (0..).zip(trials) {
            let Some(&token) = trial.generated.get(step).filter(|_| !is_restored(slot)) else { continue };
            rows.push(SamplingRow {
                logits: rows.len() as u32,
                sampling: Sampling::GREEDY,
                history: Some(slot),
                alternatives: 0,
            });
            logits.extend((0..vocabulary as u32).map(|id| if id == token { 1.0 } else { 0.0 }));
            expected.push(token);
        }
        let mut logits = c.gpu().upload(&logits)?;
        state.set(&rows)?;
        state.sample(logits.all_mut())?;
        let found: Vec<u32> = state.results()?.into_iter().flatten().map(|one| one.token).collect();
        c.equal("tokens of a history", &found, &expected);
    }
    Ok(())
}
