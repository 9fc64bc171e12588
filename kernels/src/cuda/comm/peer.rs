use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::patrol::Patrol;
use super::{Comm, agree, check_float, columns, failed};
use crate::OpError;
use crate::collective::LocalGroup;
use crate::cuda::driver::DevicePtr;
use crate::cuda::params::{fit, kernels, params};
use crate::cuda::transfer::Pinned;
use crate::cuda::{Buffer, Element, Gpu, Grid, Kernel, Slice, SliceMut};

const ALL_REDUCE: &str = "all_reduce";
const ALL_GATHER: &str = "all_gather_columns";
const CONNECT: &str = "connect ranks";

const REDUCE: [Kernel; 3] = kernels!("all_reduce", "all_reduce");
const GATHER: [Kernel; 3] = kernels!("all_reduce", "all_gather");

// As in the kernels' file.
const THREADS_MAX: usize = 512;
const RANKS_MAX: usize = 8;
const FLAGS_BYTES: usize = 64 * RANKS_MAX * 4;

/// Most blocks. More do not read faster from the others, and each has to be waited for: vLLM's custom all-reduce has
/// found 36 the best on an A100, and 512 threads.
const BLOCKS_MAX: usize = 36;

/// What a process shares is shared whole, in pages of this size.
const SHARED_UNIT: usize = 2 << 20;

params! {
    struct GroupParams {
        of: [DevicePtr; RANKS_MAX],
        round: DevicePtr,
        given_up: DevicePtr,
        slot_bytes: u32,
        rank: u32,
        world: u32,
        reserved: u32,
    }
}

params! {
    struct AllReduceParams {
        group: GroupParams,
        data: DevicePtr,
        len: u32,
        two_steps: u32,
    }
}

params! {
    struct AllGatherParams {
        group: GroupParams,
        own: DevicePtr,
        out: DevicePtr,
        begins: [u32; RANKS_MAX + 1],
        rows: u32,
        first: u32,
        count: u32,
    }
}

/// Which sizes are dealt with how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerLimits {
    /// What a rank can show the others at once. Longer calls go to the library, or piece by piece where there is none.
    pub slot_bytes: usize,
    /// From so many bytes on, a rank sums a part and reads the others' sums: it reads less, and waits twice.
    pub two_step_bytes: usize,
}

impl PeerLimits {
    /// For so many ranks. Where two steps pay off is what vLLM's custom all-reduce has found with NVLink: never for two
    /// ranks, which read as much either way.
    pub fn of(world: usize) -> Self {
        let two_step_bytes = match world {
            0..=2 => usize::MAX,
            3..=4 => 512 << 10,
            _ => 256 << 10,
        };
        Self { slot_bytes: 8 << 20, two_step_bytes }
    }
}

/// Ranks that read each other's memory. See `kernels/cuda/all_reduce.cu` for how they wait for each other.
#[derive(Debug)]
pub struct Peer {
    gpu: Arc<Gpu>,
    group: Arc<LocalGroup>,
    limits: PeerLimits,
    params: GroupParams,
    blocks_max: usize,
    /// For what is longer than a slot.
    library: Option<Arc<dyn Comm>>,
    given_up: Arc<Word>,
    /// Stopped when the device is done.
    patrol: Option<Patrol>,
}

/// A number in the host's memory that the device looks at.
#[derive(Debug)]
struct Word(Pinned);

impl Word {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        let word = Self(Pinned::new(gpu, size_of::<AtomicU32>())?);
        word.number().store(0, Ordering::SeqCst);
        Ok(word)
    }

    fn number(&self) -> &AtomicU32 {
        // SAFETY: pinned memory is aligned, initialised, as long, and stays as long as `self`.
        unsafe { self.0.ptr().cast().as_ref() }
    }
}

/// What a rank tells the others of its memory.
#[derive(Clone, Copy, Debug)]
struct Offer {
    process: u64,
    device: u64,
    address: u64,
    multiprocessors: u64,
    handle: [u8; 64],
}

impl Offer {
    const LEN: usize = 4 * 8 + 64;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.process, self.device, self.address, self.multiprocessors];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes[32..].copy_from_slice(&self.handle);
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let (words, _) = bytes.as_chunks();
        let word = |index: usize| u64::from_le_bytes(words[index]);
        let mut handle = [0; 64];
        handle.copy_from_slice(&bytes[32..]);
        Self { process: word(0), device: word(1), address: word(2), multiprocessors: word(3), handle }
    }
}

impl Peer {
    /// Shares memory with all other ranks. None when the device of some rank does not reach that of another.
    ///
    /// What is longer than a slot goes to `library`, which is there on all ranks or on none.
    ///
    /// Errors when the group or the device fails, or there is no memory.
    pub fn new(
        gpu: &Arc<Gpu>,
        group: &Arc<LocalGroup>,
        limits: PeerLimits,
        library: Option<Arc<dyn Comm>>,
    ) -> Result<Option<Self>, OpError> {
        let world = group.world();
        if world > RANKS_MAX {
            return Ok(None);
        }
        let slot_bytes = limits.slot_bytes.clamp(16, 1 << 30).next_multiple_of(16);
        let bytes = (FLAGS_BYTES + 2 * slot_bytes).next_multiple_of(SHARED_UNIT);
        let mut memory = gpu.buffer(Element::U8, bytes)?;
        let mut round = gpu.buffer(Element::U32, 2)?;
        memory.fill(0)?;
        round.fill(0)?;
        // Before anybody gets to know of it.
        gpu.synchronize()?;
        let ours = offer(gpu, &memory);
        let offers = exchange(group, ours.as_ref().ok())?;
        let Some(offers) = offers else { return Ok(None) };
        let of = import(gpu, group.rank(), &memory, &offers);
        let of = of.and_then(|of| mark(gpu, group.rank(), &of).map(|()| of));
        if !agree(CONNECT, group, of.is_ok())? {
            return Ok(None);
        }
        let of = of?;
        let seen = of.iter().enumerate().try_for_each(|(rank, memory)| look_for_mark(gpu, rank, *memory));
        if !agree(CONNECT, group, seen.is_ok())? {
            return Ok(None);
        }
        let mut params = GroupParams {
            of: [DevicePtr::NULL; RANKS_MAX],
            round: round.all().ptr,
            given_up: DevicePtr::NULL,
            slot_bytes: slot_bytes as u32,
            rank: group.rank() as u32,
            world: world as u32,
            reserved: 0,
        };
        params.of[..world].copy_from_slice(&of);
        // Others may be reading at any time from now on, graphs may be replayed later: it stays as long as the process.
        let given_up = Arc::new(Word::new(gpu)?);
        std::mem::forget((memory, round, given_up.clone()));
        params.given_up = DevicePtr(given_up.0.ptr().as_ptr().expose_provenance() as u64);
        let multiprocessors = offers.iter().map(|offer| offer.multiprocessors as usize).min().unwrap_or(1);
        let word = given_up.clone();
        let patrol = Patrol::start(group, move || word.number().store(1, Ordering::SeqCst));
        Ok(Some(Self {
            gpu: gpu.clone(),
            group: group.clone(),
            limits: PeerLimits { slot_bytes, ..limits },
            params,
            blocks_max: multiprocessors.clamp(1, BLOCKS_MAX),
            library,
            given_up,
            patrol: Some(patrol),
        }))
    }

    /// Threads for so many vectors, the same on every rank.
    fn grid(&self, vectors: usize) -> Grid {
        let threads = vectors.next_multiple_of(32).clamp(32, THREADS_MAX);
        Grid::linear(vectors.div_ceil(THREADS_MAX).clamp(1, self.blocks_max) as u32, threads as u32)
    }

    /// Elements that a slot holds.
    fn capacity(&self, element: Element) -> usize {
        self.limits.slot_bytes / element.size()
    }

    /// An error once the group has failed: the device would only wait.
    fn check_group(&self, op: &'static str) -> Result<(), OpError> {
        if self.given_up.number().load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        match self.group.check() {
            Err(error) => Err(failed(op, &error)),
            Ok(()) => Err(OpError::driver(op, "the ranks have given up")),
        }
    }
}

/// This rank's memory, to be told to the others.
fn offer(gpu: &Gpu, memory: &Buffer) -> Result<Offer, OpError> {
    let address = memory.all().ptr;
    Ok(Offer {
        process: u64::from(std::process::id()),
        device: gpu.driver().identity(),
        address: address.0,
        multiprocessors: u64::from(gpu.properties().multiprocessors),
        // SAFETY: it is allocated, and stays so.
        handle: unsafe { gpu.driver().export(address) }?,
    })
}

/// What all ranks offer. None when some rank has nothing to offer.
fn exchange(group: &LocalGroup, ours: Option<&Offer>) -> Result<Option<Vec<Offer>>, OpError> {
    if !agree(CONNECT, group, ours.is_some())? {
        return Ok(None);
    }
    let ours = ours.map_or([0; Offer::LEN], |offer| offer.to_bytes());
    let told = |rank| {
        let mut bytes = ours;
        group.broadcast_bytes(rank, &mut bytes).map_err(|error| failed(CONNECT, &error))?;
        Ok(Offer::from_bytes(&bytes))
    };
    (0..group.world()).map(told).collect::<Result<Vec<_>, _>>().map(Some)
}

/// Where the memory of every rank is for this one.
fn import(gpu: &Gpu, rank: usize, memory: &Buffer, offers: &[Offer]) -> Result<Vec<DevicePtr>, OpError> {
    let ours = &offers[rank];
    let address = |(peer, offer): (usize, &Offer)| {
        if peer == rank {
            Ok(memory.all().ptr)
        } else if offer.process != ours.process {
            // SAFETY: from `export` in another process, which keeps the memory.
            unsafe { gpu.driver().import(&offer.handle) }
        } else if offer.device == ours.device {
            // Ranks that are threads share a device and its addresses.
            Ok(DevicePtr(offer.address))
        } else {
            Err(OpError::driver(CONNECT, "ranks of one process have different devices"))
        }
    };
    offers.iter().enumerate().map(address).collect()
}

/// Where a rank puts its mark: at the beginning of its first slot.
fn place(memory: DevicePtr) -> DevicePtr {
    DevicePtr(memory.0 + FLAGS_BYTES as u64)
}

fn mark_of(rank: usize) -> [u8; 16] {
    [0xa5 ^ rank as u8; 16]
}

/// Writes something that the others can look for. What they read before they all have, nobody knows.
fn mark(gpu: &Gpu, rank: usize, of: &[DevicePtr]) -> Result<(), OpError> {
    // SAFETY: a slot is not shorter.
    unsafe { gpu.driver().upload(place(of[rank]), &mark_of(rank)) }?;
    gpu.synchronize()
}

/// There are machines on which devices say that they reach each other, and read nonsense.
fn look_for_mark(gpu: &Arc<Gpu>, rank: usize, memory: DevicePtr) -> Result<(), OpError> {
    let expected = mark_of(rank);
    let here = gpu.buffer(Element::U8, expected.len())?;
    // SAFETY: both have as many bytes.
    unsafe { gpu.driver().copy(place(memory), here.all().ptr, expected.len()) }?;
    if here.read::<u8>()? == expected {
        return Ok(());
    }
    Err(OpError::driver(CONNECT, format!("the memory of rank {rank} is not what it says")))
}

impl Comm for Peer {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn all_reduce(&self, mut data: SliceMut<'_>) -> Result<(), OpError> {
        let element = data.element();
        check_float(ALL_REDUCE, element)?;
        self.check_group(ALL_REDUCE)?;
        if self.world() == 1 || data.is_empty() {
            return Ok(());
        }
        let (len, capacity) = (data.len(), self.capacity(element));
        if let Some(library) = &self.library
            && len > capacity
        {
            return library.all_reduce(data);
        }
        let kernel = Gpu::pick(ALL_REDUCE, element, REDUCE)?;
        for start in (0..len).step_by(capacity) {
            let piece = data.slice_mut(start..len.min(start + capacity));
            let two_steps = piece.len() * element.size() >= self.limits.two_step_bytes;
            let vectors = element.vectors(piece.len());
            let grid = self.grid(if two_steps { vectors.div_ceil(self.world()) } else { vectors });
            let (len, two_steps) = (piece.len() as u32, u32::from(two_steps));
            let params = AllReduceParams { group: self.params, data: piece.ptr, len, two_steps };
            // SAFETY: the piece has as many elements, and fits into the slots of all ranks, which stay.
            unsafe { self.gpu.launch(ALL_REDUCE, kernel, grid, &params) }?;
        }
        Ok(())
    }

    fn all_gather_columns(
        &self,
        own: Slice<'_>,
        rows: usize,
        cols: &[usize],
        out: SliceMut<'_>,
    ) -> Result<(), OpError> {
        let element = own.element();
        let begins = columns(ALL_GATHER, self.rank(), own, rows, cols, &out, self.world())?;
        self.check_group(ALL_GATHER)?;
        let longest = rows * cols.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return Ok(());
        }
        if let Some(library) = &self.library
            && longest > self.capacity(element)
        {
            return library.all_gather_columns(own, rows, cols, out);
        }
        let kernel = Gpu::pick(ALL_GATHER, element, GATHER)?;
        let mut params = AllGatherParams {
            group: self.params,
            own: own.ptr,
            out: out.ptr,
            begins: [0; RANKS_MAX + 1],
            rows: fit(ALL_GATHER, "rows", rows)?,
            first: 0,
            count: 0,
        };
        fit(ALL_GATHER, "elements of a rank", longest)?;
        for (to, begin) in params.begins.iter_mut().zip(begins) {
            *to = fit(ALL_GATHER, "columns", begin)?;
        }
        // A slot holds whole vectors, so each piece begins with one.
        let capacity = self.capacity(element);
        for first in (0..longest).step_by(capacity) {
            (params.first, params.count) = (first as u32, usize::min(capacity, longest - first) as u32);
            let grid = self.grid(element.vectors(params.count as usize));
            // SAFETY: both slices were checked; a piece fits into the slots of all ranks, which stay.
            unsafe { self.gpu.launch(ALL_GATHER, kernel, grid, &params) }?;
        }
        Ok(())
    }

    fn barrier(&self) -> Result<(), OpError> {
        self.gpu.synchronize()?;
        self.check_group("barrier")?;
        self.group.barrier().map_err(|error| failed("barrier", &error))
    }

    fn check(&self) -> Result<(), OpError> {
        self.check_group("check")?;
        if let Some(library) = &self.library {
            library.check()?;
        }
        self.group.check().map_err(|error| failed("check", &error))
    }

    fn abort(&self) {
        self.group.abort();
        self.given_up.number().store(1, Ordering::SeqCst);
        if let Some(library) = &self.library {
            library.abort();
        }
    }

    fn description(&self) -> String {
        let limit = self.limits.slot_bytes;
        match &self.library {
            Some(library) => format!("peer memory up to {limit} bytes, {} above", library.description()),
            None => "peer memory".to_owned(),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The device may still be waiting for the others. While it does, the patrol goes on. What fails was reported.
        let _ = self.gpu.synchronize();
        drop(self.patrol.take());
    }
}
