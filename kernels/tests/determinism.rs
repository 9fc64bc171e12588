//! A token's result depends on the token alone: not on its neighbours, on chunks, or on threads. Bit for bit.

mod data;

use std::ops::Range;

use data::{DTYPES, Random, Weight, cpus, unwritten};
use kernels::cpu::{self, Attention, Cpu, Product};
use kernels::{DType, HeadShape, Sequence};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn linear(cpu: &Cpu, input: &[f32], weight: &Weight) -> Vec<u32> {
    let weight = weight.matrix();
    let mut out = unwritten(input.len() / weight.cols() * weight.rows());
    let products = &mut [Product { weight, bias: None, out: &mut out }];
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
            .map(|(weight, out)| Product { weight: weight.matrix(), bias: None, out })
            .collect();
        cpu.install(|| cpu::linear(&cpu, &input, &mut products)).expect("shapes that fit");
        for (weight, out) in weights.iter().zip(&outs) {
            assert_eq!(bits(out), linear(&cpu, &input, weight));
        }
    }
}

/// A request of a test: its queries and where its keys and values are.
struct Request {
    query: Vec<f32>,
    slots: Vec<u32>,
}

struct Requests {
    shape: HeadShape,
    keys: Vec<f32>,
    values: Vec<f32>,
    requests: Vec<Request>,
}

impl Requests {
    /// Requests of the given lengths, scattered over one cache. Keys of unused slots are NaN.
    fn new(shape: HeadShape, lengths: &[usize]) -> Self {
        let mut random = Random::new(lengths.len() as u64);
        let used: usize = lengths.iter().sum();
        let cache_slots = used + 7;
        let order = random.permutation(cache_slots);
        let width = shape.kv_width();
        let mut caches = [unwritten(cache_slots * width), unwritten(cache_slots * width)];
        for cache in &mut caches {
            for &slot in &order[..used] {
                cache[slot as usize * width..][..width].copy_from_slice(&random.numbers(width));
            }
        }
        let [keys, values] = caches;
        let mut first = 0;
        let requests = lengths
            .iter()
            .map(|&length| {
                let slots = order[first..][..length].to_vec();
                first += length;
                Request { query: random.numbers(length * shape.query_width()), slots }
            })
            .collect();
        Self { shape, keys, values, requests }
    }

    /// Attention of one batch: positions of some requests. Answers the result of each.
    fn attend(&self, cpu: &Cpu, batch: &[(usize, Range<usize>)]) -> Vec<Vec<u32>> {
        let width = self.shape.query_width();
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
        let mut out = unwritten(query.len());
        let Self { shape, keys, values, .. } = self;
        let args = Attention {
            shape: *shape,
            scale: 0.3,
            query: &query,
            keys,
            values,
            sequences: &sequences,
            out: &mut out,
        };
        cpu::attention(cpu, args).expect("shapes that fit");
        sequences
            .iter()
            .map(|sequence| bits(&out[sequence.rows.start * width..sequence.rows.end * width]))
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

#[test]
fn attention_is_the_same_whole_in_chunks_and_token_by_token() {
    for (heads, kv_heads, head_dim) in [(6, 2, 20), (9, 1, 64), (2, 2, 128)] {
        let requests = Requests::new(HeadShape { heads, kv_heads, head_dim }, &[131]);
        for cpu in cpus(1) {
            let whole = requests.attend(&cpu, &[(0, 0..131)]).concat();
            for chunk in [1, 5, 8, 31, 32, 33, 64, 100] {
                assert!(requests.chunked(&cpu, 0, chunk) == whole, "{:?}: chunks of {chunk}", cpu.isa());
            }
        }
    }
}

#[test]
fn attention_is_the_same_in_a_batch_and_alone_on_any_threads() {
    let lengths = [70, 1, 33, 200, 32];
    let requests = Requests::new(HeadShape { heads: 8, kv_heads: 2, head_dim: 48 }, &lengths);
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        let batch = [(3, 150..200), (1, 0..1), (0, 69..70), (4, 0..32), (2, 10..33)];
        let expected: Vec<_> =
            batch.iter().map(|part| requests.attend(alone, std::slice::from_ref(part)).concat()).collect();
        for threads in 1..=4 {
            let cpu = &cpus(threads)[of_isa];
            assert!(requests.attend(cpu, &batch) == expected, "{:?} on {threads} threads", cpu.isa());
        }
    }
}

#[test]
fn element_wise_results_do_not_depend_on_their_place() {
    let mut random = Random::new(9);
    let width = 77;
    let (x, y, weight) = (random.numbers(4000 * width), random.numbers(4000 * width), random.numbers(width));
    for (of_isa, alone) in cpus(1).iter().enumerate() {
        for threads in [1, 3] {
            let cpu = &cpus(threads)[of_isa];
            let (mut gate, mut normed) = (x.clone(), unwritten(x.len()));
            cpu::gated_silu(cpu, &mut gate, &y).expect("equal lengths");
            cpu::rms_norm(cpu, &x, &weight, 1e-6, &mut normed).expect("shapes that fit");
            for token in [0, 1, 1999, 3999] {
                let place = token * width..(token + 1) * width;
                let (mut gate_alone, mut normed_alone) = (x[place.clone()].to_vec(), unwritten(width));
                cpu::gated_silu(alone, &mut gate_alone, &y[place.clone()]).expect("equal lengths");
                cpu::rms_norm(alone, &x[place.clone()], &weight, 1e-6, &mut normed_alone)
                    .expect("shapes that fit");
                assert_eq!(bits(&gate[place.clone()]), bits(&gate_alone));
                assert_eq!(bits(&normed[place]), bits(&normed_alone));
            }
        }
    }
}
