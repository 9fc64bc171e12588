use crate::OpError;
use crate::error::{check_length, check_rows};

/// What a norm takes out of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// The root mean square.
    Rms,
    /// The mean, and then the standard deviation.
    Layer,
}

/// How rows of `width` elements are normalized.
///
/// Weight and bias are `[period, width]`: row `i` takes their row `i % period`. One row serves all tokens; one per head
/// normalizes the heads of `[T, heads, head_dim]`, each with its own.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// What is taken out.
    pub kind: NormKind,
    /// Elements of a row.
    pub width: usize,
    /// Multiplies the result; absent means all ones.
    pub weight: Option<&'a [f32]>,
    /// Added to the result; as long as the weight where there are both.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean square, or to the variance, so that a row of zeros can be divided.
    pub eps: f32,
}

impl<'a> Norm<'a> {
    /// The argument `what` of `op` has `found` elements and is to be normalized.
    pub(crate) fn check(&self, op: &'static str, what: &'static str, found: usize) -> Result<(), OpError> {
        check_rows(op, what, self.width, found)?;
        for (what, values) in [("weight", self.weight), ("bias", self.bias)] {
            let Some(values) = values else { continue };
            check_rows(op, what, self.width, values.len())?;
            // Whole rows, but not none: there would be nothing to repeat.
            check_length(op, what, values.len().max(self.width), values.len())?;
        }
        match (self.weight, self.bias) {
            (Some(weight), Some(bias)) => check_length(op, "bias", weight.len(), bias.len()),
            _ => Ok(()),
        }
    }

    /// What the weight holds for row `row`.
    pub(crate) fn weight_of(&self, row: usize) -> Option<&'a [f32]> {
        self.weight.map(|weight| self.repeated(weight, row))
    }

    /// What the bias holds for row `row`.
    pub(crate) fn bias_of(&self, row: usize) -> Option<&'a [f32]> {
        self.bias.map(|bias| self.repeated(bias, row))
    }

    fn repeated(&self, values: &'a [f32], row: usize) -> &'a [f32] {
        let period = values.len() / self.width;
        &values[row % period * self.width..][..self.width]
    }
}
