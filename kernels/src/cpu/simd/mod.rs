//! Vector registers of f32, chosen at run time.
//!
//! A kernel is written once, over any [`Simd`], and compiled once per instruction set: [`Isa::run`] enters it inside a
//! function that has the features switched on. For that to work, everything between there and the intrinsics must be
//! `#[inline(always)]`; what is not gets compiled without the features, and calls each intrinsic as a function.

use super::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod plain;
mod row;
mod tanh;

pub(super) use exp::{exp, exp_m1};
pub(super) use row::{BF16, Element, F16, F32, Row, Stored, widen};
pub(super) use tanh::tanh;

/// Lanes of the widest register; the space a last, incomplete register is padded in.
const LANES_MAX: usize = 16;

/// An instruction set. Its values are proofs that the machine has it, so the operations are safe to call.
pub(super) trait Simd: Copy {
    /// A register of [`Self::LANES`] numbers.
    type Register: Copy;
    /// A power of two, at most [`LANES_MAX`].
    const LANES: usize;

    /// The same number in every lane.
    fn splat(self, value: f32) -> Self::Register;
    fn add(self, a: Self::Register, b: Self::Register) -> Self::Register;
    fn sub(self, a: Self::Register, b: Self::Register) -> Self::Register;
    fn mul(self, a: Self::Register, b: Self::Register) -> Self::Register;
    fn div(self, a: Self::Register, b: Self::Register) -> Self::Register;
    /// `a * b + c`, rounded once where the machine can.
    fn mul_add(self, a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register;
    /// The larger of each lane; `b` where they cannot be compared.
    fn max(self, a: Self::Register, b: Self::Register) -> Self::Register;
    /// The smaller of each lane; `b` where they cannot be compared.
    fn min(self, a: Self::Register, b: Self::Register) -> Self::Register;
    /// `value`, or zero in lanes where `x < limit`.
    fn zero_below(self, value: Self::Register, x: Self::Register, limit: Self::Register) -> Self::Register;
    /// `2^n` of whole numbers from -126 to 128, the last of which is infinity.
    fn exp2(self, n: Self::Register) -> Self::Register;

    /// The sum of four registers' lanes, each in this order: neighbours first, `((0+1)+(2+3)) + ((4+5)+(6+7))`.
    fn sums(self, registers: [Self::Register; 4]) -> [f32; 4];

    /// # Safety
    /// `LANES` numbers lie at `at`, at any alignment.
    unsafe fn load_f32(self, at: *const u8) -> Self::Register;
    /// # Safety
    /// `LANES` half-precision numbers lie at `at`, at any alignment.
    unsafe fn load_f16(self, at: *const u8) -> Self::Register;
    /// # Safety
    /// `LANES` bfloat16 numbers lie at `at`, at any alignment.
    unsafe fn load_bf16(self, at: *const u8) -> Self::Register;
    /// # Safety
    /// `LANES` numbers may be written at `at`.
    unsafe fn store(self, value: Self::Register, at: *mut f32);

    #[inline(always)]
    fn zero(self) -> Self::Register {
        self.splat(0.0)
    }

    #[inline(always)]
    fn sum(self, register: Self::Register) -> f32 {
        self.sums([register, self.zero(), self.zero(), self.zero()])[0]
    }

    /// The lanes in order; those beyond the register are zero.
    #[inline(always)]
    fn lanes(self, register: Self::Register) -> [f32; LANES_MAX] {
        let mut lanes = [0.0; LANES_MAX];
        // SAFETY: `lanes` has room for the widest register.
        unsafe { self.store(register, lanes.as_mut_ptr()) };
        lanes
    }

    /// Writes the first `out.len()` lanes, or all when `out` is longer.
    #[inline(always)]
    fn write(self, register: Self::Register, out: &mut [f32]) {
        if out.len() >= Self::LANES {
            // SAFETY: `out` is long enough.
            unsafe { self.store(register, out.as_mut_ptr()) }
        } else {
            out.copy_from_slice(&self.lanes(register)[..out.len()]);
        }
    }
}

/// A piece of work that is written over any instruction set.
pub(super) trait Kernel {
    /// Must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S);
}

impl Isa {
    /// Whether this machine has it.
    pub(super) fn is_supported(self) -> bool {
        match self {
            Isa::Plain => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::detect().is_some(),
        }
    }

    /// Runs the kernel's version for this instruction set. The machine must have it.
    pub(super) fn run(self, kernel: impl Kernel) {
        #[cfg(target_arch = "x86_64")]
        const CHECKED: &str = "a Cpu is only made with what the machine has";
        match self {
            Isa::Plain => kernel.run(plain::Plain),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::detect().expect(CHECKED).run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::detect().expect(CHECKED).run(kernel),
        }
    }
}
