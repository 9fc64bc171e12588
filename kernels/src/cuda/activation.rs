use crate::{Activation, Gating, OpError};

/// The number of an activation in `activation.cuh`.
pub(super) fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::QuickGelu => 3,
        Activation::Relu => 4,
    }
}

/// A gating as the kernels take it.
#[derive(Clone, Copy, Debug)]
pub(super) struct GatingParams {
    /// In `activation.cuh`.
    pub(super) number: u32,
    pub(super) limit: f32,
    pub(super) alpha: f32,
}

impl GatingParams {
    /// Errors when a limit is negative or not a number.
    pub(super) fn new(op: &'static str, gating: Gating) -> Result<Self, OpError> {
        match gating {
            Gating::Activation(activation) => {
                Ok(Self { number: activation_number(activation), limit: 0.0, alpha: 0.0 })
            }
            Gating::ClampedSwiglu { limit, alpha } => {
                check_limit(op, limit)?;
                Ok(Self { number: 5, limit, alpha })
            }
        }
    }
}

/// A limit must not be negative, and must be a number.
pub(super) fn check_limit(op: &'static str, limit: f32) -> Result<(), OpError> {
    if limit >= 0.0 { Ok(()) } else { Err(OpError::unsupported(op, format!("a limit of {limit}"))) }
}
