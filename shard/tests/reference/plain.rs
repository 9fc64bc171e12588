use crate::checkpoint::{INTERMEDIATE, LAYERS, NORM_EPS, ROPE_THETA, Shape, VOCABULARY, Weights};

/// Logits after each token of one sequence, in f64 and without a cache.
pub(crate) fn logits(weights: &Weights, shape: &Shape, ids: &[u32]) -> Vec<Vec<f64>> {
    let hidden = shape.hidden;
    let embedding = &weights["model.embed_tokens.weight"];
    let mut x: Vec<Vec<f64>> =
        ids.iter().map(|&id| embedding[id as usize * hidden..][..hidden].to_vec()).collect();
    for layer in 0..LAYERS {
        let layer = Layer { weights, shape, prefix: format!("model.layers.{layer}") };
        let delta = layer.attention(&layer.norm(&x, "input_layernorm"));
        add(&mut x, delta);
        let delta = layer.mlp(&layer.norm(&x, "post_attention_layernorm"));
        add(&mut x, delta);
    }
    let head = if shape.tied { embedding } else { &weights["lm_head.weight"] };
    x.iter().map(|x| product(head, VOCABULARY, &norm(x, &weights["model.norm.weight"]))).collect()
}

struct Layer<'a> {
    weights: &'a Weights,
    shape: &'a Shape,
    prefix: String,
}

impl Layer<'_> {
    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = &self.weights[&format!("{}.{name}.weight", self.prefix)];
        x.iter().map(|x| norm(x, weight)).collect()
    }

    fn linear(&self, name: &str, outputs: usize, x: &[f64]) -> Vec<f64> {
        let mut out = product(&self.weights[&format!("{}.{name}.weight", self.prefix)], outputs, x);
        if self.shape.biases {
            let bias = &self.weights[&format!("{}.{name}.bias", self.prefix)];
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
        out
    }

    fn mlp(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let row = |x: &Vec<f64>| {
            let gate = self.linear("mlp.gate_proj", INTERMEDIATE, x);
            let up = self.linear("mlp.up_proj", INTERMEDIATE, x);
            let gated: Vec<f64> = gate.iter().zip(&up).map(|(&gate, up)| silu(gate) * up).collect();
            self.linear("mlp.down_proj", self.shape.hidden, &gated)
        };
        x.iter().map(row).collect()
    }

    fn attention(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let Shape { heads, kv_heads, head_dim, hidden, .. } = *self.shape;
        let project = |name: &str, heads: usize| -> Vec<Vec<f64>> {
            x.iter().map(|x| self.linear(&format!("self_attn.{name}"), heads * head_dim, x)).collect()
        };
        let (mut query, mut key, value) =
            (project("q_proj", heads), project("k_proj", kv_heads), project("v_proj", kv_heads));
        for (position, (query, key)) in query.iter_mut().zip(&mut key).enumerate() {
            query
                .chunks_mut(head_dim)
                .chain(key.chunks_mut(head_dim))
                .for_each(|head| self.rotate(head, position));
        }
        let head_of = |row: &Vec<f64>, head: usize| row[head * head_dim..][..head_dim].to_vec();
        let attend = |token: usize| {
            let mut context = Vec::new();
            for head in 0..heads {
                let kv_head = head * kv_heads / heads;
                let query = head_of(&query[token], head);
                let score =
                    |past: usize| dot(&query, &head_of(&key[past], kv_head)) / (head_dim as f64).sqrt();
                let weights: Vec<f64> = (0..=token).map(|past| score(past).exp()).collect();
                let sum: f64 = weights.iter().sum();
                context.extend((0..head_dim).map(|element| {
                    let value = |past: usize| value[past][kv_head * head_dim + element];
                    weights.iter().enumerate().map(|(past, weight)| weight / sum * value(past)).sum::<f64>()
                }));
            }
            self.linear("self_attn.o_proj", hidden, &context)
        };
        (0..x.len()).map(attend).collect()
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        let position = position as f64 / self.shape.rope_factor.unwrap_or(1.0);
        for j in 0..half {
            let (sin, cos) = (position * ROPE_THETA.powf(-(j as f64) / half as f64)).sin_cos();
            let (a, b) = (head[j], head[j + half]);
            head[j] = a * cos - b * sin;
            head[j + half] = b * cos + a * sin;
        }
    }
}

fn add(x: &mut [Vec<f64>], delta: Vec<Vec<f64>>) {
    for (x, delta) in x.iter_mut().zip(delta) {
        x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
    }
}

fn norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + NORM_EPS).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x / scale * weight).collect()
}

fn product(weight: &[f64], outputs: usize, x: &[f64]) -> Vec<f64> {
    (0..outputs).map(|output| dot(&weight[output * x.len()..][..x.len()], x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
