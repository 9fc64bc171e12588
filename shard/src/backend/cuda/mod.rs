//! The operations on NVIDIA GPUs: tensors become slices of the device's memory, and the kernels do the work.

mod sampling;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};
use kernels::collective::LocalGroup;
use kernels::cuda::{
    self, Buffer, Element, Gpu, HostElement, OwnedMatrix, Piece, Slab, Slice, SliceMut, Uploader, Values,
};
use kernels::{Activation, DType, Gating, OpError};

pub(super) use sampling::DeviceSampling;
pub(super) use sampling::{choose, row_logprobs, sampling_state};

use super::tensor::{Storage, element_count, rows_of};
use super::{
    Attention, AttentionRules, AttentionScratch, CopyParts, DeviceMemory, Expert, ExpertScratch, ExpertSet,
    Experts, Indices, Link, LowRank, Matrix, MatrixStorage, Norm, Product, Projection, RopeAngles,
    RopeCacheWrite, Routes, Routing, SequenceBuffer, Tensor,
};
use crate::weights::Weight;

/// Small weights share pieces of memory, since a driver's pages are 2 MiB. The pieces become larger as there are more.
const SLAB_BYTES_FIRST: usize = 1 << 20;
const SLAB_BYTES_MAX: usize = 32 << 20;

/// The slab that is being filled, and how large the next one will be.
#[derive(Debug)]
struct Slabs {
    current: Option<Slab>,
    bytes: usize,
}

impl Default for Slabs {
    fn default() -> Self {
        Self { current: None, bytes: SLAB_BYTES_FIRST }
    }
}

/// Pinned memory that weights come through: enough for several copies to be under way while the next chunk is filled.
const UPLOAD_CHUNK_BYTES: usize = 8 << 20;
const UPLOAD_CHUNKS: usize = 4;

/// A GPU, and the types that a model on it computes with.
#[derive(Debug)]
pub struct Cuda {
    gpu: Arc<Gpu>,
    /// Of weights, and of what flows through the layers.
    dtype: DType,
    /// Of keys and values.
    cache: Element,
    /// What the next weights lie in.
    slabs: Mutex<Slabs>,
    /// What weights come through while they are loaded.
    uploads: Mutex<Option<Uploader>>,
    /// Between the two products of an adapter. Locked by the one thread that launches, so nobody waits.
    inner: Mutex<Buffer>,
}

impl Cuda {
    /// A model on this GPU has weights and activations of `dtype`, and keys and values of `cache`.
    ///
    /// Errors when the GPU has failed.
    pub fn new(gpu: Arc<Gpu>, dtype: DType, cache: Element) -> Result<Self, OpError> {
        let inner = Mutex::new(gpu.buffer(Element::F32, 0)?);
        Ok(Self { gpu, dtype, cache, slabs: Mutex::default(), uploads: Mutex::default(), inner })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Memory for a weight: from the slab that is being filled, from a new one, or, where it is large, its own.
    fn piece(&self, element: Element, len: usize) -> Result<Piece, OpError> {
        let mut slabs = self.slabs.lock().expect("no thread panics while it holds the lock");
        if let Some(piece) = slabs.current.as_mut().and_then(|slab| slab.take(len)) {
            return Ok(piece);
        }
        if len > SLAB_BYTES_MAX / element.size() / 4 {
            return Ok(self.gpu.buffer(element, len)?.into());
        }
        let room = (slabs.bytes / element.size()).max(len);
        let mut slab = Slab::new(&self.gpu, element, room)?;
        let piece = slab.take(len).expect("there is room for it");
        *slabs = Slabs { current: Some(slab), bytes: SLAB_BYTES_MAX.min(2 * slabs.bytes) };
        Ok(piece)
    }

    fn tensor(&self, element: Element, rows: usize, width: usize) -> Result<Tensor, OpError> {
        let mut buffer = self.gpu.buffer(element, element_count(rows, width)?)?;
        buffer.fill(0)?;
        let storage = Storage::Device(DeviceTensor { gpu: self.gpu.clone(), buffer });
        Ok(Tensor { storage, rows, width })
    }
}

/// A tensor's elements in a GPU's memory.
#[derive(Debug)]
pub(super) struct DeviceTensor {
    gpu: Arc<Gpu>,
    /// At least as many elements as the tensor has.
    buffer: Buffer,
}

impl DeviceTensor {
    /// Makes room; what was there is lost where there was too little.
    pub(super) fn grow(&mut self, length: usize) -> Result<(), OpError> {
        if length > self.buffer.len() {
            self.buffer = self.gpu.buffer(self.buffer.element(), length)?;
        }
        Ok(())
    }

    pub(super) fn read(&self, length: usize) -> Result<Vec<f32>, OpError> {
        fn read<T: HostElement>(
            buffer: &Buffer,
            length: usize,
            to_f32: fn(T) -> f32,
        ) -> Result<Vec<f32>, OpError> {
            let mut elements = vec![T::default(); length];
            buffer.read_into(0, &mut elements)?;
            Ok(elements.into_iter().map(to_f32).collect())
        }
        match self.buffer.element() {
            Element::F32 => read::<f32>(&self.buffer, length, |element| element),
            Element::F16 => read(&self.buffer, length, f16::to_f32),
            Element::BF16 => read(&self.buffer, length, bf16::to_f32),
            element => {
                let reason = format!("a tensor of {element:?} is not for reading");
                Err(OpError::Unsupported { op: "read", reason })
            }
        }
    }
}

/// Ids, positions, slots or rows of a step in a GPU's memory.
#[derive(Debug)]
pub(super) struct DeviceIndices {
    gpu: Arc<Gpu>,
    buffer: Buffer,
    len: usize,
}

impl DeviceIndices {
    pub(super) fn set(&mut self, values: &[u32]) -> Result<(), OpError> {
        if values.len() > self.buffer.len() {
            self.buffer = self.gpu.buffer(Element::U32, values.len().next_power_of_two())?;
        }
        self.len = values.len();
        self.buffer.write(0, values)
    }
}

const FOREIGN: &str = "what is on a CPU reached an operation of a GPU";

impl Tensor {
    /// The elements, of a tensor of a GPU.
    pub(super) fn device(&self) -> Slice<'_> {
        let Storage::Device(tensor) = &self.storage else { unreachable!("{FOREIGN}") };
        tensor.buffer.slice(0..self.len())
    }

    /// The elements, of a tensor of a GPU, to be written.
    pub(super) fn device_mut(&mut self) -> SliceMut<'_> {
        let length = self.len();
        let Storage::Device(tensor) = &mut self.storage else { unreachable!("{FOREIGN}") };
        tensor.buffer.slice_mut(0..length)
    }

    fn into_buffer(self) -> Arc<Buffer> {
        let Storage::Device(tensor) = self.storage else { unreachable!("{FOREIGN}") };
        Arc::new(tensor.buffer)
    }
}

impl Matrix {
    fn device(&self) -> cuda::Matrix<'_> {
        let MatrixStorage::Device(matrix) = &self.0 else { unreachable!("{FOREIGN}") };
        matrix.view()
    }

    fn into_device(self) -> OwnedMatrix {
        let MatrixStorage::Device(matrix) = self.0 else { unreachable!("{FOREIGN}") };
        matrix
    }
}

impl Indices {
    fn on_device(&self) -> Slice<'_> {
        let device = self.device.as_ref().expect(FOREIGN);
        device.buffer.slice(0..device.len)
    }
}

pub(super) fn link(device: &Cuda, group: &Arc<LocalGroup>) -> Result<Link, OpError> {
    let comm = cuda::comm::connect(&device.gpu, group)?;
    tracing::info!(by = comm.description(), "GPUs are connected");
    Ok(Link::Device(comm))
}

pub(super) fn zeros(device: &Cuda, rows: usize, width: usize) -> Result<Tensor, OpError> {
    device.tensor(device.dtype.into(), rows, width)
}

pub(super) fn zeros_f32(device: &Cuda, rows: usize, width: usize) -> Result<Tensor, OpError> {
    device.tensor(Element::F32, rows, width)
}

pub(super) fn zeros_cache(device: &Cuda, rows: usize, width: usize) -> Result<Tensor, OpError> {
    device.tensor(device.cache, rows, width)
}

pub(super) fn upload(device: &Cuda, elements: Vec<f32>, width: usize) -> Result<Tensor, OpError> {
    let rows = rows_of(elements.len(), width)?;
    let buffer = device.gpu.upload(&elements)?;
    let storage = Storage::Device(DeviceTensor { gpu: device.gpu.clone(), buffer });
    Ok(Tensor { storage, rows, width })
}

/// Rows are converted to the model's type, and begin at multiples of 16 bytes. They are on their way when this returns:
/// [`settle`] waits for them.
pub(super) fn place(device: &Cuda, weight: Weight) -> Result<Matrix, OpError> {
    let ([rows, cols], element) = (weight.shape(), device.dtype.into());
    let stride = OwnedMatrix::stride_of(element, cols);
    let mut piece = device.piece(element, element_count(rows, stride)?)?;
    if stride > cols {
        piece.fill(0)?;
    }
    let owned = |piece| OwnedMatrix { memory: Arc::new(piece), rows, cols, stride };
    if !device.gpu.stores() {
        return Ok(Matrix(MatrixStorage::Device(owned(piece))));
    }
    let mut uploads = device.uploads.lock().expect("no thread panics while it holds the lock");
    let uploader = match &mut *uploads {
        Some(uploader) => uploader,
        none => none.insert(Uploader::new(&device.gpu, UPLOAD_CHUNK_BYTES, UPLOAD_CHUNKS)?),
    };
    uploader.rows(piece.all_mut(), 0, stride, weight.matrix())?;
    Ok(Matrix(MatrixStorage::Device(owned(piece))))
}

/// Waits for the weights, and gives the memory back that they came through. What is loaded later has slabs of its own, so
/// that those of an adapter go with it.
pub(super) fn settle(device: &Cuda) -> Result<(), OpError> {
    *device.slabs.lock().expect("no thread panics while it holds the lock") = Slabs::default();
    let uploads = device.uploads.lock().expect("no thread panics while it holds the lock").take();
    uploads.map_or(Ok(()), |mut uploads| uploads.finish())
}

pub(super) fn expert_set(device: &Cuda, experts: Vec<Expert>) -> Result<ExpertSet, OpError> {
    let part =
        |Projection { weight, bias }: Projection| (weight.into_device(), bias.map(Tensor::into_buffer));
    let experts = experts
        .into_iter()
        .map(|Expert { gate, up, down }| cuda::ExpertWeights {
            gate: part(gate),
            up: part(up),
            down: part(down),
        })
        .collect();
    Ok(ExpertSet::Device(cuda::ExpertSet::new(&device.gpu, experts)?))
}

pub(super) fn indices(device: &Cuda) -> Indices {
    let buffer = device.gpu.buffer(Element::U32, 0).expect("no memory is enough memory for nothing");
    let device = DeviceIndices { gpu: device.gpu.clone(), buffer, len: 0 };
    Indices { host: Vec::new(), device: Some(device) }
}

pub(super) fn sequences(device: &Cuda) -> Result<SequenceBuffer, OpError> {
    Ok(SequenceBuffer { device: Some(cuda::Sequences::new(&device.gpu)?) })
}

pub(super) fn attention_scratch(device: &Cuda) -> Result<AttentionScratch, OpError> {
    Ok(AttentionScratch::Device(cuda::AttentionScratch::new(&device.gpu)?))
}

pub(super) fn routes(device: &Cuda) -> Result<Routes, OpError> {
    Ok(Routes::Device(cuda::Routes::new(&device.gpu)?))
}

pub(super) fn expert_scratch(device: &Cuda) -> Result<ExpertScratch, OpError> {
    Ok(ExpertScratch::Device(cuda::ExpertScratch::new(&device.gpu)?))
}

pub(super) fn cache_element_bytes(device: &Cuda) -> usize {
    device.cache.size()
}

pub(super) fn memory(device: &Cuda) -> Result<Option<DeviceMemory>, OpError> {
    let cuda::Memory { free, total } = device.gpu.memory()?;
    Ok(Some(DeviceMemory { free: free as u64, total: total as u64 }))
}

/// A GPU runs the largest step in a moment: all of it, so that what is ready has been proven. An emulated one does not.
pub(super) fn rehearsal_tokens(device: &Cuda) -> usize {
    match device.gpu.properties().capability {
        (0, _) => 3,
        _ => usize::MAX,
    }
}

/// All weights have the model's type.
pub(super) fn weight_dtype(device: &Cuda, _: DType) -> DType {
    device.dtype
}

pub(super) fn embedding(
    device: &Cuda,
    table: &Matrix,
    first: u32,
    ids: &Indices,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cuda::embedding(&device.gpu, table.device(), first, ids.on_device(), out.device_mut())
}

pub(super) fn add_embedding(
    device: &Cuda,
    table: &Matrix,
    ids: &Indices,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cuda::add_embedding(&device.gpu, table.device(), ids.on_device(), out.device_mut())
}

pub(super) fn linear<const N: usize>(
    device: &Cuda,
    input: &Tensor,
    products: [Product<'_>; N],
) -> Result<(), OpError> {
    let mut products = products.map(|Product { weight, bias, out }| cuda::Product {
        weight: weight.device(),
        bias: bias.map(Tensor::device),
        out: out.device_mut(),
        add: false,
    });
    cuda::linear(&device.gpu, input.device(), &mut products)
}

pub(super) fn linear_per_head(
    device: &Cuda,
    heads: usize,
    input: &Tensor,
    weight: &Matrix,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cuda::linear_per_head(&device.gpu, heads, input.device(), weight.device(), out.device_mut())
}

pub(super) fn add_low_rank(device: &Cuda, args: LowRank<'_>) -> Result<(), OpError> {
    const OP: &str = "add_low_rank";
    let LowRank { rows, a, b, scale, input, out } = args;
    check_rows(OP, &rows, input.rows().min(out.rows()))?;
    let mut inner = device.inner.lock().expect("no thread panics while it holds the lock");
    let length = rows.len() * a.shape()[0];
    if length > inner.len() {
        *inner = device.gpu.buffer(Element::F32, length)?;
    }
    let (inputs, outputs) = (input.width(), out.width());
    cuda::add_low_rank(
        &device.gpu,
        cuda::LowRank {
            a: a.device(),
            b: b.device(),
            scale,
            input: input.device().slice(rows.start * inputs..rows.end * inputs),
            inner: inner.slice_mut(0..length),
            out: out.device_mut().slice_mut(rows.start * outputs..rows.end * outputs),
        },
    )
}

pub(super) fn add_bias(
    device: &Cuda,
    rows: Range<usize>,
    bias: &Tensor,
    out: &mut Tensor,
) -> Result<(), OpError> {
    check_rows("add_bias", &rows, out.rows())?;
    let width = out.width();
    let mut out = out.device_mut();
    cuda::add_bias(&device.gpu, out.slice_mut(rows.start * width..rows.end * width), bias.device())
}

fn check_rows(op: &'static str, rows: &Range<usize>, limit: usize) -> Result<(), OpError> {
    if rows.start > rows.end || rows.end > limit {
        return Err(OpError::Index { op, what: "row", index: rows.end, limit });
    }
    Ok(())
}

pub(super) fn norm(device: &Cuda, x: &Tensor, norm: Norm<'_>, out: &mut Tensor) -> Result<(), OpError> {
    cuda::norm(&device.gpu, x.device(), norm.on_device(), out.device_mut())
}

pub(super) fn norm_in_place(device: &Cuda, x: &mut Tensor, norm: Norm<'_>) -> Result<(), OpError> {
    cuda::norm_in_place(&device.gpu, x.device_mut(), norm.on_device())
}

pub(super) fn add_norm(
    device: &Cuda,
    residual: &mut Tensor,
    delta: &Tensor,
    norm: Norm<'_>,
    out: &mut Tensor,
) -> Result<(), OpError> {
    let norm = norm.on_device();
    cuda::add_norm(&device.gpu, residual.device_mut(), delta.device(), norm, out.device_mut())
}

impl<'a> Norm<'a> {
    fn on_device(self) -> cuda::Norm<'a> {
        cuda::Norm {
            kind: self.kind,
            width: self.width,
            weight: self.weight.map(Tensor::device),
            bias: self.bias.map(Tensor::device),
            eps: self.eps,
        }
    }
}

pub(super) fn rope_cache_write(device: &Cuda, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    let table = args.angles.map(|RopeAngles { cos, sin, rows, rotary_dim, start, layout }| cuda::RopeTable {
        cos: cos.device(),
        sin: sin.device(),
        angles: rows.on_device(),
        rotary_dim,
        start,
        layout,
    });
    cuda::rope_cache_write(
        &device.gpu,
        cuda::RopeCacheWrite {
            table,
            shape: args.heads,
            slots: args.slots.on_device(),
            query: args.query.device_mut(),
            key: args.key.device_mut(),
            value: args.value.map(Tensor::device),
            value_width: args.value.map_or(0, Tensor::width),
            keys: args.cache.keys.device_mut(),
            values: args.cache.values.device_mut(),
        },
    )
}

pub(super) fn attention(device: &Cuda, args: Attention<'_>) -> Result<(), OpError> {
    let AttentionRules { window, soft_cap, slopes, sinks } = args.rules;
    let values = match args.cache.values.width() {
        0 => Values::InKeys,
        _ => Values::Own(args.cache.values.device()),
    };
    let AttentionScratch::Device(scratch) = args.scratch else { unreachable!("{FOREIGN}") };
    cuda::attention(
        &device.gpu,
        cuda::Attention {
            shape: args.heads,
            value_dim: args.value_dim,
            scale: args.scale,
            rules: cuda::AttentionRules {
                window,
                soft_cap,
                slopes: slopes.map(Tensor::device),
                sinks: sinks.map(Tensor::device),
            },
            query: args.query.device(),
            keys: args.cache.keys.device(),
            values,
            sequences: args.sequences.buffer.device.as_ref().expect(FOREIGN),
            scratch,
            out: args.out.device_mut(),
        },
    )
}

pub(super) fn activate(device: &Cuda, activation: Activation, x: &mut Tensor) -> Result<(), OpError> {
    cuda::activate(&device.gpu, activation, x.device_mut())
}

pub(super) fn gated(device: &Cuda, gating: Gating, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
    cuda::gated(&device.gpu, gating, gate.device_mut(), up.device())
}

pub(super) fn scale(device: &Cuda, x: &mut Tensor, factor: f32) -> Result<(), OpError> {
    cuda::scale(&device.gpu, x.device_mut(), factor)
}

pub(super) fn scale_rows(device: &Cuda, x: &mut Tensor, gate: &Tensor) -> Result<(), OpError> {
    cuda::scale_rows(&device.gpu, x.device_mut(), gate.device())
}

pub(super) fn add(device: &Cuda, x: &mut Tensor, delta: &Tensor) -> Result<(), OpError> {
    cuda::add(&device.gpu, x.device_mut(), delta.device())
}

pub(super) fn enter_stream(device: &Cuda, x: &mut Tensor, stream: &mut Tensor) -> Result<(), OpError> {
    if device.dtype == DType::F32 {
        std::mem::swap(x, stream);
        return Ok(());
    }
    cuda::convert(&device.gpu, x.device(), stream.device_mut())
}

pub(super) fn from_stream<'a>(
    device: &Cuda,
    stream: &'a Tensor,
    x: &'a mut Tensor,
) -> Result<&'a Tensor, OpError> {
    if device.dtype == DType::F32 {
        return Ok(stream);
    }
    cuda::convert(&device.gpu, stream.device(), x.device_mut())?;
    Ok(x)
}

pub(super) fn clamp(device: &Cuda, x: &mut Tensor, limit: f32) -> Result<(), OpError> {
    cuda::clamp(&device.gpu, x.device_mut(), limit)
}

pub(super) fn soft_cap(device: &Cuda, x: &mut Tensor, cap: f32) -> Result<(), OpError> {
    cuda::soft_cap(&device.gpu, x.device_mut(), cap)
}

pub(super) fn route(
    device: &Cuda,
    scores: &Tensor,
    routing: &Routing<'_>,
    routes: &mut Routes,
) -> Result<(), OpError> {
    let Routing { experts, chosen, score, groups, correction, normalize, scale } = *routing;
    let correction = correction.map(Tensor::device);
    let routing = cuda::Routing { experts, chosen, score, groups, correction, normalize, scale };
    let Routes::Device(routes) = routes else { unreachable!("{FOREIGN}") };
    cuda::route(&device.gpu, scores.device(), &routing, routes)
}

pub(super) fn experts(device: &Cuda, args: Experts<'_>) -> Result<(), OpError> {
    let Experts { input, routes, experts, gating, scratch, out } = args;
    let (Routes::Device(routes), ExpertSet::Device(experts), ExpertScratch::Device(scratch)) =
        (routes, experts, scratch)
    else {
        unreachable!("{FOREIGN}")
    };
    let (input, out) = (input.device(), out.device_mut());
    cuda::experts(&device.gpu, cuda::Experts { input, routes, experts, gating, scratch, out })
}

pub(super) fn copy_parts(device: &Cuda, args: CopyParts<'_>) -> Result<(), OpError> {
    let CopyParts { parts, from, out_of, to, into, width } = args;
    if from.rows() != to.rows() {
        let (expected, found) = (from.rows(), to.rows());
        return Err(OpError::Length { op: "copy_parts", what: "rows", expected, found });
    }
    let rows = from.rows();
    let (from, to) = (from.device(), to.device_mut());
    cuda::copy_parts(&device.gpu, cuda::CopyParts { rows, parts, from, out_of, to, into, width })
}

pub(super) fn select_rows(
    device: &Cuda,
    x: &Tensor,
    rows: &Indices,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cuda::select_rows(&device.gpu, x.device(), x.width(), rows.on_device(), out.device_mut())
}
