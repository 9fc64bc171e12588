use super::Checker;
use crate::cuda::{self, Element};
use crate::{OpError, reference};

/// One token and two, odd widths, whole vectors, and more than a block's threads take in one turn.
const VOCABULARIES: [usize; 7] = [1, 2, 31, 128, 1003, 4100, 16_405];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for vocabulary in VOCABULARIES {
        rows(c, vocabulary)?;
    }
    not_numbers(c)
}

/// Each row with two targets, in another order than they lie in.
fn rows(c: &mut Checker, vocabulary: usize) -> Result<(), OpError> {
    let (gpu, rows) = (c.gpu(), 3);
    let mut logits = c.random().numbers(rows * vocabulary);
    for (row, spread) in logits.chunks_exact_mut(vocabulary).zip([30.0, 3.0, 1.0]) {
        row.iter_mut().for_each(|logit| *logit = *logit * spread + 5.0);
    }
    let which: Vec<u32> = [2, 0, 1, 1, 0, 2].to_vec();
    let targets: Vec<u32> = which.iter().map(|_| c.random().below(vocabulary) as u32).collect();
    let expected: Vec<f64> = which
        .iter()
        .zip(&targets)
        .map(|(&row, &target)| {
            let row: Vec<f64> =
                logits[row as usize * vocabulary..][..vocabulary].iter().copied().map(f64::from).collect();
            reference::logprobs(&row)[target as usize]
        })
        .collect();
    let (logits, which, targets) = (gpu.upload(&logits)?, gpu.upload(&which)?, gpu.upload(&targets)?);
    let mut out = c.unwritten(Element::F32, expected.len())?;
    cuda::row_logprobs(&gpu, vocabulary, logits.all(), which.all(), targets.all(), out.all_mut())?;
    // With one token all are 0, to which no error is relative; otherwise they are larger than 1.
    if vocabulary == 1 {
        let found = c.read(&out)?;
        c.equal("log-probabilities of the only token", &found, &[0.0; 6]);
        return Ok(());
    }
    c.close(format!("log-probabilities of {vocabulary} tokens"), &out, &expected, 8.0)
}

fn not_numbers(c: &mut Checker) -> Result<(), OpError> {
    let gpu = c.gpu();
    let (nan, none) = (f32::NAN, f32::NEG_INFINITY);
    let logits =
        [[1.0, nan, 3.0], [none, none, none], [1.0, -nan, f32::INFINITY], [0.0, none, 0.0], [2.0, 2.0, none]];
    let logits = gpu.upload(logits.as_flattened())?;
    let which = gpu.upload(&[0, 1, 2, 3, 3, 4, 5, 0_u32])?;
    let targets = gpu.upload(&[0, 0, 2, 1, 2, 3, 0, u32::MAX])?;
    let mut out = c.unwritten(Element::F32, 8)?;
    cuda::row_logprobs(&gpu, 3, logits.all(), which.all(), targets.all(), out.all_mut())?;
    let half = -std::f32::consts::LN_2;
    let expected = [nan, nan, nan, none, half, nan, nan, nan].map(|value| format!("{value:.5}"));
    let found: Vec<String> = c.read(&out)?.iter().map(|value| format!("{value:.5}")).collect();
    c.equal("log-probabilities of what is no number or does not exist", &found, &expected);
    Ok(())
}
