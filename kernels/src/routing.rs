use crate::OpError;
use crate::error::{check_length, check_rows};

/// What a router makes of its logits, and where the weights of the chosen experts come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Each expert's own sigmoid.
    Sigmoid,
    /// The logits choose; the weights are a softmax over the chosen.
    SoftmaxOfChosen,
    /// The logits choose, one expert after the other. The weight of one with logit `m` is a softmax over those that are
    /// left and have a logit `s` with `(m - s) / max(|s|, m) <= 2 * jitter`.
    SparseMixer {
        /// The noise that the router was trained with.
        jitter: f32,
    },
}

/// How good a group of experts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScore {
    /// As good as its best expert.
    Best,
    /// The sum of its two best.
    TwoBest,
}

/// Experts in groups of equal size, neighbours together; only those of the best groups can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Number of groups that stay.
    pub chosen: usize,
    /// What decides.
    pub score: GroupScore,
}

/// What the weights of a token's experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalize {
    /// Nothing.
    No,
    /// `eps` and their sum.
    Sum {
        /// Keeps the sum from zero.
        eps: f32,
    },
    /// Their p-norm.
    Norm {
        /// Positive and finite.
        p: f32,
    },
}

/// How a router chooses among experts.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Number of experts, `E`.
    pub experts: usize,
    /// Experts per token, `k`.
    pub chosen: usize,
    /// From logits to scores.
    pub score: Score,
    /// Groups of experts, if the choice is limited to some.
    pub groups: Option<Groups>,
    /// `[E]`, added to the scores to choose, not to weight.
    pub correction: Option<&'a [f32]>,
    /// Normalization of the weights of the chosen.
    pub normalize: Normalize,
    /// Multiplies the weights at last.
    pub scale: f32,
}

/// Which experts each token goes to, and with what weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// `[T, k]`, best first
    pub experts: Vec<u32>,
    /// `[T, k]`
    pub weights: Vec<f32>,
}

impl Routing<'_> {
    /// Answers the number of tokens that have `logits` logits together.
    pub(crate) fn check(&self, op: &'static str, logits: usize) -> Result<usize, OpError> {
        let Self { experts, chosen, .. } = *self;
        if chosen == 0 || chosen > experts {
            return Err(OpError::unsupported(op, format!("{chosen} of {experts} experts per token")));
        }
        if let Some(Groups { count, chosen: kept, score }) = self.groups {
            if count == 0 || !experts.is_multiple_of(count) || kept > count {
                let reason = format!("{kept} of {count} groups of {experts} experts");
                return Err(OpError::unsupported(op, reason));
            }
            let size = experts / count;
            if chosen > kept * size {
                let reason = format!("{chosen} experts per token from {kept} groups of {size}");
                return Err(OpError::unsupported(op, reason));
            }
            if score == GroupScore::TwoBest && size < 2 {
                return Err(OpError::unsupported(op, "the two best of groups of one expert"));
            }
        }
        if let Normalize::Norm { p } = self.normalize
            && !(p > 0.0 && p.is_finite())
        {
            return Err(OpError::unsupported(op, format!("weights divided by their {p}-norm")));
        }
        check_length(op, "correction", experts, self.correction.map_or(experts, <[f32]>::len))?;
        check_rows(op, "logits", experts, logits)
    }
}
