use super::Checker;
use crate::cuda::{self, Element, Routes};
use crate::{GroupScore, Groups, Normalize, OpError, Routing, Score, reference};

const SCORES: [Score; 4] =
    [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen, Score::SparseMixer { jitter: 0.1 }];

const NORMALIZATIONS: [Normalize; 4] =
    [Normalize::No, Normalize::Sum { eps: 1e-20 }, Normalize::Norm { p: 1.0 }, Normalize::Norm { p: 2.5 }];

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for score in SCORES {
        for (index, (experts, chosen)) in
            [(1, 1), (4, 4), (8, 2), (31, 3), (60, 4), (128, 8), (257, 9), (512, 40)].into_iter().enumerate()
        {
            let normalize = NORMALIZATIONS[index % NORMALIZATIONS.len()];
            let routing = Routing { score, normalize, scale: 2.5, ..plain(experts, chosen) };
            // Coarse ones are often equal.
            random(c, &routing, 9, index % 2 == 1)?;
        }
    }
    for (experts, count, kept, chosen) in
        [(256, 8, 4, 8), (160, 8, 3, 6), (12, 4, 1, 3), (6, 3, 3, 6), (10, 1, 1, 2), (80, 40, 34, 5)]
    {
        let correction = c.random().numbers(experts);
        for (score, by) in [(Score::Softmax, GroupScore::Best), (Score::Sigmoid, GroupScore::TwoBest)] {
            for correction in [None, Some(&correction[..])] {
                let groups = Some(Groups { count, chosen: kept, score: by });
                random(c, &Routing { score, groups, correction, ..plain(experts, chosen) }, 5, false)?;
            }
        }
    }
    alike(c)?;
    no_numbers(c)
}

/// Softmax, then the best `chosen`, without anything else.
fn plain(experts: usize, chosen: usize) -> Routing<'static> {
    Routing {
        experts,
        chosen,
        score: Score::Softmax,
        groups: None,
        correction: None,
        normalize: Normalize::No,
        scale: 1.0,
    }
}

fn random(c: &mut Checker, routing: &Routing<'_>, tokens: usize, coarse: bool) -> Result<(), OpError> {
    let mut logits = c.random().numbers(tokens * routing.experts);
    for logit in &mut logits {
        *logit = if coarse { (*logit * 8.0).round() / 2.0 } else { *logit * 6.0 };
    }
    compare(c, routing, &logits)
}

/// All experts have to be those of the definition.
fn compare(c: &mut Checker, routing: &Routing<'_>, logits: &[f32]) -> Result<(), OpError> {
    let case = format!("{} tokens, {routing:?}", logits.len() / routing.experts);
    let (experts, weights) = reference::route(logits, routing);
    let found = run(c, routing, logits)?;
    c.equal(format!("experts, {case}"), &found.experts, &experts);
    let found = c.given(Element::F32, &found.weights)?;
    c.close(format!("weights, {case}"), &found.buffer, &weights, 32.0)
}

fn run(c: &Checker, routing: &Routing<'_>, logits: &[f32]) -> Result<crate::Routes, OpError> {
    let gpu = c.gpu();
    let correction = routing.correction.map(|correction| c.given(Element::F32, correction)).transpose()?;
    let Routing { experts, chosen, score, groups, normalize, scale, .. } = *routing;
    let correction = correction.as_ref().map(|correction| correction.buffer.all());
    let on_device = cuda::Routing { experts, chosen, score, groups, correction, normalize, scale };
    let logits = c.given(Element::F32, logits)?;
    let mut routes = Routes::new(&gpu)?;
    // Memory that is there already, and more than is needed.
    routes.reserve(3, 7)?;
    cuda::route(&gpu, logits.buffer.all(), &on_device, &mut routes)?;
    routes.read()
}

/// Of equals the first is taken: experts, and groups of two, the last of which is the best and the second the next.
fn alike(c: &mut Checker) -> Result<(), OpError> {
    let logits = [0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 1.0, 0.6];
    let groups = |chosen| Some(Groups { count: 4, chosen, score: GroupScore::TwoBest });
    for score in SCORES {
        for groups in [None, groups(3), groups(2)] {
            compare(c, &Routing { score, groups, ..plain(8, 4) }, &logits)?;
        }
        // All zero: nothing can be divided by, and nothing is far.
        compare(c, &Routing { score, ..plain(5, 2) }, &[0.0; 5])?;
    }
    Ok(())
}

/// Even then a token goes to different experts that there are.
fn no_numbers(c: &mut Checker) -> Result<(), OpError> {
    for score in SCORES {
        for logits in [[f32::NAN; 6], [-f32::NAN; 6], [f32::NEG_INFINITY; 6], [f32::INFINITY; 6]] {
            let groups = Some(Groups { count: 3, chosen: 2, score: GroupScore::TwoBest });
            for groups in [None, groups] {
                let mut experts = run(c, &Routing { score, groups, ..plain(6, 4) }, &logits)?.experts;
                experts.sort_unstable();
                experts.dedup();
                let four_of_six = experts.len() == 4 && experts[3] < 6;
                c.equal(format!("{score:?} of {logits:?}, {groups:?}"), &[four_of_six], &[true]);
            }
        }
    }
    Ok(())
}
