use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Eight lanes with fused multiply-add: x86-64 machines since 2013.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// The only way to get one. The answer is kept by the standard library, asking again costs a load.
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    pub(super) fn run(self, kernel: impl Kernel) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features(simd: Avx2, kernel: impl Kernel) {
            kernel.run(simd);
        }
        // SAFETY: `detect` found the features.
        unsafe { with_features(self, kernel) }
    }
}

impl Simd for Avx2 {
    type Register = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn zero_below(self, value: __m256, x: __m256, limit: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), value) }
    }

    #[inline(always)]
    fn exp2(self, n: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn sums(self, registers: [__m256; 4]) -> [f32; 4] {
        let [a, b, c, d] = registers;
        let mut sums = [0.0; 4];
        // SAFETY: `self` proves the features; `sums` has room for the four.
        unsafe {
            // Each 128-bit half of `quarters` holds the sum of that half of a, b, c and d.
            let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sum = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
            _mm_storeu_ps(sums.as_mut_ptr(), sum);
        }
        sums
    }

    #[inline(always)]
    unsafe fn load_f32(self, at: *const u8) -> __m256 {
        // SAFETY: `self` proves the features, the caller promises 32 bytes; the load takes any alignment.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m256 {
        // SAFETY: `self` proves the features, the caller promises 16 bytes; the load takes any alignment.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> __m256 {
        // SAFETY: `self` proves the features, the caller promises 16 bytes; the load takes any alignment.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store(self, value: __m256, at: *mut f32) {
        // SAFETY: `self` proves the features, the caller promises the room; the store takes any alignment.
        unsafe { _mm256_storeu_ps(at, value) }
    }
}
