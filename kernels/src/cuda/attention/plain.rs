use super::{Attention, AttentionParams, OP, checked};
use crate::OpError;
use crate::cuda::{Element, Gpu, Grid, Kernel};

const THREADS: u32 = 128;

/// [`attention`](super::attention) by the one kernel that can do everything.
pub(in crate::cuda) fn attention_plain(gpu: &Gpu, args: Attention<'_>) -> Result<(), OpError> {
    let params = checked(&args)?;
    if args.sequences.bounds().tokens == 0 { Ok(()) } else { run(gpu, &args, &params) }
}

pub(super) fn run(gpu: &Gpu, args: &Attention<'_>, params: &AttentionParams) -> Result<(), OpError> {
    let names = match args.keys.element() {
        Element::E4M3 => {
            ["attention_plain_f32_e4m3", "attention_plain_f16_e4m3", "attention_plain_bf16_e4m3"]
        }
        Element::E5M2 => {
            ["attention_plain_f32_e5m2", "attention_plain_f16_e5m2", "attention_plain_bf16_e5m2"]
        }
        _ => ["attention_plain_f32", "attention_plain_f16", "attention_plain_bf16"],
    };
    let kernel = Gpu::pick(OP, args.query.element(), names.map(|name| Kernel { module: "attention", name }))?;
    let tokens = args.sequences.bounds().tokens as u32;
    let grid = Grid {
        blocks: [tokens, params.heads, 1],
        threads: THREADS,
        shared_bytes: (params.head_dim + params.value_dim) * Element::F32.size() as u32,
    };
    // SAFETY: `checked` has compared every length with the shapes, and the slots of the sequences with those of the cache.
    unsafe { gpu.launch(OP, kernel, grid, params) }
}
