use kernels::cpu::{self, Cpu};
use kernels::{GroupScore, Groups, Normalize, OpError, Routes, Routing, Score, reference};

use crate::data::{Random, cpus};
use crate::{EPSILON, assert_close};

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

fn route(cpu: &Cpu, logits: &[f32], routing: &Routing<'_>) -> Routes {
    let mut routes = Routes { experts: vec![77; 3], weights: vec![f32::NAN; 1000] };
    cpu::route(cpu, logits, routing, &mut routes).expect("shapes that fit");
    routes
}

fn check(routing: &Routing<'_>, spread: f32) {
    let mut random = Random::new((routing.experts * 31 + routing.chosen) as u64);
    for tokens in [0, 1, 7, 600] {
        let logits: Vec<f32> =
            random.numbers(tokens * routing.experts).iter().map(|logit| logit * spread).collect();
        let (experts, weights) = reference::route(&logits, routing);
        for cpu in cpus(3) {
            let found = route(&cpu, &logits, routing);
            assert!(found.experts == experts, "{:?} {routing:?}: other experts", cpu.isa());
            let what = format!("{:?} {routing:?}", cpu.isa());
            assert_close(&what, &found.weights, &weights, 0.0, 32.0 * EPSILON);
        }
    }
}

const SCORES: [Score; 4] =
    [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen, Score::SparseMixer { jitter: 0.01 }];

const NORMALIZATIONS: [Normalize; 5] = [
    Normalize::No,
    Normalize::Sum { eps: 0.0 },
    Normalize::Sum { eps: 1e-20 },
    Normalize::Norm { p: 1.0 },
    Normalize::Norm { p: 2.5 },
];

#[test]
fn routes_are_their_definition_for_all_scores_and_normalizations() {
    for score in SCORES {
        for normalize in NORMALIZATIONS {
            for (experts, chosen) in [(1, 1), (4, 4), (8, 2), (16, 4), (60, 4), (128, 8), (257, 9)] {
                check(&Routing { score, normalize, scale: 2.5, ..plain(experts, chosen) }, 6.0);
            }
        }
    }
}

#[test]
fn routes_within_groups_are_their_definition() {
    let mut random = Random::new(21);
    for (experts, count, kept, chosen) in
        [(256, 8, 4, 8), (160, 8, 3, 6), (12, 4, 1, 3), (6, 3, 3, 6), (10, 1, 1, 2)]
    {
        let correction = random.numbers(experts);
        for (score, by) in [(Score::Softmax, GroupScore::Best), (Score::Sigmoid, GroupScore::TwoBest)] {
            for correction in [None, Some(&correction[..])] {
                let groups = Some(Groups { count, chosen: kept, score: by });
                check(&Routing { score, groups, correction, ..plain(experts, chosen) }, 3.0);
            }
        }
    }
}

#[test]
fn experts_that_cannot_be_told_apart_come_in_their_order() {
    // Groups of two: the last is the best, then the second, then the others alike.
    let logits = [0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 1.0, 0.6];
    let groups = |chosen| Some(Groups { count: 4, chosen, score: GroupScore::TwoBest });
    for cpu in cpus(1) {
        for score in SCORES {
            for (groups, expected) in
                [(None, [3, 6, 7, 0]), (groups(3), [3, 6, 7, 0]), (groups(2), [3, 6, 7, 2])]
            {
                let routing = Routing { score, groups, ..plain(8, 4) };
                assert_eq!(route(&cpu, &logits, &routing).experts, expected, "{score:?} {groups:?}");
            }
        }
    }
}

#[test]
fn a_correction_chooses_but_does_not_weight() {
    let correction = [0.0, 0.0, 5.0, -5.0];
    for cpu in cpus(1) {
        let routing = Routing { score: Score::Sigmoid, correction: Some(&correction), ..plain(4, 2) };
        let routes = route(&cpu, &[0.0, -1.0, -2.0, 9.0], &routing);
        assert_eq!(routes.experts, [2, 0]);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert_close("weights", &routes.weights, &[sigmoid(-2.0), 0.5], 0.0, 4.0 * EPSILON);
    }
}

/// By hand, from the formula: the threshold is 2 %.
#[test]
fn a_sparse_mixer_weighs_each_choice_among_its_equals() {
    let routing = Routing { score: Score::SparseMixer { jitter: 0.01 }, ..plain(5, 2) };
    // 2.97 is 1 % below 3, 2.9 more than 3 %; for the second choice, 2.9 is 2.4 % below 2.97.
    let first = 1.0 / (1.0 + f64::exp(2.97f32 as f64 - 3.0));
    // Negative logits are compared with their own magnitude: -1.01 is 1 % from -1, and -1.5 a third.
    let negative = [-1.0, -1.01, -1.5, -9.0, -1.03];
    let best = 1.0 / (1.0 + f64::exp(-1.01f32 as f64 + 1.0));
    let next = 1.0 / (1.0 + f64::exp(-1.03f32 as f64 + 1.01f32 as f64));
    for cpu in cpus(1) {
        let routes = route(&cpu, &[3.0, 0.0, 2.9, -3.0, 2.97], &routing);
        assert_eq!(routes.experts, [0, 4]);
        assert_close("weights", &routes.weights, &[first, 1.0], 0.0, 4.0 * EPSILON);

        let routes = route(&cpu, &negative, &routing);
        assert_eq!(routes.experts, [0, 1]);
        assert_close("weights", &routes.weights, &[best, next], 0.0, 4.0 * EPSILON);

        // All zero: nothing can be divided by, and nothing is far.
        let routes = route(&cpu, &[0.0; 5], &routing);
        assert_close("weights", &routes.weights, &[0.2, 0.25], 0.0, 4.0 * EPSILON);
    }
}

#[test]
fn logits_that_are_not_numbers_still_lead_to_different_experts() {
    for cpu in cpus(1) {
        for score in SCORES {
            for logits in [[f32::NAN; 6], [f32::NEG_INFINITY; 6], [f32::INFINITY; 6]] {
                let groups = Some(Groups { count: 3, chosen: 2, score: GroupScore::TwoBest });
                for groups in [None, groups] {
                    let mut experts = route(&cpu, &logits, &Routing { score, groups, ..plain(6, 4) }).experts;
                    experts.sort_unstable();
                    experts.dedup();
                    assert!(experts.len() == 4 && experts[3] < 6, "{score:?}: {experts:?}");
                }
            }
        }
    }
}

#[test]
fn a_routing_that_cannot_choose_is_an_error() {
    let cpu = &cpus(1)[0];
    let call = |routing: Routing<'_>, logits: usize| {
        cpu::route(cpu, &vec![0.0; logits], &routing, &mut Routes::default())
    };
    let length = |what, expected, found| Err(OpError::Length { op: "route", what, expected, found });
    let groups = |count, chosen, score| Some(Groups { count, chosen, score });

    assert_eq!(call(plain(8, 2), 16), Ok(()));
    assert_eq!(call(plain(8, 2), 17), length("logits", 16, 17));
    assert_eq!(call(Routing { correction: Some(&[0.0; 7]), ..plain(8, 2) }, 8), length("correction", 8, 7));
    for routing in [
        plain(8, 9),
        plain(8, 0),
        plain(0, 0),
        Routing { groups: groups(0, 0, GroupScore::Best), ..plain(8, 2) },
        Routing { groups: groups(3, 2, GroupScore::Best), ..plain(8, 2) },
        Routing { groups: groups(4, 5, GroupScore::Best), ..plain(8, 2) },
        Routing { groups: groups(4, 0, GroupScore::Best), ..plain(8, 2) },
        Routing { groups: groups(4, 1, GroupScore::Best), ..plain(8, 3) },
        Routing { groups: groups(8, 4, GroupScore::TwoBest), ..plain(8, 2) },
        Routing { normalize: Normalize::Norm { p: 0.0 }, ..plain(8, 2) },
        Routing { normalize: Normalize::Norm { p: f32::NAN }, ..plain(8, 2) },
        Routing { normalize: Normalize::Norm { p: f32::INFINITY }, ..plain(8, 2) },
    ] {
        let result = call(routing, 8);
        assert!(matches!(result, Err(OpError::Unsupported { op: "route", .. })), "{routing:?}: {result:?}");
    }
}
