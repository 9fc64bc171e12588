/// The function between the layers of an MLP, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`, also called swish.
    Silu,
    /// `x * (1 + erf(x / sqrt(2))) / 2`
    Gelu,
    /// Gelu with `tanh(sqrt(2 / pi) * (x + 0.044715 x^3))` in the place of erf.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
    /// `max(x, 0)`
    Relu,
}

/// How the gate of a gated MLP acts on the other half, element by element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gating {
    /// `activation(gate) * up`
    Activation(Activation),
    /// `g * sigmoid(alpha * g) * (u + 1)`, where `g` is the gate, at most `limit`, and `u` is `up`, from `-limit` to
    /// `limit`. The experts of gpt-oss, with limit 7 and alpha 1.702.
    ClampedSwiglu {
        /// Not negative.
        limit: f32,
        /// Steepness of the gate.
        alpha: f32,
    },
}
