use super::activation::sigmoid;
use super::attention::softmax;
use crate::{GroupScore, Normalize, Routing, Score};

/// The chosen experts of each token, `[T, k]`, best first, and their weights; `logits`: `[T, experts]`.
///
/// Of equally good experts, or groups, the first is taken. Sources: Fedus et al. 2021 (softmax); DeepSeek-AI 2024
/// (DeepSeek-V2, section 2.1.2; DeepSeek-V3, section 2.1.2: groups, sigmoid and correction); Liu et al. 2024 (GRIN,
/// sparse mixer).
pub fn route(logits: &[f32], routing: &Routing<'_>) -> (Vec<u32>, Vec<f64>) {
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(routing.experts) {
        let logits: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        let scores = match routing.score {
            Score::Softmax => softmax(&logits, None),
            Score::Sigmoid => logits.iter().copied().map(sigmoid).collect(),
            Score::SoftmaxOfChosen | Score::SparseMixer { .. } => logits.clone(),
        };
        let chosen = choose(&scores, routing);
        let of_token = match routing.score {
            Score::Softmax | Score::Sigmoid => chosen.iter().map(|&expert| scores[expert]).collect(),
            Score::SoftmaxOfChosen => {
                let of_chosen: Vec<f64> = chosen.iter().map(|&expert| logits[expert]).collect();
                softmax(&of_chosen, None)
            }
            Score::SparseMixer { jitter } => mix(&logits, &chosen, f64::from(jitter)),
        };
        experts.extend(chosen.iter().map(|&expert| expert as u32));
        weights.extend(normalize(of_token, routing));
    }
    (experts, weights)
}

/// The best experts of the best groups.
fn choose(scores: &[f64], routing: &Routing<'_>) -> Vec<usize> {
    let score = |expert: usize| {
        scores[expert] + routing.correction.map_or(0.0, |correction| f64::from(correction[expert]))
    };
    let all = 0..routing.experts;
    let Some(groups) = routing.groups else {
        return best(all.collect(), score, routing.chosen);
    };
    let size = routing.experts / groups.count;
    let group_score = |group: usize| {
        let counted = match groups.score {
            GroupScore::Best => 1,
            GroupScore::TwoBest => 2,
        };
        let members = (group * size..(group + 1) * size).collect();
        best(members, score, counted).into_iter().map(score).sum()
    };
    let kept = best((0..groups.count).collect(), group_score, groups.chosen);
    best(all.filter(|expert| kept.contains(&(expert / size))).collect(), score, routing.chosen)
}

/// The `count` best candidates, best first; of equals, the first.
fn best(mut candidates: Vec<usize>, score: impl Fn(usize) -> f64, count: usize) -> Vec<usize> {
    candidates.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    candidates.truncate(count);
    candidates
}

/// The weight of each chosen expert, in a softmax over the experts that are as good, but for some noise, and not chosen
/// before it.
fn mix(logits: &[f64], chosen: &[usize], jitter: f64) -> Vec<f64> {
    let mut weights = Vec::new();
    for (place, &expert) in chosen.iter().enumerate() {
        let own = logits[expert];
        let mut sum = 0.0;
        for (other, &logit) in logits.iter().enumerate() {
            let far = (own - logit) / logit.abs().max(own) > 2.0 * jitter;
            if !far && !chosen[..place].contains(&other) {
                sum += (logit - own).exp();
            }
        }
        weights.push(1.0 / sum);
    }
    weights
}

fn normalize(mut weights: Vec<f64>, routing: &Routing<'_>) -> Vec<f64> {
    let divisor = match routing.normalize {
        Normalize::No => 1.0,
        Normalize::Sum { eps } => weights.iter().sum::<f64>() + f64::from(eps),
        Normalize::Norm { p } => {
            let p = f64::from(p);
            weights.iter().map(|weight| weight.abs().powf(p)).sum::<f64>().powf(1.0 / p)
        }
    };
    for weight in &mut weights {
        *weight = *weight / divisor * f64::from(routing.scale);
    }
    weights
}
