use std::marker::PhantomData;

use super::{LANES_MAX, Simd};

/// A row of numbers that registers are filled from.
pub(in crate::cpu) trait Row: Copy {
    fn len(self) -> usize;

    /// Elements `at .. at + LANES`.
    ///
    /// # Safety
    /// They are all there.
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::Register;

    /// Elements from `at` to the end, fewer than `LANES`, and then zeros.
    fn load_tail<S: Simd>(self, simd: S, at: usize) -> S::Register;

    /// Elements from `at`, `LANES` or those that are left, and then zeros.
    #[inline(always)]
    fn register<S: Simd>(self, simd: S, at: usize) -> S::Register {
        if at + S::LANES <= self.len() {
            // SAFETY: they are all there.
            unsafe { self.load(simd, at) }
        } else {
            self.load_tail(simd, at)
        }
    }
}

impl Row for &[f32] {
    #[inline(always)]
    fn len(self) -> usize {
        self.len()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::Register {
        debug_assert!(at + S::LANES <= self.len());
        // SAFETY: the caller promises that the elements are there.
        unsafe { simd.load_f32(self.as_ptr().add(at).cast()) }
    }

    #[inline(always)]
    fn load_tail<S: Simd>(self, simd: S, at: usize) -> S::Register {
        let tail = &self[at..];
        let mut padded = [0.0f32; LANES_MAX];
        padded[..tail.len()].copy_from_slice(tail);
        // SAFETY: `padded` fills the widest register.
        unsafe { simd.load_f32(padded.as_ptr().cast()) }
    }
}

/// How an element is stored in a checkpoint.
pub(in crate::cpu) trait Element: Copy {
    /// Bytes per element.
    const SIZE: usize;

    /// # Safety
    /// `LANES` elements lie at `at`, at any alignment.
    unsafe fn load<S: Simd>(simd: S, at: *const u8) -> S::Register;
}

#[derive(Clone, Copy)]
pub(in crate::cpu) struct F32;
#[derive(Clone, Copy)]
pub(in crate::cpu) struct F16;
#[derive(Clone, Copy)]
pub(in crate::cpu) struct BF16;

impl Element for F32 {
    const SIZE: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, at: *const u8) -> S::Register {
        // SAFETY: the same promise.
        unsafe { simd.load_f32(at) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, at: *const u8) -> S::Register {
        // SAFETY: the same promise.
        unsafe { simd.load_f16(at) }
    }
}

impl Element for BF16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, at: *const u8) -> S::Register {
        // SAFETY: the same promise.
        unsafe { simd.load_bf16(at) }
    }
}

/// A row as it lies in a checkpoint.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Stored<'a, E> {
    bytes: &'a [u8],
    element: PhantomData<E>,
}

impl<'a, E: Element> Stored<'a, E> {
    #[inline(always)]
    pub(in crate::cpu) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, element: PhantomData }
    }
}

impl<E: Element> Row for Stored<'_, E> {
    #[inline(always)]
    fn len(self) -> usize {
        self.bytes.len() / E::SIZE
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::Register {
        debug_assert!(at + S::LANES <= self.len());
        // SAFETY: the caller promises that the elements are there.
        unsafe { E::load(simd, self.bytes.as_ptr().add(at * E::SIZE)) }
    }

    #[inline(always)]
    fn load_tail<S: Simd>(self, simd: S, at: usize) -> S::Register {
        let tail = &self.bytes[at * E::SIZE..];
        let mut padded = [0u8; LANES_MAX * size_of::<f32>()];
        padded[..tail.len()].copy_from_slice(tail);
        // SAFETY: `padded` fills the widest register with the widest elements.
        unsafe { E::load(simd, padded.as_ptr()) }
    }
}

/// Converts a row to f32 and writes it to `out`, or adds it. `out` is as long as the row.
#[inline(always)]
pub(in crate::cpu) fn widen<S: Simd, const ADD: bool>(simd: S, row: impl Row, out: &mut [f32]) {
    assert_eq!(row.len(), out.len());
    let whole = row.len() - row.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: a whole register is left at `at`, of `out` as of the row.
        let (wide, old) = unsafe { (row.load(simd, at), (&*out).load(simd, at)) };
        simd.write(if ADD { simd.add(old, wide) } else { wide }, &mut out[at..]);
    }
    if whole < row.len() {
        let (wide, old) = (row.load_tail(simd, whole), (&*out).load_tail(simd, whole));
        simd.write(if ADD { simd.add(old, wide) } else { wide }, &mut out[whole..]);
    }
}
