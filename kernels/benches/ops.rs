//! Time of the operations that a decoder spends its time in.
//!
//! `cargo bench -p kernels`. A product's bytes are those of its weight, to compare with the bandwidth of the memory;
//! its items are multiply-adds.

use std::num::NonZeroUsize;
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use kernels::cpu::{self, Attention, Cpu, Isa, Product};
use kernels::{DType, HeadShape, Matrix, Sequence};

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
        let products = &mut [Product { weight, bias: None, out: &mut out }];
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

/// One step of a batch of sequences that each see 1024 positions. Bytes are those of the keys and values.
#[divan::bench(args = [1, 16])]
fn attention_decode_1024(bencher: Bencher<'_, '_>, batch: usize) {
    attention(bencher, batch, 1, 1024);
}

/// A prompt of 512 tokens.
#[divan::bench(sample_count = 20)]
fn attention_prefill_512(bencher: Bencher<'_, '_>) {
    attention(bencher, 1, 512, 512);
}

/// `batch` sequences whose last `tokens` of `context` positions attend.
fn attention(bencher: Bencher<'_, '_>, batch: usize, tokens: usize, context: usize) {
    let shape = HeadShape { heads: 32, kv_heads: 8, head_dim: 64 };
    let cache = vec![0.5; batch * context * shape.kv_width()];
    let query = vec![0.5; batch * tokens * shape.query_width()];
    let mut out = vec![0.0; query.len()];
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
        let (query, keys, values) = (divan::black_box(&query[..]), &cache[..], &cache[..]);
        let args =
            Attention { shape, scale: 0.125, query, keys, values, sequences: &sequences, out: &mut out };
        cpu::attention(&CPU, args).expect("shapes that fit");
    });
}

/// Operations on the residual stream of a model of width 2048.
#[divan::bench(args = [1, 16, 256])]
fn add_rms_norm(bencher: Bencher<'_, '_>, tokens: usize) {
    let (delta, weight) = (vec![0.0; tokens * 2048], vec![1.0; 2048]);
    let (mut residual, mut out) = (vec![0.5; delta.len()], vec![0.0; delta.len()]);
    bencher.bench_local(|| {
        cpu::add_rms_norm(&CPU, &mut residual, &delta, &weight, 1e-5, &mut out).expect("shapes that fit");
    });
}

/// The gate of a model of inner width 8192.
#[divan::bench(args = [1, 16, 256])]
fn gated_silu(bencher: Bencher<'_, '_>, tokens: usize) {
    let (mut gate, up) = (vec![0.5; tokens * 8192], vec![0.5; tokens * 8192]);
    bencher.bench_local(|| cpu::gated_silu(&CPU, &mut gate, &up).expect("equal lengths"));
}
