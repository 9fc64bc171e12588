use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Sixteen lanes: servers since 2017, Zen 4 and later.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The only way to get one. The answer is kept by the standard library, asking again costs a load.
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx2");
        found.then_some(Self(()))
    }

    pub(super) fn run(self, kernel: impl Kernel) {
        #[target_feature(enable = "avx512f,avx2")]
        fn with_features(simd: Avx512, kernel: impl Kernel) {
            kernel.run(simd);
        }
        // SAFETY: `detect` found the features.
        unsafe { with_features(self, kernel) }
    }
}

impl Simd for Avx512 {
    type Register = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn zero_below(self, value: __m512, x: __m512, limit: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit), _mm512_setzero_ps()) }
    }

    #[inline(always)]
    fn exp2(self, n: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn sums(self, registers: [__m512; 4]) -> [f32; 4] {
        let [a, b, c, d] = registers;
        let mut sums = [0.0; 4];
        // SAFETY: `self` proves the features; `sums` has room for the four.
        unsafe {
            let low = half_sums(
                _mm512_castps512_ps256(a),
                _mm512_castps512_ps256(b),
                _mm512_castps512_ps256(c),
                _mm512_castps512_ps256(d),
            );
            let high = half_sums(upper(a), upper(b), upper(c), upper(d));
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(low, high));
        }
        sums
    }

    #[inline(always)]
    unsafe fn load_f32(self, at: *const u8) -> __m512 {
        // SAFETY: `self` proves the features, the caller promises 64 bytes; the load takes any alignment.
        unsafe { _mm512_loadu_ps(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m512 {
        // SAFETY: `self` proves the features, the caller promises 32 bytes; the load takes any alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> __m512 {
        // SAFETY: `self` proves the features, the caller promises 32 bytes; the load takes any alignment.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store(self, value: __m512, at: *mut f32) {
        // SAFETY: `self` proves the features, the caller promises the room; the store takes any alignment.
        unsafe { _mm512_storeu_ps(at, value) }
    }
}

/// The upper eight lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn upper(register: __m512) -> __m256 {
    _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(register)))
}

/// The sums of eight lanes each, neighbours first.
#[inline]
#[target_feature(enable = "avx")]
fn half_sums(a: __m256, b: __m256, c: __m256, d: __m256) -> __m128 {
    let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters))
}
