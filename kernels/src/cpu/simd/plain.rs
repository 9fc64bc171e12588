use super::Simd;

/// Four lanes in portable code: the register of SSE2 and NEON, which the compiler makes of it.
#[derive(Clone, Copy)]
pub(super) struct Plain;

const LANES: usize = 4;

/// Machines whose smallest instruction set has a fused multiply-add use it; elsewhere it would be a library call.
const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

#[inline(always)]
fn map(a: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

impl Simd for Plain {
    type Register = [f32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Register {
        [value; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register {
        if FUSED {
            [
                a[0].mul_add(b[0], c[0]),
                a[1].mul_add(b[1], c[1]),
                a[2].mul_add(b[2], c[2]),
                a[3].mul_add(b[3], c[3]),
            ]
        } else {
            self.add(self.mul(a, b), c)
        }
    }

    #[inline(always)]
    fn max(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::Register, b: Self::Register) -> Self::Register {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn zero_below(self, value: Self::Register, x: Self::Register, limit: Self::Register) -> Self::Register {
        let below = zip(x, limit, |x, limit| if x < limit { 1.0 } else { 0.0 });
        zip(value, below, |value, below| if below == 1.0 { 0.0 } else { value })
    }

    #[inline(always)]
    fn exp2(self, n: Self::Register) -> Self::Register {
        map(n, |n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn sums(self, registers: [Self::Register; 4]) -> [f32; 4] {
        let [a, b, c, d] = registers;
        let sum = |r: Self::Register| (r[0] + r[1]) + (r[2] + r[3]);
        [sum(a), sum(b), sum(c), sum(d)]
    }

    #[inline(always)]
    unsafe fn load_f32(self, at: *const u8) -> Self::Register {
        // SAFETY: as promised by the caller; arrays of bytes have no alignment.
        let stored = unsafe { at.cast::<[[u8; 4]; LANES]>().read() };
        stored.map(f32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> Self::Register {
        // SAFETY: as promised by the caller.
        let stored = unsafe { load_u16(at) };
        [widen_f16(stored[0]), widen_f16(stored[1]), widen_f16(stored[2]), widen_f16(stored[3])]
    }

    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> Self::Register {
        let widen = |stored: u16| f32::from_bits(u32::from(stored) << 16);
        // SAFETY: as promised by the caller.
        let stored = unsafe { load_u16(at) };
        [widen(stored[0]), widen(stored[1]), widen(stored[2]), widen(stored[3])]
    }

    #[inline(always)]
    unsafe fn store(self, value: Self::Register, at: *mut f32) {
        // SAFETY: as promised by the caller; an array of f32 is aligned like one.
        unsafe { at.cast::<[f32; LANES]>().write(value) }
    }
}

/// Reads one by one, which the compiler joins; it does not take one read of all apart into lanes.
///
/// # Safety
/// Four numbers of two bytes lie at `at`.
#[inline(always)]
unsafe fn load_u16(at: *const u8) -> [u16; LANES] {
    let at = at.cast::<u16>();
    // SAFETY: as promised by the caller.
    unsafe {
        [
            at.read_unaligned(),
            at.add(1).read_unaligned(),
            at.add(2).read_unaligned(),
            at.add(3).read_unaligned(),
        ]
    }
}

/// Without branches, so that four at a time become vector code.
///
/// The exponent of a half is biased by 15, that of a single by 127: moved into place, the number is too small by a
/// factor of 2^112. The multiplication also normalizes subnormals.
#[inline(always)]
fn widen_f16(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff);
    let sign = u32::from(half & 0x8000) << 16;
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = (magnitude << 13) | 0x7f80_0000;
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { finite })
}
