//! Every operation, on every instruction set of this machine, against its definition in f64.

mod activation;
mod attention;
#[path = "../data/mod.rs"]
mod data;
mod embedding;
mod experts;
mod linear;
mod norm;
mod rope;
mod routing;
mod view;

const SIZES: [usize; 10] = [1, 3, 7, 8, 17, 48, 112, 257, 512, 1030];

/// Of one rounding.
const EPSILON: f64 = f32::EPSILON as f64;

/// Each element must be as close to the definition as `tolerance` times `magnitude`, where the magnitude is what the
/// rounding errors of the sum are relative to: the sum of the absolute values of its terms.
fn assert_close(what: &str, found: &[f32], expected: &[f64], magnitude: f64, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * magnitude.max(expected.abs()),
            "{what}: element {at} is {found}, expected {expected}, error {error:e}"
        );
    }
}
