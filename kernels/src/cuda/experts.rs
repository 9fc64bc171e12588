//! A mixture of experts: see `kernels/cuda/experts.cu`.

use std::sync::Arc;

use super::activation::GatingParams;
use super::driver::DevicePtr;
use super::linear::numbers;
use super::params::{kernels, params};
use super::{Buffer, Element, Gpu, Grid, Kernel, OwnedMatrix, Routes, Slice, SliceMut, gemm, gemv};
use crate::error::{check_length, check_rows};
use crate::{Gating, OpError};

const OP: &str = "experts";
const SORT: Kernel = Kernel { module: "experts", name: "experts_sort" };
const GATE_UP_FEW: [Kernel; 3] = kernels!("experts", "experts_gate_up_few");
const DOWN_FEW: [Kernel; 3] = kernels!("experts", "experts_down_few");
const COMBINE: [Kernel; 3] = kernels!("experts", "experts_combine");
const THREADS: u32 = 256;

params! {
    struct ExpertEntry {
        weight: [DevicePtr; 3],
        bias: [DevicePtr; 3],
        stride: [u32; 3],
        unused: u32,
    }
}

params! {
    struct ExpertsParams {
        experts: DevicePtr,
        chosen: DevicePtr,
        weights: DevicePtr,
        input: DevicePtr,
        inner: DevicePtr,
        outer: DevicePtr,
        out: DevicePtr,
        sorted: DevicePtr,
        tiles: DevicePtr,
        tile_count: DevicePtr,
        tokens: u32,
        per_token: u32,
        count: u32,
        width: u32,
        inner_width: u32,
        tile_rows: u32,
        gating: u32,
        limit: f32,
        alpha: f32,
    }
}

/// A weight, `[outputs, inputs]`, with its bias, if it has one: `[outputs]`, f32.
pub type Projection = (OwnedMatrix, Option<Arc<Buffer>>);

/// A gated MLP that some of the tokens go through: `down(gating(gate(x), up(x)))`.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[I, H]`
    pub gate: Projection,
    /// `[I, H]`
    pub up: Projection,
    /// `[H, I]`
    pub down: Projection,
}

/// All experts of a layer. It keeps their weights.
#[derive(Debug)]
pub struct ExpertSet {
    /// An [`ExpertEntry`] for each.
    table: Buffer,
    weights: Vec<ExpertWeights>,
    element: Element,
    /// `H`
    width: usize,
    /// `I`
    inner: usize,
}

impl ExpertSet {
    /// A table of these experts on the device.
    ///
    /// Errors when they differ in their shapes or types, or have no inputs or no inner width.
    pub fn new(gpu: &Arc<Gpu>, weights: Vec<ExpertWeights>) -> Result<Self, OpError> {
        let shape = weights.first().map(|first| &first.gate.0);
        let (element, inner, width) =
            shape.map_or((Element::F32, 0, 0), |gate| (gate.memory.element(), gate.rows, gate.cols));
        if !weights.is_empty() && (inner == 0 || width == 0) {
            return Err(OpError::unsupported(OP, "experts without inputs or without an inner width"));
        }
        let mut table = Vec::with_capacity(weights.len() * size_of::<ExpertEntry>());
        for ExpertWeights { gate, up, down } in &weights {
            check_projection(element, gate, inner, width)?;
            check_projection(element, up, inner, width)?;
            check_projection(element, down, width, inner)?;
            let projections = [gate, up, down];
            let strides = numbers(OP, projections.map(|(weight, _)| ("stride of a weight", weight.stride)))?;
            let entry = ExpertEntry {
                weight: projections.map(|(weight, _)| weight.view().elements.ptr),
                bias: projections.map(|(_, bias)| Slice::ptr_or_null(bias.as_deref().map(Buffer::all))),
                stride: strides,
                unused: 0,
            };
            entry.write_to(&mut table);
        }
        Ok(Self { table: gpu.upload(&table)?, weights, element, width, inner })
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }
}

impl ExpertEntry {
    /// Its bytes as they lie in memory.
    fn write_to(&self, table: &mut Vec<u8>) {
        let Self { weight, bias, stride, unused } = self;
        table.extend(weight.iter().chain(bias).flat_map(|ptr| ptr.0.to_ne_bytes()));
        table.extend(stride.iter().chain([unused]).flat_map(|number| number.to_ne_bytes()));
    }
}

fn check_projection(
    element: Element,
    (weight, bias): &Projection,
    outputs: usize,
    inputs: usize,
) -> Result<(), OpError> {
    weight.view().check(OP, "weight", element)?;
    check_length(OP, "rows of a weight", outputs, weight.rows)?;
    check_length(OP, "columns of a weight", inputs, weight.cols)?;
    bias.as_ref().map_or(Ok(()), |bias| bias.all().check(OP, "bias", Element::F32, outputs))
}

/// Memory for what is between the input and the output of [`experts`]; it grows to what the largest call needs, up to a
/// limit, beyond which tokens go through the experts in several passes.
#[derive(Debug)]
pub struct ExpertScratch {
    gpu: Arc<Gpu>,
    /// Number of tiles, the sorted routes, the tiles.
    order: Buffer,
    /// `[routes, I]`
    inner: Buffer,
    /// `[routes, H]`
    outer: Buffer,
}

impl ExpertScratch {
    /// Bytes that a pass may take.
    const BYTES_MAX: usize = 256 << 20;

    /// No memory yet.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        let empty = |element| gpu.buffer(element, 0);
        let (order, inner, outer) = (empty(Element::U32)?, empty(Element::F32)?, empty(Element::F32)?);
        Ok(Self { gpu: gpu.clone(), order, inner, outer })
    }

    fn reserve(&mut self, element: Element, order: usize, inner: usize, outer: usize) -> Result<(), OpError> {
        let gpu = &self.gpu;
        let grow = |buffer: &mut Buffer, element, len| -> Result<(), OpError> {
            if buffer.element() != element || buffer.len() < len {
                *buffer = gpu.buffer(element, len)?;
            }
            Ok(())
        };
        grow(&mut self.order, Element::U32, order)?;
        grow(&mut self.inner, element, inner)?;
        grow(&mut self.outer, element, outer)
    }
}

/// Arguments of [`experts`].
#[derive(Debug)]
pub struct Experts<'a> {
    /// `[T, H]`
    pub input: Slice<'a>,
    /// Experts and weights of each token, as [`route`](super::route) chooses them.
    pub routes: &'a Routes,
    /// All experts of the layer, of the input's type.
    pub experts: &'a ExpertSet,
    /// What the gate does.
    pub gating: Gating,
    /// Memory that is kept from call to call.
    pub scratch: &'a mut ExpertScratch,
    /// `[T, H]`
    pub out: SliceMut<'a>,
}

/// `out[t] = sum over j, in this order, of weights[t, j] * expert(input[t])` with the expert `experts[t, j]` of the
/// routes. Experts that no token goes to are not touched. A token has the same bits whatever the others are.
///
/// Errors when the routes are those of other tokens or of another number of experts.
pub fn experts(gpu: &Gpu, args: Experts<'_>) -> Result<(), OpError> {
    let Experts { input, routes, experts, gating, scratch, mut out } = args;
    let (width, per_token) = (experts.width, routes.chosen());
    out.check(OP, "out", experts.element, input.len())?;
    input.check(OP, "input", experts.element, input.len())?;
    let tokens = check_rows(OP, "input", width, input.len())?;
    check_length(OP, "tokens of the routes", tokens, routes.tokens())?;
    if tokens == 0 {
        return Ok(());
    }
    check_length(OP, "experts of the routes", routes.of(), experts.len())?;
    let gating = GatingParams::new(OP, gating)?;
    let bytes = per_token * (width + experts.inner) * experts.element.size();
    let together = (ExpertScratch::BYTES_MAX / bytes).clamp(1, Grid::ACROSS_MAX as usize / per_token);
    for first in (0..tokens).step_by(together) {
        let last = tokens.min(first + together);
        let pass = Pass {
            gpu,
            experts,
            gating,
            input: input.slice(first * width..last * width),
            chosen: routes.experts().slice(first * per_token..last * per_token),
            weights: routes.weights().slice(first * per_token..last * per_token),
            tokens: last - first,
            per_token,
        };
        pass.run(scratch, out.slice_mut(first * width..last * width))?;
    }
    Ok(())
}

/// Tokens that go through the experts together. All shapes are right, and there are tokens.
#[derive(Clone, Copy)]
struct Pass<'a> {
    gpu: &'a Gpu,
    experts: &'a ExpertSet,
    gating: GatingParams,
    input: Slice<'a>,
    chosen: Slice<'a>,
    weights: Slice<'a>,
    tokens: usize,
    per_token: usize,
}

/// The kernels for tiles of so many rows, and the outputs that a block of them has.
struct TileKernels {
    rows: usize,
    gate_up: (&'static str, usize),
    down: (&'static str, usize),
}

impl Pass<'_> {
    fn run(&self, scratch: &mut ExpertScratch, mut out: SliceMut<'_>) -> Result<(), OpError> {
        let Self { experts, tokens, .. } = *self;
        let routes = tokens * self.per_token;
        let tiles = self.tile_kernels();
        // Each expert has at most one tile that is not full.
        let tiles_max = routes.min(experts.len()) + routes / tiles.rows;
        let (width, inner) = (experts.width, experts.inner);
        scratch.reserve(
            experts.element,
            1 + routes + TILE_WORDS * tiles_max,
            routes * inner,
            routes * width,
        )?;
        let params = self.params(scratch, &mut out, routes, tiles.rows)?;
        // A route's weights are read for it alone, which costs little as long as most routes lead to different experts.
        if tokens <= 2 || 2 * routes <= experts.len() {
            return self.run_few(&params, routes);
        }
        self.run_many(&params, &tiles, tiles_max)
    }

    fn params(
        &self,
        scratch: &mut ExpertScratch,
        out: &mut SliceMut<'_>,
        routes: usize,
        tile_rows: usize,
    ) -> Result<ExpertsParams, OpError> {
        let Self { experts, gating, .. } = *self;
        let [tokens, per_token, count, width, inner_width] = numbers(
            OP,
            [
                ("tokens", self.tokens),
                ("experts of a token", self.per_token),
                ("experts", experts.len()),
                ("width", experts.width),
                ("inner width", experts.inner),
            ],
        )?;
        let order = scratch.order.all_mut();
        let after = |words: usize| order.as_slice().slice(words..order.len()).ptr;
        Ok(ExpertsParams {
            experts: experts.table.all().ptr,
            chosen: self.chosen.ptr,
            weights: self.weights.ptr,
            input: self.input.ptr,
            inner: scratch.inner.all_mut().ptr,
            outer: scratch.outer.all_mut().ptr,
            out: out.ptr,
            sorted: after(1),
            tiles: after(1 + routes),
            tile_count: after(0),
            tokens,
            per_token,
            count,
            width,
            inner_width,
            tile_rows: tile_rows as u32,
            gating: gating.number,
            limit: gating.limit,
            alpha: gating.alpha,
        })
    }

    fn run_few(&self, params: &ExpertsParams, routes: usize) -> Result<(), OpError> {
        let Self { gpu, experts, tokens, .. } = *self;
        let (width, inner) = (experts.width, experts.inner);
        let grid = |outputs: usize, rows: usize, inputs: usize, tiles: u32| Grid {
            blocks: [outputs.div_ceil(8) as u32, rows as u32, 1],
            threads: gemv::threads(inputs),
            shared_bytes: gemv::ring_bytes(inputs, tiles),
        };
        let kernel = Gpu::pick(OP, experts.element, GATE_UP_FEW)?;
        // SAFETY: the routes lead to experts of the table; all rows have the lengths that `params` says.
        unsafe { gpu.launch(OP, kernel, grid(inner, routes, width, 2), params)? };
        let kernel = Gpu::pick(OP, experts.element, DOWN_FEW)?;
        // SAFETY: the same.
        unsafe { gpu.launch(OP, kernel, grid(width, tokens, inner, 1), params) }
    }

    fn run_many(&self, params: &ExpertsParams, tiles: &TileKernels, tiles_max: usize) -> Result<(), OpError> {
        let Self { gpu, experts, tokens, .. } = *self;
        let (width, inner) = (experts.width, experts.inner);
        let counts = experts.len() * size_of::<u32>();
        if counts > gpu.properties().shared_bytes_max as usize {
            return Err(OpError::unsupported(OP, format!("{} experts", experts.len())));
        }
        let sort = Grid::linear(experts.len().div_ceil(THREADS as usize / 32) as u32, THREADS);
        // SAFETY: there is room for all routes, and for as many tiles as there can be.
        unsafe { gpu.launch(OP, SORT, Grid { shared_bytes: counts as u32, ..sort }, params)? };
        for ((name, outputs_of_block), outputs, inputs) in
            [(tiles.gate_up, inner, width), (tiles.down, width, inner)]
        {
            let (threads, shared_bytes) = match experts.element {
                Element::F32 => (gemv::threads(inputs), gemv::ring_bytes(inputs, 2)),
                _ => (gemm::THREADS, gemm::tile_bytes(tiles.rows)),
            };
            let blocks = [outputs.div_ceil(outputs_of_block) as u32, tiles_max as u32, 1];
            let kernel = Kernel { module: "experts", name };
            // SAFETY: the tiles are of routes of this pass; all rows have the lengths that `params` says.
            unsafe { gpu.launch(OP, kernel, Grid { blocks, threads, shared_bytes }, params)? };
        }
        let kernel = Gpu::pick(OP, experts.element, COMBINE)?;
        // SAFETY: there are as many tokens, whose routes all have outputs.
        unsafe { gpu.launch(OP, kernel, Grid::linear(tokens as u32, THREADS), params) }
    }

    /// The larger tile, if experts have enough rows on average to fill half of it.
    fn tile_kernels(&self) -> TileKernels {
        let few = self.tokens * self.per_token < 64 * self.experts.len();
        macro_rules! tiles {
            ($rows:literal, $gate_up:literal, $down:literal, $suffix:literal) => {
                TileKernels {
                    rows: $rows,
                    gate_up: (concat!("experts_gate_up_", $suffix), $gate_up),
                    down: (concat!("experts_down_", $suffix), $down),
                }
            };
        }
        match (self.experts.element, few) {
            (Element::F16, true) => tiles!(32, 64, 128, "32_f16"),
            (Element::F16, false) => tiles!(128, 64, 128, "128_f16"),
            (Element::BF16, true) => tiles!(32, 64, 128, "32_bf16"),
            (Element::BF16, false) => tiles!(128, 64, 128, "128_bf16"),
            _ => tiles!(16, 8, 16, "f32"),
        }
    }
}

/// Words of a tile.
const TILE_WORDS: usize = 3;
