use std::f32::consts::LOG2_E;

use super::Simd;

/// Below, the result would be subnormal: it is zero. This is ln(2^-126).
const SMALLEST: f32 = -87.336_54;
/// Above, the result is infinity: here the power of two nearest to it is 2^128.
const LARGEST: f32 = 88.5;

/// Adding and subtracting it rounds numbers below 2^22 to whole ones: it leaves no bits for the fraction.
const ROUND: f32 = 12_582_912.0;

/// ln(2) in two parts; the first has few enough bits that its product with a whole number below 2^15 is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x` in every lane, within 4e-7 of the exact value's magnitude.
///
/// Below -87.33 it is 0, above 88.38 infinity; NaN stays NaN.
#[inline(always)]
pub(in crate::cpu) fn exp<S: Simd>(simd: S, x: S::Register) -> S::Register {
    let Reduced { n, r, slope } = reduce(simd, x);
    let power = simd.mul_add(slope, r, simd.splat(1.0));
    simd.zero_below(simd.mul(power, simd.exp2(n)), x, simd.splat(SMALLEST))
}

/// `e^x - 1` in every lane, within 5e-7 of the exact value's magnitude, near zero too.
///
/// Below -87.33 it is -1, above 88 it is not to be used; NaN stays NaN.
#[inline(always)]
pub(in crate::cpu) fn exp_m1<S: Simd>(simd: S, x: S::Register) -> S::Register {
    let Reduced { n, r, slope } = reduce(simd, x);
    let scale = simd.exp2(n);
    simd.mul_add(simd.mul(slope, r), scale, simd.sub(scale, simd.splat(1.0)))
}

/// `e^x = 2^n (1 + slope * r)`
struct Reduced<R> {
    n: R,
    r: R,
    slope: R,
}

/// `x = n ln(2) + r` with `|r| <= ln(2) / 2`, where seven terms of the Taylor series leave an error of 5e-9.
#[inline(always)]
fn reduce<S: Simd>(simd: S, x: S::Register) -> Reduced<S::Register> {
    // In this order the limits let NaN pass.
    let bounded = simd.min(simd.splat(LARGEST), simd.max(simd.splat(SMALLEST), x));

    let scaled = simd.mul(bounded, simd.splat(LOG2_E));
    let n = simd.sub(simd.add(scaled, simd.splat(ROUND)), simd.splat(ROUND));
    let r = simd.mul_add(n, simd.splat(-LN2_HIGH), bounded);
    let r = simd.mul_add(n, simd.splat(-LN2_LOW), r);

    let mut slope = simd.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        slope = simd.mul_add(slope, r, simd.splat(coefficient));
    }
    Reduced { n, r, slope }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Kernel, Simd};
    use super::{exp, exp_m1};

    struct Exp<'a> {
        x: &'a [f32],
        /// `e^x` and `e^x - 1`
        out: &'a mut Vec<[f32; 2]>,
    }

    impl Kernel for Exp<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for &x in self.x {
                let x = simd.splat(x);
                self.out.push([exp(simd, x), exp_m1(simd, x)].map(|result| simd.lanes(result)[0]));
            }
        }
    }

    fn exps(isa: Isa, x: &[f32]) -> Vec<[f32; 2]> {
        let mut out = Vec::new();
        isa.run(Exp { x, out: &mut out });
        out
    }

    #[test]
    fn exp_is_close_over_its_whole_range() {
        let x: Vec<f32> = (-87_300..88_300).map(|x| x as f32 / 1000.0 + 0.000_37).collect();
        for isa in Isa::available() {
            for (x, [found, _]) in x.iter().zip(exps(isa, &x)) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(found) - exact).abs() / exact;
                assert!(error < 4e-7, "{isa:?}: exp({x}) = {found}, relative error {error:e}");
            }
        }
    }

    #[test]
    fn exp_m1_is_close_where_one_takes_away_all_but_the_last_digits() {
        let wide = (-90_000..88_000).map(|x| x as f32 / 1000.0 + 0.000_37);
        let x: Vec<f32> = wide.chain((-2_000..2_000).map(|x| x as f32 * 1e-9)).collect();
        for isa in Isa::available() {
            for (x, [_, found]) in x.iter().zip(exps(isa, &x)) {
                let exact = f64::from(*x).exp_m1();
                let error = (f64::from(found) - exact).abs();
                assert!(error <= 5e-7 * exact.abs(), "{isa:?}: exp_m1({x}) = {found}, error {error:e}");
            }
        }
    }

    #[test]
    fn exp_of_specials_is_zero_infinity_or_nan() {
        let small = [0.0, -0.0, -88.0, f32::NEG_INFINITY, f32::MIN];
        let large = [89.0, f32::MAX, f32::INFINITY];
        for isa in Isa::available() {
            assert_eq!(exps(isa, &small), [[1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, -1.0], [0.0, -1.0]]);
            assert!(exps(isa, &large).iter().all(|[exp, _]| *exp == f32::INFINITY), "{isa:?}");
            assert!(exps(isa, &[f32::NAN])[0].iter().all(|result| result.is_nan()), "{isa:?}");
        }
    }
}
