//! A token's result depends on the token alone: not on its neighbours, on chunks, or on threads. Bit for bit.

mod data;

use std::ops::Range;

use data::{DTYPES, Mixture, Random, Weight, cpus, unwritten};
use kernels::cpu::{self, Attention, Cpu, ExpertScratch, Experts, Product};
use kernels::{
    Activation, AttentionRules, DType, Gating, GroupScore, Groups, HeadShape, Norm, NormKind, Normalize,
    Routes, Routing, Score, Sequence, Values,
};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn linear(cpu: &Cpu, input: &[f32], weight: &Weight) -> Vec<u32> {
    let weight = weight.matrix();
    let mut out = unwritten(input.len() / weight.cols() * weight.rows());
    let products = &mut [Product { weight, bias: None, out: &mut out, add: false }];
    cpu::linear(cpu, input, products).expect("shapes that fit");
    bits(&out)
}

/// Batches of each size against one token at a time, on one thread, and on more.
fn check_linear(dtype: DType, inputs: usize, outputs: usize, batches: impl Iterator<Item = usize> + Clone) {
    let mut random = Random::new(inputs as u64);
    let tokens_max = batches.clone().max().expect("batches");
    let input = random.numbers(tokens_max * inputs);
    let weight = Weight::random(&mut random, dtype, outputs, inputs);
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        let expected: Vec<u32> =
            input.chunks_exact(inputs).flat_map(|token| linear(alone, token, &weight)).collect();
        for threads in 1..=4 {
            let cpu = &cpus(threads)[of_isa];
            for tokens in batches.clone() {
                let found = linear(cpu, &input[..tokens * inputs], &weight);
                assert!(
                    found == expected[..tokens * outputs],
                    "{:?} {dtype:?}: {tokens} tokens on {threads} threads differ from one at a time",
                    cpu.isa()
                );
            }
        }
    }
}

#[test]
fn linear_is_the_same_in_every_batch_on_any_threads() {
    for dtype in DTYPES {
        check_linear(dtype, 517, 109, 1..=33);
    }
}

#[test]
fn linear_is_the_same_when_a_batch_is_cut_into_blocks() {
    check_linear(DType::BF16, 11_000, 100, [1, 2, 3, 4, 11, 12, 13, 24, 25, 61].into_iter());
}

#[test]
fn linear_is_the_same_beside_other_products() {
    let mut random = Random::new(3);
    let (tokens, inputs) = (5, 1031);
    let input = random.numbers(tokens * inputs);
    let weights = [37, 530, 3].map(|outputs| Weight::random(&mut random, DType::F16, outputs, inputs));
    for cpu in cpus(4) {
        let mut outs = weights.each_ref().map(|weight| unwritten(tokens * weight.matrix().rows()));
        let mut products: Vec<_> = weights
            .iter()
            .zip(&mut outs)
            .map(|(weight, out)| Product { weight: weight.matrix(), bias: None, out, add: false })
            .collect();
        cpu.install(|| cpu::linear(&cpu, &input, &mut products)).expect("shapes that fit");
        for (weight, out) in weights.iter().zip(&outs) {
            assert_eq!(bits(out), linear(&cpu, &input, weight));
        }
    }
}

#[test]
fn linear_per_head_is_the_same_as_a_product_of_each_head() {
    let mut random = Random::new(4);
    let (groups, inputs, outputs, tokens) = (5, 517, 139, 7);
    let input = random.numbers(tokens * groups * inputs);
    let weight = Weight::random(&mut random, DType::BF16, groups * outputs, inputs);
    let weight = weight.matrix();
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        let mut expected = vec![0; tokens * groups * outputs];
        for group in 0..groups {
            for token in 0..tokens {
                let input = &input[(token * groups + group) * inputs..][..inputs];
                let rows: Vec<u8> =
                    (0..outputs).flat_map(|row| weight.row(group * outputs + row).to_vec()).collect();
                let product = linear(alone, input, &Weight::new(&rows, DType::BF16, outputs, inputs));
                expected[(token * groups + group) * outputs..][..outputs].copy_from_slice(&product);
            }
        }
        for threads in [1, 3] {
            let cpu = &cpus(threads)[of_isa];
            let mut out = unwritten(expected.len());
            cpu::linear_per_head(cpu, &input, weight, groups, &mut out).expect("shapes that fit");
            assert!(bits(&out) == expected, "{:?} on {threads} threads", cpu.isa());
        }
    }
}

#[test]
fn linear_adds_the_same_product_that_it_writes() {
    let mut random = Random::new(8);
    let (tokens, inputs, outputs) = (5, 517, 61);
    let (input, bias) = (random.numbers(tokens * inputs), random.numbers(outputs));
    let before = random.numbers(tokens * outputs);
    let weight = Weight::random(&mut random, DType::F16, outputs, inputs);
    for cpu in cpus(2) {
        let call = |out: &mut [f32], add| {
            let products = &mut [Product { weight: weight.matrix(), bias: Some(&bias), out, add }];
            cpu::linear(&cpu, &input, products).expect("shapes that fit");
        };
        let (mut product, mut sum) = (unwritten(before.len()), before.clone());
        call(&mut product, false);
        call(&mut sum, true);
        let expected: Vec<f32> = before.iter().zip(product).map(|(x, y)| x + y).collect();
        assert_eq!(bits(&sum), bits(&expected), "{:?}", cpu.isa());
    }
}

/// A layer whose values are as long as its keys, in a cache of their own, and without rules.
fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Layer<'static> {
    let shape = HeadShape { heads, kv_heads, head_dim };
    Layer { shape, value_dim: head_dim, in_keys: false, rules: AttentionRules::default() }
}

#[derive(Clone, Copy, Debug)]
struct Layer<'a> {
    shape: HeadShape,
    value_dim: usize,
    /// Whether the values are part of the keys.
    in_keys: bool,
    rules: AttentionRules<'a>,
}

/// A request of a test: its queries and where its keys and values are.
struct Request {
    query: Vec<f32>,
    slots: Vec<u32>,
}

struct Requests<'a> {
    layer: Layer<'a>,
    keys: Vec<f32>,
    values: Vec<f32>,
    requests: Vec<Request>,
}

impl<'a> Requests<'a> {
    /// Requests of the given lengths, scattered over one cache. Keys of unused slots are NaN.
    fn new(layer: Layer<'a>, lengths: &[usize]) -> Self {
        let mut random = Random::new(lengths.len() as u64);
        let used: usize = lengths.iter().sum();
        let cache_slots = used + 7;
        let order = random.permutation(cache_slots);
        let widths = [layer.shape.kv_width(), layer.shape.kv_heads * layer.value_dim];
        let [keys, values] = widths.map(|width| {
            let mut cache = unwritten(cache_slots * width);
            for &slot in &order[..used] {
                cache[slot as usize * width..][..width].copy_from_slice(&random.numbers(width));
            }
            cache
        });
        let mut first = 0;
        let requests = lengths
            .iter()
            .map(|&length| {
                let slots = order[first..][..length].to_vec();
                first += length;
                Request { query: random.numbers(length * layer.shape.query_width()), slots }
            })
            .collect();
        Self { layer, keys, values, requests }
    }

    /// Attention of one batch: positions of some requests. Answers the result of each.
    fn attend(&self, cpu: &Cpu, batch: &[(usize, Range<usize>)]) -> Vec<Vec<u32>> {
        let Self { layer: Layer { shape, value_dim, in_keys, rules }, keys, values, .. } = self;
        let (width, out_width) = (shape.query_width(), shape.heads * value_dim);
        let (mut query, mut sequences) = (Vec::new(), Vec::new());
        for (request, positions) in batch {
            let request = &self.requests[*request];
            let row = query.len() / width;
            sequences.push(Sequence {
                rows: row..row + positions.len(),
                start: positions.start,
                slots: &request.slots,
            });
            query.extend_from_slice(&request.query[positions.start * width..positions.end * width]);
        }
        let mut out = unwritten(query.len() / width * out_width);
        let args = Attention {
            shape: *shape,
            value_dim: *value_dim,
            scale: 0.3,
            query: &query,
            keys,
            values: if *in_keys { Values::InKeys } else { Values::Own(values) },
            rules: *rules,
            sequences: &sequences,
            out: &mut out,
        };
        cpu::attention(cpu, args).expect("shapes that fit");
        sequences
            .iter()
            .map(|sequence| bits(&out[sequence.rows.start * out_width..sequence.rows.end * out_width]))
            .collect()
    }

    fn chunked(&self, cpu: &Cpu, request: usize, chunk: usize) -> Vec<u32> {
        let length = self.requests[request].slots.len();
        (0..length)
            .step_by(chunk)
            .flat_map(|first| self.attend(cpu, &[(request, first..length.min(first + chunk))]).concat())
            .collect()
    }
}

/// A prompt of 131 tokens whole, in chunks of many sizes, and token by token.
fn check_chunks(layer: Layer<'_>) {
    let requests = Requests::new(layer, &[131]);
    for cpu in cpus(1) {
        let whole = requests.attend(&cpu, &[(0, 0..131)]).concat();
        for chunk in [1, 5, 8, 31, 32, 33, 64, 100] {
            assert!(
                requests.chunked(&cpu, 0, chunk) == whole,
                "{:?} {layer:?}: chunks of {chunk}",
                cpu.isa()
            );
        }
    }
}

/// A batch of requests in all stages, each against itself alone, on one thread and on more.
fn check_batch(layer: Layer<'_>) {
    let requests = Requests::new(layer, &[70, 1, 33, 200, 32]);
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        let batch = [(3, 150..200), (1, 0..1), (0, 69..70), (4, 0..32), (2, 10..33)];
        let expected: Vec<_> =
            batch.iter().map(|part| requests.attend(alone, std::slice::from_ref(part)).concat()).collect();
        for threads in 1..=4 {
            let cpu = &cpus(threads)[of_isa];
            let found = requests.attend(cpu, &batch);
            assert!(found == expected, "{:?} {layer:?} on {threads} threads", cpu.isa());
        }
    }
}

#[test]
fn attention_is_the_same_whole_in_chunks_and_token_by_token() {
    for layer in [plain(6, 2, 20), plain(9, 1, 64), plain(2, 2, 128)] {
        check_chunks(layer);
    }
}

#[test]
fn attention_is_the_same_in_a_batch_and_alone_on_any_threads() {
    check_batch(plain(8, 2, 48));
}

#[test]
fn attention_with_values_of_another_size_or_in_the_keys_is_the_same_however_it_is_called() {
    for layer in [
        Layer { value_dim: 33, ..plain(6, 2, 20) },
        Layer { value_dim: 128, ..plain(4, 4, 192) },
        Layer { value_dim: 512, in_keys: true, ..plain(17, 1, 576) },
    ] {
        check_chunks(layer);
        check_batch(layer);
    }
}

#[test]
fn attention_with_rules_is_the_same_however_it_is_called() {
    let mut random = Random::new(31);
    let (slopes, sinks) = (random.numbers(9), random.numbers(9));
    let plain_rules = AttentionRules::default();
    let windows = [1, 7, 32, 45, 1000].map(|window| AttentionRules { window: Some(window), ..plain_rules });
    let others = [
        AttentionRules { soft_cap: Some(2.0), ..plain_rules },
        AttentionRules { slopes: Some(&slopes), ..plain_rules },
        AttentionRules { sinks: Some(&sinks), ..plain_rules },
        AttentionRules { window: Some(40), soft_cap: Some(1.0), slopes: Some(&slopes), sinks: Some(&sinks) },
    ];
    for rules in windows.into_iter().chain(others) {
        check_chunks(Layer { rules, ..plain(9, 3, 80) });
        check_batch(Layer { rules, ..plain(9, 1, 112) });
    }
}

#[test]
fn a_window_longer_than_the_context_changes_nothing() {
    let rules = AttentionRules { window: Some(131), ..AttentionRules::default() };
    let (windowed, whole) = (Layer { rules, ..plain(6, 2, 64) }, plain(6, 2, 64));
    for cpu in cpus(1) {
        let attend = |layer| Requests::new(layer, &[131]).attend(&cpu, &[(0, 0..131)]);
        assert!(attend(windowed) == attend(whole), "{:?}", cpu.isa());
    }
}

#[test]
fn rows_are_normalized_the_same_in_every_place() {
    let mut random = Random::new(9);
    let (width, heads, tokens) = (77, 5, 3000);
    let row = heads * width;
    let (x, delta) = (random.numbers(tokens * row), random.numbers(tokens * row));
    let (weight, bias) = (random.numbers(row), random.numbers(row));
    for kind in [NormKind::Rms, NormKind::Layer] {
        let norm = Norm { kind, width, weight: Some(&weight), bias: Some(&bias), eps: 1e-6 };
        let all = |cpu: &Cpu, place: Range<usize>| {
            let (mut normed, mut added) = (unwritten(place.len()), unwritten(place.len()));
            let (mut in_place, mut residual) = (x[place.clone()].to_vec(), x[place.clone()].to_vec());
            cpu::norm(cpu, &x[place.clone()], &norm, &mut normed).expect("shapes that fit");
            cpu::norm_in_place(cpu, &mut in_place, &norm).expect("shapes that fit");
            cpu::add_norm(cpu, &mut residual, &delta[place], &norm, &mut added).expect("shapes that fit");
            [normed, in_place, added, residual].map(|result| bits(&result))
        };
        check_places(tokens, row, all);
    }
}

#[test]
fn elements_are_computed_the_same_in_every_place() {
    let mut random = Random::new(10);
    let (width, tokens) = (77, 4000);
    let spread = |numbers: Vec<f32>| numbers.into_iter().map(|x| x * 5.0).collect::<Vec<_>>();
    let (x, up) = (spread(random.numbers(tokens * width)), random.numbers(tokens * width));
    for activation in
        [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu]
    {
        let all = |cpu: &Cpu, place: Range<usize>| {
            let [mut active, mut gate, mut capped] = [(); 3].map(|()| x[place.clone()].to_vec());
            cpu::activate(cpu, activation, &mut active).expect("any length");
            cpu::gated(cpu, Gating::Activation(activation), &mut gate, &up[place]).expect("equal lengths");
            cpu::soft_cap(cpu, &mut capped, 3.0).expect("a positive cap");
            [active, gate, capped].map(|result| bits(&result))
        };
        check_places(tokens, width, all);
    }
}

/// What `run` answers for all tokens, `width` elements each, on several threads, must hold what it answers for one of
/// them alone on one thread.
fn check_places<const N: usize>(
    tokens: usize,
    width: usize,
    run: impl Fn(&Cpu, Range<usize>) -> [Vec<u32>; N],
) {
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        for threads in [1, 3] {
            let cpu = &cpus(threads)[of_isa];
            let whole = run(cpu, 0..tokens * width);
            for token in [0, 1, tokens / 2, tokens - 1] {
                let place = token * width..(token + 1) * width;
                let found = whole.each_ref().map(|result| result[place.clone()].to_vec());
                assert!(found == run(alone, place), "{:?} on {threads} threads: token {token}", cpu.isa());
            }
        }
    }
}

#[test]
fn a_token_is_routed_the_same_in_every_batch() {
    let mut random = Random::new(11);
    let (tokens, experts, chosen) = (700, 60, 6);
    let logits = random.numbers(tokens * experts);
    let correction = random.numbers(experts);
    let groups = Some(Groups { count: 6, chosen: 3, score: GroupScore::TwoBest });
    for score in [Score::Softmax, Score::Sigmoid, Score::SoftmaxOfChosen, Score::SparseMixer { jitter: 0.01 }]
    {
        let normalize = Normalize::Sum { eps: 1e-20 };
        let correction = Some(&correction[..]);
        let routing = Routing { experts, chosen, score, groups, correction, normalize, scale: 2.5 };
        for (of_isa, alone) in cpus(1).iter().enumerate() {
            let mut expected = Routes::default();
            for token in logits.chunks_exact(experts) {
                let mut routes = Routes::default();
                cpu::route(alone, token, &routing, &mut routes).expect("shapes that fit");
                expected.experts.extend(routes.experts);
                expected.weights.extend(routes.weights);
            }
            for threads in [1, 3] {
                let mut found = Routes::default();
                cpu::route(&cpus(threads)[of_isa], &logits, &routing, &mut found).expect("shapes that fit");
                assert!(found.experts == expected.experts && bits(&found.weights) == bits(&expected.weights));
            }
        }
    }
}

/// Batches of one token to all, through one scratch, against one token at a time through its own.
fn check_experts(mixture: &Mixture, per_token: usize, batches: &[usize], threads: Range<usize>) {
    let tokens_max = batches.iter().copied().max().expect("batches");
    let mut random = Random::new(12);
    let input = random.numbers(tokens_max * mixture.width);
    let routes = mixture.routes(&mut random, tokens_max, per_token);
    let experts = mixture.experts();
    let run = |cpu: &Cpu, tokens: Range<usize>, scratch: &mut ExpertScratch| {
        let input = &input[tokens.start * mixture.width..tokens.end * mixture.width];
        let place = tokens.start * per_token..tokens.end * per_token;
        let routes = &Routes {
            experts: routes.experts[place.clone()].to_vec(),
            weights: routes.weights[place].to_vec(),
        };
        let (gating, mut out) = (Gating::Activation(Activation::Silu), unwritten(input.len()));
        let args = Experts { input, routes, experts: &experts, gating, scratch, out: &mut out };
        cpu.install(|| cpu::experts(cpu, args)).expect("shapes that fit");
        bits(&out)
    };
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        let expected: Vec<u32> = (0..tokens_max)
            .flat_map(|token| run(alone, token..token + 1, &mut ExpertScratch::default()))
            .collect();
        for threads in threads.clone() {
            let (cpu, scratch) = (&cpus(threads)[of_isa], &mut ExpertScratch::default());
            for &tokens in batches {
                let found = run(cpu, 0..tokens, scratch);
                let what = format!("{:?}: {tokens} tokens on {threads} threads", cpu.isa());
                assert!(found == expected[..tokens * mixture.width], "{what} differ from one at a time");
            }
        }
    }
}

#[test]
fn a_token_gets_the_same_from_its_experts_whoever_else_goes_there() {
    for dtype in DTYPES {
        check_experts(&Mixture::new(dtype, 8, 70, 45, true), 2, &[33, 1, 2, 7, 3, 60], 1..5);
    }
    check_experts(&Mixture::new(DType::BF16, 40, 320, 96, false), 8, &[1, 64, 5], 1..5);
}

/// What is between input and output of these is more than goes through the experts together.
#[test]
fn a_token_gets_the_same_from_its_experts_in_a_long_prompt() {
    check_experts(&Mixture::new(DType::F32, 3, 16, 2048, true), 3, &[3000], 2..3);
}
