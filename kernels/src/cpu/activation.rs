use super::Cpu;
use super::simd::{Kernel, Row, Simd, exp, tanh};
use crate::error::check_length;
use crate::{Activation, Gating, OpError};

/// `x = activation(x)`.
pub fn activate(cpu: &Cpu, activation: Activation, x: &mut [f32]) -> Result<(), OpError> {
    let work = x.len() * WORK;
    let pieces: Vec<_> = x.chunks_mut(PIECE).collect();
    cpu.for_each(work, pieces, |x| cpu.isa().run(Activate { activation, x }));
    Ok(())
}

/// `gate = gating(gate, up)`: the activation of the gate, times the other half.
///
/// Errors when a limit is negative or not a number.
pub fn gated(cpu: &Cpu, gating: Gating, gate: &mut [f32], up: &[f32]) -> Result<(), OpError> {
    const OP: &str = "gated";
    check_length(OP, "up", gate.len(), up.len())?;
    if let Gating::ClampedSwiglu { limit, .. } = gating {
        check_limit(OP, limit)?;
    }
    cpu.for_each(gate.len() * WORK, pieces(gate, up), |(gate, up)| cpu.isa().run(Gated { gating, gate, up }));
    Ok(())
}

/// `x *= factor`.
pub fn scale(cpu: &Cpu, x: &mut [f32], factor: f32) -> Result<(), OpError> {
    let work = x.len() * WORK_OF_MEMORY;
    let pieces: Vec<_> = x.chunks_mut(PIECE).collect();
    cpu.for_each(work, pieces, |x| x.iter_mut().for_each(|x| *x *= factor));
    Ok(())
}

/// `x += delta`.
pub fn add(cpu: &Cpu, x: &mut [f32], delta: &[f32]) -> Result<(), OpError> {
    check_length("add", "delta", x.len(), delta.len())?;
    cpu.for_each(x.len() * WORK_OF_MEMORY, pieces(x, delta), |(x, delta)| sum_into(x, delta));
    Ok(())
}

/// `x`, but not beyond `-limit` and `limit`.
///
/// Errors when the limit is negative or not a number.
pub fn clamp(cpu: &Cpu, x: &mut [f32], limit: f32) -> Result<(), OpError> {
    check_limit("clamp", limit)?;
    let work = x.len() * WORK_OF_MEMORY;
    let pieces: Vec<_> = x.chunks_mut(PIECE).collect();
    cpu.for_each(work, pieces, |x| x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit)));
    Ok(())
}

/// `x = cap * tanh(x / cap)`: nearly `x` when small, never beyond `-cap` and `cap`.
///
/// Errors when the cap is not positive.
pub fn soft_cap(cpu: &Cpu, x: &mut [f32], cap: f32) -> Result<(), OpError> {
    if cap.is_nan() || cap <= 0.0 {
        return Err(OpError::unsupported("soft_cap", format!("a cap of {cap}")));
    }
    let work = x.len() * WORK;
    let pieces: Vec<_> = x.chunks_mut(PIECE).collect();
    cpu.for_each(work, pieces, |x| cpu.isa().run(SoftCap { cap, x }));
    Ok(())
}

/// Elements of a piece.
const PIECE: usize = 16 * 1024;
/// Per element, one exponential and one division, in multiply-adds.
const WORK: usize = 12;
/// Per element, three streams of memory, in multiply-adds.
const WORK_OF_MEMORY: usize = 4;

fn check_limit(op: &'static str, limit: f32) -> Result<(), OpError> {
    if limit >= 0.0 { Ok(()) } else { Err(OpError::unsupported(op, format!("a limit of {limit}"))) }
}

/// Cuts both into pieces of the same lengths.
fn pieces<'a>(x: &'a mut [f32], y: &'a [f32]) -> Vec<(&'a mut [f32], &'a [f32])> {
    x.chunks_mut(PIECE).zip(y.chunks(PIECE)).collect()
}

/// `x += delta`, of equal lengths.
pub(super) fn sum_into(x: &mut [f32], delta: &[f32]) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x += delta;
    }
}

struct Activate<'a> {
    activation: Activation,
    x: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.activation {
            Activation::Silu => map(simd, self.x, Silu),
            Activation::Gelu => map(simd, self.x, Gelu),
            Activation::GeluTanh => map(simd, self.x, GeluTanh),
            Activation::QuickGelu => map(simd, self.x, QuickGelu),
            Activation::Relu => map(simd, self.x, Relu),
        }
    }
}

struct SoftCap<'a> {
    cap: f32,
    x: &'a mut [f32],
}

impl Kernel for SoftCap<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        map(simd, self.x, Cap(self.cap));
    }
}

struct Gated<'a> {
    gating: Gating,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { gating, gate, up } = self;
        match gating {
            Gating::Activation(Activation::Silu) => join(simd, gate, up, Times(Silu)),
            Gating::Activation(Activation::Gelu) => join(simd, gate, up, Times(Gelu)),
            Gating::Activation(Activation::GeluTanh) => join(simd, gate, up, Times(GeluTanh)),
            Gating::Activation(Activation::QuickGelu) => join(simd, gate, up, Times(QuickGelu)),
            Gating::Activation(Activation::Relu) => join(simd, gate, up, Times(Relu)),
            Gating::ClampedSwiglu { limit, alpha } => join(simd, gate, up, Clamped { limit, alpha }),
        }
    }
}

/// `x = f(x)`
#[inline(always)]
fn map<S: Simd>(simd: S, x: &mut [f32], f: impl Function) {
    let whole = x.len() - x.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a whole register is left at `at`.
        let value = unsafe { (&*x).load(simd, at) };
        simd.write(f.of(simd, value), &mut x[at..]);
    }
    if whole < x.len() {
        let value = (&*x).load_tail(simd, whole);
        simd.write(f.of(simd, value), &mut x[whole..]);
    }
}

/// `gate = f(gate, up)`
#[inline(always)]
fn join<S: Simd>(simd: S, gate: &mut [f32], up: &[f32], f: impl Gate) {
    let whole = gate.len() - gate.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a whole register is left at `at`, of `up` as of `gate`.
        let (value, up) = unsafe { ((&*gate).load(simd, at), up.load(simd, at)) };
        simd.write(f.of(simd, value, up), &mut gate[at..]);
    }
    if whole < gate.len() {
        let (value, up) = ((&*gate).load_tail(simd, whole), up.load_tail(simd, whole));
        simd.write(f.of(simd, value, up), &mut gate[whole..]);
    }
}

/// A function of one number, in every lane. (A closure would not be compiled for the instruction set.)
trait Function: Copy {
    /// Must be `#[inline(always)]`.
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register;
}

/// A function of a gate and the other half, in every lane.
trait Gate: Copy {
    /// Must be `#[inline(always)]`.
    fn of<S: Simd>(self, simd: S, gate: S::Register, up: S::Register) -> S::Register;
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        times_sigmoid(simd, x, x)
    }
}

#[derive(Clone, Copy)]
struct QuickGelu;

impl Function for QuickGelu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        times_sigmoid(simd, x, simd.mul(x, simd.splat(1.702)))
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        // (1 + tanh(y)) / 2 is the sigmoid of 2 y, here 2 sqrt(2 / pi) (x + 0.044715 x^3).
        let (linear, cubic) = (simd.splat(1.595_769_2), simd.splat(0.071_354_814));
        let slope = simd.mul_add(simd.mul(x, x), cubic, linear);
        times_sigmoid(simd, x, simd.mul(x, slope))
    }
}

/// `x * sigmoid(y)`
#[inline(always)]
fn times_sigmoid<S: Simd>(simd: S, x: S::Register, y: S::Register) -> S::Register {
    let decay = exp(simd, simd.sub(simd.zero(), y));
    simd.div(x, simd.add(simd.splat(1.0), decay))
}

#[derive(Clone, Copy)]
struct Gelu;

/// In `t = 1 / (1 + 0.35 a)`, from the power 1 upwards: the weight of the normal distribution beyond `a`, multiplied by
/// `e^(a^2 / 2)`. The coefficients are those of the Chebyshev interpolation of the quotient by `t` for `a` from 0 to 14,
/// where what is left of the weight is below f32's normal numbers; they are within 4e-8 of its value.
const BEYOND: [f32; 9] = [
    0.139_618_71,
    0.139_912_29,
    0.119_444_914,
    0.107_114_59,
    -0.027_046_608,
    0.165_051,
    -0.260_961_23,
    0.146_545_83,
    -0.029_679_522,
];

impl Function for Gelu {
    /// `x` times the weight of the normal distribution up to `x`: `max(x, 0) - |x| * (the weight beyond |x|)`. So the
    /// weight is never taken from 1, and small results keep their digits.
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        let one = simd.splat(1.0);
        let distance = simd.max(simd.sub(simd.zero(), x), x);
        let t = simd.div(one, simd.mul_add(distance, simd.splat(0.35), one));
        let mut beyond = simd.splat(BEYOND[8]);
        for coefficient in BEYOND[..8].iter().rev() {
            beyond = simd.mul_add(beyond, t, simd.splat(*coefficient));
        }
        let square = simd.mul(x, simd.mul(x, simd.splat(-0.5)));
        let lost = simd.mul(simd.mul(simd.mul(beyond, t), exp(simd, square)), distance);
        simd.sub(simd.max(simd.zero(), x), lost)
    }
}

#[derive(Clone, Copy)]
struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        // In this order NaN passes.
        simd.max(simd.zero(), x)
    }
}

#[derive(Clone, Copy)]
struct Cap(f32);

impl Function for Cap {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::Register) -> S::Register {
        let cap = simd.splat(self.0);
        simd.mul(cap, tanh(simd, simd.div(x, cap)))
    }
}

#[derive(Clone, Copy)]
struct Times<F>(F);

impl<F: Function> Gate for Times<F> {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, gate: S::Register, up: S::Register) -> S::Register {
        simd.mul(self.0.of(simd, gate), up)
    }
}

#[derive(Clone, Copy)]
struct Clamped {
    limit: f32,
    alpha: f32,
}

impl Gate for Clamped {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, gate: S::Register, up: S::Register) -> S::Register {
        // In this order the limits let NaN pass.
        let gate = simd.min(simd.splat(self.limit), gate);
        let up = simd.min(simd.splat(self.limit), simd.max(simd.splat(-self.limit), up));
        let open = times_sigmoid(simd, gate, simd.mul(gate, simd.splat(self.alpha)));
        simd.mul(open, simd.add(up, simd.splat(1.0)))
    }
}
