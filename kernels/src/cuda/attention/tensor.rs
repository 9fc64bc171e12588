//! Attention on tensor cores. Sequences with few rows are decoded: their keys are split among blocks. Those of the others are
//! not, but there are more rows to share out.

use super::{Attention, AttentionParams, OP, Values};
use crate::OpError;
use crate::cuda::driver::DevicePtr;
use crate::cuda::params::fit;
use crate::cuda::{Element, Gpu, Grid, Kernel};

/// Kernels of one size: for f16 and bf16, each over a cache of its own type, of E4M3 and of E5M2.
type BySize = (usize, [Kernel; 6]);

macro_rules! by_size {
    ($module:literal, $($size:literal),*) => {
        [$(($size, [
            Kernel { module: $module, name: concat!($module, "_", $size, "_f16") },
            Kernel { module: $module, name: concat!($module, "_", $size, "_f16_e4m3") },
            Kernel { module: $module, name: concat!($module, "_", $size, "_f16_e5m2") },
            Kernel { module: $module, name: concat!($module, "_", $size, "_bf16") },
            Kernel { module: $module, name: concat!($module, "_", $size, "_bf16_e4m3") },
            Kernel { module: $module, name: concat!($module, "_", $size, "_bf16_e5m2") },
        ])),*]
    };
}

const DECODE: [BySize; 7] = by_size!("attention_decode", 64, 80, 96, 112, 128, 192, 256);
const PREFILL: [BySize; 7] = by_size!("attention_prefill", 64, 80, 96, 112, 128, 192, 256);
/// By rows of a block.
const LATENT: [BySize; 2] = by_size!("attention_latent", 16, 64);

/// Elements of a latent key and value.
const LATENT_KEY: usize = 576;
const LATENT_VALUE: usize = 512;

/// A kernel, and what a block of it is.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    kernel: Kernel,
    /// Query heads of some tokens.
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

/// The kernels for a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    decode: Blocks,
    prefill: Blocks,
}

/// None where there are none for its types and sizes.
pub(super) fn kernels(args: &Attention<'_>, shared_bytes_max: usize) -> Option<Kernels> {
    let of_element = match args.query.element() {
        Element::F16 => 0,
        Element::BF16 => 3,
        _ => return None,
    };
    let index = match args.keys.element() {
        Element::E4M3 => of_element + 1,
        Element::E5M2 => of_element + 2,
        _ => of_element,
    };
    // Of these sizes, all vectors are aligned if the first is.
    let values = match args.values {
        Values::Own(values) => values.ptr,
        Values::InKeys => args.keys.ptr,
    };
    let aligned = |ptr: DevicePtr| ptr.0.is_multiple_of(16);
    let pointers = [args.query.ptr, args.keys.ptr, values, args.out.as_slice().ptr];
    // The largest product is that of the largest score only where the scale keeps the order.
    if !pointers.into_iter().all(aligned) || args.scale <= 0.0 || args.scale.is_nan() {
        return None;
    }
    let (head_dim, cache) = (args.shape.head_dim, args.keys.element());
    if (head_dim, args.value_dim) == (LATENT_KEY, LATENT_VALUE) && matches!(args.values, Values::InKeys) {
        return latent(args, index, shared_bytes_max);
    }
    if args.value_dim != head_dim {
        return None;
    }
    Some(Kernels { decode: decode(head_dim, cache, index)?, prefill: prefill(head_dim, cache, index)? })
}

fn find(table: &[BySize], size: usize, index: usize) -> Option<Kernel> {
    let (_, kernels) = table.iter().find(|(found, _)| *found == size)?;
    Some(kernels[index])
}

/// As `Decode` in `attention_decode.cu`: the rings of the warps, and the queries.
fn decode(head_dim: usize, cache: Element, index: usize) -> Option<Blocks> {
    let kernel = find(&DECODE, head_dim, index)?;
    let tiles = 4 * 16 * head_dim * cache.size();
    let stages = (72 * 1024 / tiles).min(8);
    Some(Blocks { kernel, rows: 16, threads: 128, shared_bytes: stages * tiles + head_dim / 16 * 512 })
}

/// As `Prefill` in `attention_prefill.cu`: keys, values and queries.
fn prefill(head_dim: usize, cache: Element, index: usize) -> Option<Blocks> {
    let kernel = find(&PREFILL, head_dim, index)?;
    let rows = if head_dim > 128 { 64 } else { 128 };
    Some(Blocks { kernel, rows, threads: 128, shared_bytes: head_dim * (2 * 64 * cache.size() + 2 * rows) })
}

/// As `Latent` in `attention_latent.cu`: the ring of keys, queries and weights.
fn latent(args: &Attention<'_>, index: usize, shared_bytes_max: usize) -> Option<Kernels> {
    const KEYS: usize = 32;
    let ring = 4 * KEYS * LATENT_KEY;
    let blocks = |rows, threads| {
        let shared_bytes = ring + rows * (2 * LATENT_KEY + 2 * KEYS);
        Some(Blocks { kernel: find(&LATENT, rows, index)?, rows, threads, shared_bytes })
    };
    let (small, large) = (blocks(16, 128)?, blocks(64, 256)?);
    // Beside what is laid out here, a block has less than 4 KiB.
    let fits = large.shared_bytes + 4096 <= shared_bytes_max;
    let many = args.shape.heads / args.shape.kv_heads >= large.rows;
    Some(Kernels {
        decode: if fits && many { large } else { small },
        prefill: if fits { large } else { small },
    })
}

/// Two launches at most.
pub(super) fn run(
    gpu: &Gpu,
    args: Attention<'_>,
    kernels: Kernels,
    params: AttentionParams,
) -> Result<(), OpError> {
    let (bounds, parts, shape) = (args.sequences.bounds(), args.sequences.parts(), args.shape);
    let sharing = shape.heads / shape.kv_heads;
    if bounds.splits > 0 {
        let tiles = (bounds.decode_rows * sharing).div_ceil(kernels.decode.rows);
        let along_y = blocks_along_y(shape.kv_heads.saturating_mul(tiles))?;
        let rows = bounds.partial_rows.saturating_mul(shape.heads);
        let counters = bounds.count.saturating_mul(along_y as usize);
        args.scratch.reserve(rows, args.value_dim, counters)?;
        let params = AttentionParams {
            work: parts.splits,
            partial: args.scratch.partial.all().ptr,
            states: args.scratch.states.all().ptr,
            counters: args.scratch.counters.all().ptr,
            ..params
        };
        launch(gpu, kernels.decode, fit(OP, "splits", bounds.splits)?, along_y, &params)?;
    }
    if !bounds.prefill_rows.is_empty() {
        let tiles = |rows: &usize| rows.saturating_mul(sharing).div_ceil(kernels.prefill.rows);
        let tiles = bounds.prefill_rows.iter().map(tiles).sum();
        let params =
            AttentionParams { work: parts.prefill, work_count: bounds.prefill_rows.len() as u32, ..params };
        let along_y = blocks_along_y(shape.kv_heads)?;
        launch(gpu, kernels.prefill, fit(OP, "tiles of rows", tiles)?, along_y, &params)?;
    }
    Ok(())
}

fn launch(
    gpu: &Gpu,
    blocks: Blocks,
    along_x: u32,
    along_y: u32,
    params: &AttentionParams,
) -> Result<(), OpError> {
    let Blocks { kernel, threads, shared_bytes, .. } = blocks;
    let grid = Grid { blocks: [along_x, along_y, 1], threads, shared_bytes: shared_bytes as u32 };
    // SAFETY: `checked` has compared every length with the shapes, and the slots of the sequences with those of the cache;
    // there is room for the partial results of all splits, and a counter for each sequence and block along y.
    unsafe { gpu.launch(OP, kernel, grid, params) }
}

fn blocks_along_y(blocks: usize) -> Result<u32, OpError> {
    const LIMIT: usize = 1 << 16;
    if blocks < LIMIT {
        Ok(blocks as u32)
    } else {
        Err(OpError::Index { op: OP, what: "block of heads", index: blocks, limit: LIMIT })
    }
}
