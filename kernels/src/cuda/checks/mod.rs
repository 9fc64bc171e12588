//! What a device has to get right: every operation, in every type, at the sizes where mistakes show, against its definition
//! in f64 ([`reference`](crate::reference)).
//!
//! The tests run all of it on the emulator, in several orders of threads; `doctor --gpu` runs it on a GPU. Inputs are
//! random, by a seed, and rounded to the type before the definition sees them. Outputs are NaN before a kernel runs.
//!
//! One file per family, as the operations have. To add a check: a case in its family's file.

mod all_reduce;
mod attention;
mod embedding;
mod experts;
mod graph;
mod linear;
mod logprobs;
mod lora;
mod multiply;
mod norm;
mod pointwise;
mod probe;
mod ranks;
mod rope;
mod routing;
mod sampling;
mod transfer;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::{Buffer, E4M3, E5M2, Element, Gpu, HostElement};
use crate::OpError;

pub use ranks::{EMULATED_LENGTH_MAX, run_rank};

/// Runs the checks of a family.
pub type Family = fn(&mut Checker) -> Result<(), OpError>;

/// All families by name: what the others rest on, then those first that a Llama needs.
pub const FAMILIES: &[(&str, Family)] = &[
    ("probe", probe::check),
    ("probe_hopper", probe::check_hopper),
    ("norm", norm::check),
    ("embedding", embedding::check),
    ("pointwise", pointwise::check),
    ("rope", rope::check),
    ("multiply", multiply::check),
    ("linear", linear::check),
    ("gemm", linear::check_own),
    ("graph", graph::check),
    ("transfer", transfer::check),
    ("lora", lora::check),
    ("sampling", sampling::check),
    ("logprobs", logprobs::check),
    ("attention", attention::plain::check_plain),
    ("attention_decode", attention::decode::check_decode),
    ("attention_prefill", attention::prefill::check_prefill),
    ("route", routing::check),
    ("experts", experts::check),
    ("all_reduce", all_reduce::check),
];

/// The types that models compute in.
const FLOATS: [Element; 3] = [Element::F32, Element::F16, Element::BF16];

/// Collects what the checks of a family find.
#[derive(Debug)]
pub struct Checker {
    gpu: Arc<Gpu>,
    random: Random,
    findings: Vec<Finding>,
}

/// What came of one check.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// What was computed.
    pub case: String,
    /// How far it is from the definition, as a share of its bound; not finite where something is no number.
    pub error: f64,
}

impl Finding {
    /// Whether it is as close as it has to be.
    pub fn passes(&self) -> bool {
        self.error <= 1.0
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {:.3} of the error that is allowed", self.case, self.error)
    }
}

/// Runs the checks of one family. Errors when the device fails; a wrong result is a finding.
pub fn run(gpu: &Arc<Gpu>, family: Family, seed: u64) -> Result<Vec<Finding>, OpError> {
    let mut checker = Checker { gpu: gpu.clone(), random: Random::new(seed), findings: Vec::new() };
    family(&mut checker)?;
    gpu.synchronize()?;
    Ok(checker.findings)
}

/// Elements on the device, and what they are.
#[derive(Debug)]
struct Floats {
    buffer: Buffer,
    host: Vec<f32>,
}

impl Checker {
    fn gpu(&self) -> Arc<Gpu> {
        self.gpu.clone()
    }

    fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// Random numbers between -1 and 1, rounded to the type.
    fn floats(&mut self, element: Element, len: usize) -> Result<Floats, OpError> {
        let values = self.random.numbers(len);
        self.given(element, &values)
    }

    /// These numbers, rounded to the type.
    fn given(&self, element: Element, values: &[f32]) -> Result<Floats, OpError> {
        self.placed(element, 0, values, 0)
    }

    /// These numbers, rounded to the type, with so many unwritten elements before and behind.
    fn placed(
        &self,
        element: Element,
        before: usize,
        values: &[f32],
        behind: usize,
    ) -> Result<Floats, OpError> {
        let mut buffer = self.unwritten(element, before + values.len() + behind)?;
        let host = match element {
            Element::F32 => write::<f32>(&mut buffer, before, values, |value| value, |value| value),
            Element::F16 => write(&mut buffer, before, values, f16::from_f32, f16::to_f32),
            Element::BF16 => write(&mut buffer, before, values, bf16::from_f32, bf16::to_f32),
            Element::E4M3 => write(&mut buffer, before, values, E4M3::from_f32, E4M3::to_f32),
            Element::E5M2 => write(&mut buffer, before, values, E5M2::from_f32, E5M2::to_f32),
            Element::U32 | Element::U8 => Err(super::buffer::wrong_element("check", element)),
        }?;
        Ok(Floats { buffer, host })
    }

    /// A buffer whose every element is no number, or all ones.
    fn unwritten(&self, element: Element, len: usize) -> Result<Buffer, OpError> {
        let mut buffer = self.gpu.buffer(element, len)?;
        buffer.fill(0xff)?;
        Ok(buffer)
    }

    /// What a buffer of floats holds.
    fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, OpError> {
        match buffer.element() {
            Element::F32 => buffer.read::<f32>(),
            Element::F16 => Ok(buffer.read::<f16>()?.into_iter().map(f16::to_f32).collect()),
            Element::BF16 => Ok(buffer.read::<bf16>()?.into_iter().map(bf16::to_f32).collect()),
            Element::E4M3 => Ok(buffer.read::<E4M3>()?.into_iter().map(E4M3::to_f32).collect()),
            Element::E5M2 => Ok(buffer.read::<E5M2>()?.into_iter().map(E5M2::to_f32).collect()),
            element => Err(super::buffer::wrong_element("check", element)),
        }
    }

    /// Every element must be within `roundings` roundings of the buffer's type of the definition's, relative to the larger
    /// of that and the root mean square of all.
    fn close(
        &mut self,
        case: impl Into<String>,
        found: &Buffer,
        expected: &[f64],
        roundings: f64,
    ) -> Result<(), OpError> {
        self.close_within(case, found, 0..found.len(), expected, roundings)
    }

    /// The same of some of the elements; the others must still be unwritten.
    fn close_within(
        &mut self,
        case: impl Into<String>,
        found: &Buffer,
        range: Range<usize>,
        expected: &[f64],
        roundings: f64,
    ) -> Result<(), OpError> {
        let bound = roundings * rounding(found.element());
        let normal = normal(found.element());
        let found = self.read(found)?;
        let squares: f64 = expected.iter().map(|value| value * value).sum();
        let typical = (squares / expected.len().max(1) as f64).sqrt().max(normal);
        let around = found[..range.start].iter().chain(&found[range.end..]);
        let whole = range.len() == expected.len() && around.copied().all(f32::is_nan);
        let mut worst = if whole { 0.0 } else { f64::INFINITY };
        for (&found, &expected) in found[range].iter().zip(expected) {
            let error = (f64::from(found) - expected).abs() / expected.abs().max(typical) / bound;
            // NaN is the worst of all, and stays.
            if error.is_nan() || error > worst {
                worst = error;
            }
        }
        self.findings.push(Finding { case: case.into(), error: worst });
        Ok(())
    }

    /// Both must be the same.
    fn equal<T: PartialEq>(&mut self, case: impl Into<String>, found: &[T], expected: &[T]) {
        let error = if found == expected { 0.0 } else { f64::INFINITY };
        self.findings.push(Finding { case: case.into(), error });
    }
}

/// Writes numbers as elements; answers what they have become.
fn write<T: HostElement>(
    buffer: &mut Buffer,
    start: usize,
    values: &[f32],
    from: fn(f32) -> T,
    to: fn(T) -> f32,
) -> Result<Vec<f32>, OpError> {
    let rounded: Vec<T> = values.iter().map(|&value| from(value)).collect();
    buffer.write(start, &rounded)?;
    Ok(rounded.into_iter().map(to).collect())
}

/// The roundings of a result of this type that was computed in f32 with so many: one more.
fn computed(element: Element, roundings: f64) -> f64 {
    1.0 + roundings * rounding(Element::F32) / rounding(element)
}

/// The bits of every number: NaN is like itself.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest relative error of rounding to a type.
fn rounding(element: Element) -> f64 {
    match element {
        Element::F32 => 2f64.powi(-24),
        Element::F16 => 2f64.powi(-11),
        Element::BF16 => 2f64.powi(-8),
        Element::E4M3 => 2f64.powi(-4),
        Element::E5M2 => 2f64.powi(-3),
        Element::U32 | Element::U8 => 0.0,
    }
}

/// The smallest number that a type holds with all of its digits.
fn normal(element: Element) -> f64 {
    match element {
        Element::F32 | Element::BF16 => f64::from(f32::MIN_POSITIVE),
        Element::F16 | Element::E5M2 => 2f64.powi(-14),
        Element::E4M3 => 2f64.powi(-6),
        Element::U32 | Element::U8 => 1.0,
    }
}

/// Numbers that depend on the seed alone (xorshift, Marsaglia 2003).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.number()).collect()
    }

    /// The numbers from 0 to `len`, shuffled.
    fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len as u32).collect();
        for last in (1..len).rev() {
            items.swap(last, self.below(last + 1));
        }
        items
    }
}
