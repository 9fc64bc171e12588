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

/// Something that every rank must have an equal part of.
#[derive(Clone, Copy)]
enum Rule {
    /// Each rank has as many.
    Even(&'static str, usize),
    /// Each rank has as many, or several ranks share one.
    Shared(&'static str, usize),
}

impl Rule {
    fn allows(self, world: usize) -> bool {
        match self {
            Self::Even(_, count) => count.is_multiple_of(world),
            Self::Shared(_, count) => count.is_multiple_of(world) || world.is_multiple_of(count),
        }
    }
}

/// Errors when some part of the model does not divide over `world` ranks.
pub(super) fn check(spec: &DecoderSpec, world: usize) -> Result<(), SplitError> {
    let rules = rules(spec);
    let Some(rule) = rules.iter().find(|rule| !rule.allows(world)) else {
        return Ok(());
    };
    let (Rule::Even(what, count) | Rule::Shared(what, count)) = *rule;
    let works = |world: &usize| rules.iter().all(|rule| rule.allows(*world));
    let possible: Vec<String> = (1..=WORLD_MAX).filter(works).map(|world| world.to_string()).collect();
    Err(SplitError { what, count, world, possible: possible.join(", ") })
}

fn rules(spec: &DecoderSpec) -> Vec<Rule> {
    let mut rules = Vec::new();
    for layer in &spec.layers {
        match &layer.attention {
            AttentionKind::Heads(spec) => {
                rules.push(Rule::Even("attention heads", spec.heads.heads));
                rules.push(Rule::Shared("key/value heads", spec.heads.kv_heads));
            }
            AttentionKind::Latent(spec) => rules.push(Rule::Even("attention heads", spec.heads)),
        }
        match &layer.mlp {
            MlpKind::Dense(spec) => rules.push(Rule::Even("elements inside the MLP", spec.intermediate)),
            MlpKind::Experts(spec) => {
                rules.push(Rule::Even("elements inside an expert", spec.intermediate));
                if let Some(shared) = &spec.shared {
                    rules.push(Rule::Even("elements inside the shared expert", shared.mlp.intermediate));
                }
            }
        }
    }
    rules
}
