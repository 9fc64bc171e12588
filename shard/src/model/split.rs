//! Whether a model can be split over a number of ranks, and if not, why, and over how many it can.

use thiserror::Error;

use super::spec::{AttentionKind, DecoderSpec, MlpKind};

/// Ranks that are tried when a number that works is looked for.
const WORLD_MAX: usize = 64;

/// A model cannot be split over that many ranks.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{count} {what} cannot be split over {world} shards; --num-shard can be {possible}")]
pub struct SplitError {
    /// What cannot be split.
    what: &'static str,
    /// How many of them there are.
    count: usize,
    /// Over how many ranks it should be.
    world: usize,
    /// Over how many it could.
    possible: String,
}

/// Something of which every rank must have as many.
#[derive(Clone, Copy)]
struct Rule {
    what: &'static str,
    count: usize,
}

/// Errors when some part of the model does not divide over `world` ranks.
pub(super) fn check(spec: &DecoderSpec, world: usize) -> Result<(), SplitError> {
    let rules = rules(spec);
    let Some(&Rule { what, count }) = rules.iter().find(|rule| !rule.count.is_multiple_of(world)) else {
        return Ok(());
    };
    let works = |world: &usize| rules.iter().all(|rule| rule.count.is_multiple_of(*world));
    let possible: Vec<String> = (1..=WORLD_MAX).filter(works).map(|world| world.to_string()).collect();
    Err(SplitError { what, count, world, possible: possible.join(", ") })
}

/// Key/value heads may be fewer than ranks, or not divide by them: ranks then share some.
fn rules(spec: &DecoderSpec) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut rule = |what, count| rules.push(Rule { what, count });
    for layer in &spec.layers {
        match &layer.attention {
            AttentionKind::Heads(spec) => rule("attention heads", spec.heads.heads),
            AttentionKind::Latent(spec) => rule("attention heads", spec.heads),
        }
        match &layer.mlp {
            MlpKind::Dense(spec) => rule("elements inside the MLP", spec.intermediate),
            MlpKind::Experts(spec) => {
                rule("elements inside an expert", spec.intermediate);
                if let Some(shared) = &spec.shared {
                    rule("elements inside the shared expert", shared.mlp.intermediate);
                }
            }
        }
    }
    rules
}
