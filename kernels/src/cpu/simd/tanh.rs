use super::{Simd, exp_m1};

/// Beyond, the result is as near to 1 as f32 can tell.
const ONE_FROM: f32 = 10.0;

/// The hyperbolic tangent in every lane, within 1e-6 of the exact value's magnitude; NaN stays NaN.
#[inline(always)]
pub(in crate::cpu) fn tanh<S: Simd>(simd: S, x: S::Register) -> S::Register {
    // In this order the limits let NaN pass.
    let bounded = simd.min(simd.splat(ONE_FROM), simd.max(simd.splat(-ONE_FROM), x));
    // tanh(x) = (e^2x - 1) / (e^2x + 1): as a quotient of e^2x - 1 it keeps its digits near zero.
    let growth = exp_m1(simd, simd.add(bounded, bounded));
    simd.div(growth, simd.add(growth, simd.splat(2.0)))
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, Kernel, Simd};
    use super::tanh;

    struct Tanh<'a> {
        x: &'a [f32],
        out: &'a mut Vec<f32>,
    }

    impl Kernel for Tanh<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for &x in self.x {
                self.out.push(simd.lanes(tanh(simd, simd.splat(x)))[0]);
            }
        }
    }

    fn tanhs(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut out = Vec::new();
        isa.run(Tanh { x, out: &mut out });
        out
    }

    #[test]
    fn tanh_is_close_near_zero_and_far_away() {
        let wide = (-12_000..12_000).map(|x| x as f32 / 1000.0 + 0.000_37);
        let x: Vec<f32> = wide.chain((-2_000..2_000).map(|x| x as f32 * 1e-9)).collect();
        for isa in Isa::available() {
            for (x, found) in x.iter().zip(tanhs(isa, &x)) {
                let exact = f64::from(*x).tanh();
                let error = (f64::from(found) - exact).abs();
                assert!(error <= 1e-6 * exact.abs(), "{isa:?}: tanh({x}) = {found}, error {error:e}");
            }
        }
    }

    #[test]
    fn tanh_of_specials_is_one_or_nan() {
        for isa in Isa::available() {
            let found = tanhs(isa, &[0.0, f32::MAX, f32::INFINITY, f32::MIN, f32::NEG_INFINITY]);
            assert_eq!(found, [0.0, 1.0, 1.0, -1.0, -1.0], "{isa:?}");
            assert!(tanhs(isa, &[f32::NAN])[0].is_nan(), "{isa:?}");
        }
    }
}
