//! Time of the operations that a decoder spends its time in.
//!
//! `cargo bench -p kernels`. A product's bytes are those of its weight, to compare with the bandwidth of the memory;
//! its items are multiply-adds.

use std::num::NonZeroUsize;
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use kernels::cpu::{self, Attention, Cpu, ExpertScratch, Experts, Isa, Product};
use kernels::{
    Activation, AttentionRules, DType, Expert, Gating, HeadShape, Matrix, Norm, NormKind, Normalize,
    Projection, Routes, Routing, Score, Sequence, Values,
};

/// All threads of this machine.
static CPU: LazyLock<Cpu> = LazyLock::new(|| {
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    Cpu::new(threads).expect("threads")
});

/// Operations are called from one of the threads, as a forward pass does.
fn main() {
    CPU.install(divan::main);
}

fn linear(bencher: Bencher<'_, '_>, cpu: &Cpu, dtype: DType, tokens: usize, [inputs, outputs]: [usize; 2]) {
    // 0x3c3c is a small positive number of either 16-bit type.
    let bytes = vec![0x3c; inputs * outputs * dtype.size()];
    let weight = Matrix::new(&bytes, dtype, outputs, inputs).expect("bytes of that shape");
    let input = vec![0.5; tokens * inputs];
    let mut out = vec![0.0; tokens * outputs];
    let bencher =
        bencher.counter(BytesCount::new(bytes.len())).counter(ItemsCount::new(tokens * inputs * outputs));
    bencher.bench_local(|| {
        let products = &mut [Product { weight, bias: None, out: &mut out, add: false }];
        cpu::linear(cpu, divan::black_box(&input), products).expect("shapes that fit");
    });
}

/// Decode: a few tokens against weights larger than the caches of a core.
#[divan::bench(args = [[2048, 2048], [2048, 8192], [8192, 2048]], consts = [1, 4, 16])]
fn linear_decode<const TOKENS: usize>(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    linear(bencher, &CPU, DType::BF16, TOKENS, shape);
}

/// Prefill: bound by arithmetic.
#[divan::bench(args = [[2048, 2048], [8192, 2048]], sample_count = 20)]
fn linear_prefill_256(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    linear(bencher, &CPU, DType::BF16, 256, shape);
}

/// A model of a few megabytes: the weights are in the cache, and handing work over is what costs.
#[divan::bench(args = [[256, 256], [256, 512]], consts = [1, 16])]
fn linear_tiny<const TOKENS: usize>(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    linear(bencher, &CPU, DType::BF16, TOKENS, shape);
}

/// Each stored type and instruction set, on one thread.
#[divan::bench(args = Isa::available().flat_map(|isa| [DType::F32, DType::F16, DType::BF16].map(|dtype| (isa, dtype))))]
fn linear_one_thread(bencher: Bencher<'_, '_>, (isa, dtype): (Isa, DType)) {
    let cpu = Cpu::with_isa(NonZeroUsize::MIN, isa).expect("an available instruction set");
    linear(bencher, &cpu, dtype, 1, [2048, 2048]);
}

/// Llama 3.2 1B: four query heads share a key/value head.
const GROUPED: Layer = Layer {
    shape: HeadShape { heads: 32, kv_heads: 8, head_dim: 64 },
    value_dim: 64,
    in_keys: false,
    rules: AttentionRules { window: None, soft_cap: None, slopes: None, sinks: None },
};

/// DeepSeek-V2 Lite: all heads share one compressed vector.
const LATENT: Layer = Layer {
    shape: HeadShape { heads: 16, kv_heads: 1, head_dim: 576 },
    value_dim: 512,
    in_keys: true,
    ..GROUPED
};

/// DeepSeek-V3.
const LATENT_128: Layer = Layer { shape: HeadShape { heads: 128, ..LATENT.shape }, ..LATENT };

#[derive(Clone, Copy)]
struct Layer {
    shape: HeadShape,
    value_dim: usize,
    in_keys: bool,
    rules: AttentionRules<'static>,
}

/// One step of a batch of sequences that each see 1024 positions. Bytes are those of the keys and values.
#[divan::bench(args = [1, 16])]
fn attention_decode_1024(bencher: Bencher<'_, '_>, batch: usize) {
    attention(bencher, GROUPED, batch, 1, 1024);
}

/// A prompt of 512 tokens.
#[divan::bench(sample_count = 20)]
fn attention_prefill_512(bencher: Bencher<'_, '_>) {
    attention(bencher, GROUPED, 1, 512, 512);
}

/// A step of one sequence that sees 1024 positions, and a prompt of 128 tokens.
#[divan::bench(args = [16, 128], consts = [1, 128], sample_count = 20)]
fn attention_latent<const TOKENS: usize>(bencher: Bencher<'_, '_>, heads: usize) {
    let layer = if heads == 16 { LATENT } else { LATENT_128 };
    attention(bencher, layer, 1, TOKENS, if TOKENS == 1 { 1024 } else { TOKENS });
}

/// The prompt of 512 tokens with each rule.
#[divan::bench(args = ["window", "soft_cap", "slopes", "sinks"], sample_count = 20)]
fn attention_rules(bencher: Bencher<'_, '_>, rule: &str) {
    let rules = match rule {
        "window" => AttentionRules { window: Some(128), ..GROUPED.rules },
        "soft_cap" => AttentionRules { soft_cap: Some(50.0), ..GROUPED.rules },
        "slopes" => AttentionRules { slopes: Some(&[0.1; 32]), ..GROUPED.rules },
        _ => AttentionRules { sinks: Some(&[0.1; 32]), ..GROUPED.rules },
    };
    attention(bencher, Layer { rules, ..GROUPED }, 1, 512, 512);
}

/// `batch` sequences whose last `tokens` of `context` positions attend.
fn attention(bencher: Bencher<'_, '_>, layer: Layer, batch: usize, tokens: usize, context: usize) {
    let Layer { shape, value_dim, in_keys, rules } = layer;
    let cache = vec![0.5; batch * context * shape.kv_width()];
    let values = if in_keys { Values::InKeys } else { Values::Own(&cache) };
    let query = vec![0.5; batch * tokens * shape.query_width()];
    let mut out = vec![0.0; batch * tokens * shape.heads * value_dim];
    let slots: Vec<u32> = (0..(batch * context) as u32).collect();
    let sequences: Vec<_> = (0..batch)
        .map(|index| Sequence {
            rows: index * tokens..(index + 1) * tokens,
            start: context - tokens,
            slots: &slots[index * context..],
        })
        .collect();
    let bencher = bencher.counter(BytesCount::of_slice(&cache[..]));
    bencher.bench_local(|| {
        let args = Attention {
            shape,
            value_dim,
            scale: 0.125,
            query: divan::black_box(&query),
            keys: &cache,
            values,
            rules,
            sequences: &sequences,
            out: &mut out,
        };
        cpu::attention(&CPU, args).expect("shapes that fit");
    });
}

/// On the residual stream of a model of width 2048.
#[divan::bench(args = [1, 16, 256])]
fn add_rms_norm(bencher: Bencher<'_, '_>, tokens: usize) {
    add_norm(bencher, NormKind::Rms, tokens);
}

#[divan::bench(args = [1, 16, 256])]
fn add_layer_norm(bencher: Bencher<'_, '_>, tokens: usize) {
    add_norm(bencher, NormKind::Layer, tokens);
}

fn add_norm(bencher: Bencher<'_, '_>, kind: NormKind, tokens: usize) {
    let (delta, weight) = (vec![0.0; tokens * 2048], vec![1.0; 2048]);
    let (mut residual, mut out) = (vec![0.5; delta.len()], vec![0.0; delta.len()]);
    let norm = Norm { kind, width: 2048, weight: Some(&weight), bias: None, eps: 1e-5 };
    bencher.bench_local(|| {
        cpu::add_norm(&CPU, &mut residual, &delta, &norm, &mut out).expect("shapes that fit");
    });
}

/// Queries of 32 heads, each with the same weight.
#[divan::bench(args = [1, 16, 256])]
fn norm_of_heads_in_place(bencher: Bencher<'_, '_>, tokens: usize) {
    let (mut x, weight) = (vec![0.5; tokens * 32 * 128], vec![1.0; 128]);
    let norm = Norm { kind: NormKind::Rms, width: 128, weight: Some(&weight), bias: None, eps: 1e-5 };
    bencher.bench_local(|| cpu::norm_in_place(&CPU, &mut x, &norm).expect("shapes that fit"));
}

/// The gate of a model of inner width 8192.
#[divan::bench(args = [1, 16, 256])]
fn gated_silu(bencher: Bencher<'_, '_>, tokens: usize) {
    gated(bencher, Activation::Silu, tokens);
}

#[divan::bench(args = [1, 16, 256])]
fn gated_gelu(bencher: Bencher<'_, '_>, tokens: usize) {
    gated(bencher, Activation::Gelu, tokens);
}

fn gated(bencher: Bencher<'_, '_>, activation: Activation, tokens: usize) {
    let (mut gate, up) = (vec![0.5; tokens * 8192], vec![0.5; tokens * 8192]);
    let gating = Gating::Activation(activation);
    bencher.bench_local(|| cpu::gated(&CPU, gating, &mut gate, &up).expect("equal lengths"));
}

/// The mixture of a model of 30B parameters of which 3B are active: experts, of them chosen, width, inner width.
const MIXTURE: [usize; 4] = [128, 8, 2048, 768];

/// Routes that differ from token to token, as those of different texts do.
fn routes(tokens: usize) -> Routes {
    let [experts, chosen, ..] = MIXTURE;
    // Steps of a number that shares no factor with 2^16 visit all remainders.
    let logits: Vec<f32> = (0..tokens * experts).map(|at| (at * 40_503 % 65_536) as f32 / 8192.0).collect();
    let mut routes = Routes::default();
    cpu::route(&CPU, &logits, &routing(experts, chosen), &mut routes).expect("shapes that fit");
    routes
}

fn routing(experts: usize, chosen: usize) -> Routing<'static> {
    let normalize = Normalize::Sum { eps: 0.0 };
    Routing { experts, chosen, score: Score::Softmax, groups: None, correction: None, normalize, scale: 1.0 }
}

#[divan::bench(args = [1, 64])]
fn route_8_of_128(bencher: Bencher<'_, '_>, tokens: usize) {
    let logits: Vec<f32> = (0..tokens * 128).map(|at| (at * 40_503 % 65_536) as f32 / 8192.0).collect();
    let mut routes = Routes::default();
    bencher.bench_local(|| {
        let logits = divan::black_box(&logits);
        cpu::route(&CPU, logits, &routing(128, 8), &mut routes).expect("shapes that fit");
    });
}

/// Bytes are those of the weights of the chosen experts, items are multiply-adds.
#[divan::bench(args = [1, 8, 64, 256], sample_count = 20)]
fn experts_8_of_128(bencher: Bencher<'_, '_>, tokens: usize) {
    let [count, chosen, width, inner] = MIXTURE;
    let bytes: Vec<Vec<u8>> = (0..count).map(|_| vec![0x3c; 3 * width * inner * 2]).collect();
    let experts: Vec<Expert<'_>> = bytes
        .iter()
        .map(|bytes| {
            let (first, rest) = bytes.split_at(width * inner * 2);
            let (second, third) = rest.split_at(width * inner * 2);
            let matrix = |bytes, rows, cols| Projection {
                weight: Matrix::new(bytes, DType::BF16, rows, cols).expect("bytes of that shape"),
                bias: None,
            };
            Expert {
                gate: matrix(first, inner, width),
                up: matrix(second, inner, width),
                down: matrix(third, width, inner),
            }
        })
        .collect();
    let routes = routes(tokens);
    let mut touched = routes.experts.clone();
    touched.sort_unstable();
    touched.dedup();
    let (input, mut out) = (vec![0.5; tokens * width], vec![0.0; tokens * width]);
    let (gating, mut scratch) = (Gating::Activation(Activation::Silu), ExpertScratch::default());
    let bencher = bencher
        .counter(BytesCount::new(touched.len() * bytes[0].len()))
        .counter(ItemsCount::new(tokens * chosen * 3 * width * inner));
    bencher.bench_local(|| {
        let (input, scratch) = (divan::black_box(&input[..]), &mut scratch);
        let args = Experts { input, routes: &routes, experts: &experts, gating, scratch, out: &mut out };
        cpu::experts(&CPU, args).expect("shapes that fit");
    });
}
