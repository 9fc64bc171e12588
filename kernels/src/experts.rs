use crate::Matrix;

/// A linear layer of an expert.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[outputs, inputs]`
    pub weight: Matrix<'a>,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
}

/// A gated MLP that some of the tokens go through: `down(gating(gate(x), up(x)))`.
#[derive(Clone, Copy, Debug)]
pub struct Expert<'a> {
    /// `[I, H]`
    pub gate: Projection<'a>,
    /// `[I, H]`
    pub up: Projection<'a>,
    /// `[H, I]`
    pub down: Projection<'a>,
}
