//! What a device has to get right: every operation, in every type, at the sizes where mistakes show, against its definition
//! in f64 ([`reference`](crate::reference)).
//!
//! The tests run all of it on the emulator, in several orders of threads; `doctor --gpu` runs it on a GPU. Inputs are
//! random, by a seed, and rounded to the type before the definition sees them. Outputs are NaN before a kernel runs.
//!
//! One file per family, as the operations have. To add a check: a case in its family's file.

mod graph;
mod multiply;
mod norm;
mod transfer;

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};

use super::{Buffer, Element, Gpu, HostElement};
use crate::OpError;

/// Runs the checks of a family.
pub type Family = fn(&mut Checker) -> Result<(), OpError>;

/// All families by name, those first that a Llama needs.
pub const FAMILIES: &[(&str, Family)] = &[
    ("norm", norm::check),
    ("multiply", multiply::check),
    ("graph", graph::check),
    ("transfer", transfer::check),
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
        fn upload<T: HostElement>(
            gpu: &Arc<Gpu>,
            values: &[f32],
            from: fn(f32) -> T,
            to: fn(T) -> f32,
        ) -> Result<Floats, OpError> {
            let rounded: Vec<T> = values.iter().map(|&value| from(value)).collect();
            Ok(Floats { buffer: gpu.upload(&rounded)?, host: rounded.into_iter().map(to).collect() })
        }
        match element {
            Element::F32 => upload::<f32>(&self.gpu, values, |value| value, |value| value),
            Element::F16 => upload(&self.gpu, values, f16::from_f32, f16::to_f32),
            Element::BF16 => upload(&self.gpu, values, bf16::from_f32, bf16::to_f32),
            Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
                Err(super::buffer::wrong_element("check", element))
            }
        }
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
        let bound = roundings * rounding(found.element());
        let found = self.read(found)?;
        let squares: f64 = expected.iter().map(|value| value * value).sum();
        let typical = (squares / expected.len().max(1) as f64).sqrt().max(f64::MIN_POSITIVE);
        let mut worst = if found.len() == expected.len() { 0.0 } else { f64::INFINITY };
        for (&found, &expected) in found.iter().zip(expected) {
            let error = (f64::from(found) - expected).abs() / expected.abs().max(typical) / bound;
            // Written so that NaN is the worst of all.
            if !(error <= worst) {
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
