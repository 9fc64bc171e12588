//! The memory that the processes of a group share: what lies where, who may touch what, and how they wake each other.
//!
//! | offset | what |
//! |---|---|
//! | 0 | [`Identity`], written once before others can see the file; the lock of rank `r` is on byte `r` of the file |
//! | 128 | [`State`] |
//! | 4096 | a [`Seat`] per rank |
//! | after them | two slots of [`SLOT_LEN`] numbers per rank |
//!
//! Other processes of this user could write anything here. Counters are atomics and numbers are floats, for which every
//! bit pattern is valid, so the worst that comes of it is a wrong number or a group that fails.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use memmap2::MmapRaw;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::thread::futex;

use super::error::{Call, Operation};

/// Numbers in a slot; longer vectors go in several stages.
///
/// 256 KiB: a chunk that is copied in is still in the second-level cache when it is summed.
pub(super) const SLOT_LEN: usize = 64 * 1024;

const SEATS_AT: usize = 4096;
const STATE_AT: usize = 128;

/// Goes up with every change of what lies in the file or of what ranks say to each other.
const PROTOCOL: u32 = 2;

/// What a file of a group starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// How many ranks.
    pub(super) world: usize,
    /// Which program wrote it: protocol and version.
    pub(super) build: String,
}

impl Identity {
    /// Bytes it takes.
    pub(super) const LEN: usize = 64;
    const MAGIC: &[u8; 16] = b"ranks meet here\n";

    /// This program's, for a group of `world`.
    pub(super) fn new(world: usize) -> Self {
        Self { world, build: format!("{}.{PROTOCOL}", env!("CARGO_PKG_VERSION")) }
    }

    /// Magic, world, and the build padded with zeros.
    pub(super) fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(Self::MAGIC);
        bytes[16..24].copy_from_slice(&(self.world as u64).to_le_bytes());
        let build = self.build.as_bytes();
        let len = build.len().min(Self::LEN - 24);
        bytes[24..][..len].copy_from_slice(&build[..len]);
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote. None when something else did.
    pub(super) fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let rest = bytes.strip_prefix(Self::MAGIC)?;
        let (world, build) = rest.split_first_chunk()?;
        let end = build.iter().position(|byte| *byte == 0).unwrap_or(build.len());
        Some(Self {
            world: usize::try_from(u64::from_le_bytes(*world)).ok()?,
            build: std::str::from_utf8(&build[..end]).ok()?.to_owned(),
        })
    }
}

/// What holds for the group as a whole.
#[repr(C, align(128))]
struct State {
    /// Why the group has failed; 0 while it has not.
    failure: AtomicU32,
}

/// Why a group has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// This rank has given up.
    Aborted(usize),
    /// The process of this rank has ended.
    Gone(usize),
}

impl Failure {
    const GONE: u32 = 1 << 16;

    fn to_word(self) -> u32 {
        // A rank is below `GroupSpec::WORLD_MAX`; one more, so that no failure is 0.
        match self {
            Failure::Aborted(rank) => 1 + rank as u32,
            Failure::Gone(rank) => Self::GONE + 1 + rank as u32,
        }
    }

    fn from_word(word: u32) -> Option<Self> {
        let rank = (word & (Self::GONE - 1)).checked_sub(1)? as usize;
        Some(if word & Self::GONE == 0 { Failure::Aborted(rank) } else { Failure::Gone(rank) })
    }
}

/// What a rank tells the others.
#[repr(C, align(128))]
struct Seat {
    /// How many stages it has reached.
    arrived: AtomicU64,
    /// The calls of its last two stages, each beside the slot of that stage.
    calls: [[AtomicU64; 6]; 2],
    sleeper: Sleeper,
}

/// How a rank is woken. Apart from the seat's other words, which it does not touch while it sleeps.
#[repr(C, align(128))]
struct Sleeper {
    /// Counts what could interest it. The word that it sleeps on.
    bell: AtomicU32,
    /// The rank it waits for, plus 1; 0 while it is awake.
    waits_for: AtomicU32,
}

/// Bytes of the file of a group of `world` ranks.
pub(super) fn file_len(world: usize) -> usize {
    slots_at(world) + world * 2 * SLOT_LEN * size_of::<f32>()
}

fn slots_at(world: usize) -> usize {
    (SEATS_AT + world * size_of::<Seat>()).next_multiple_of(4096)
}

/// The mapped file of a group.
#[derive(Debug)]
pub(super) struct Shared {
    file: File,
    map: MmapRaw,
    world: usize,
}

impl Shared {
    /// Maps `file`, which has to be a file of [`file_len`] bytes that starts with an identity and stays that long.
    pub(super) fn map(file: File, world: usize) -> io::Result<Self> {
        let map = MmapRaw::map_raw(&file)?;
        if map.len() != file_len(world) {
            let text = format!("{} bytes, {} expected", map.len(), file_len(world));
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { file, map, world })
    }

    pub(super) fn world(&self) -> usize {
        self.world
    }

    /// Takes the lock of `rank` until the end of this value or this process. False when somebody else holds it.
    pub(super) fn lock(&self, rank: usize) -> io::Result<bool> {
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&byte_lock(rank))) {
            Ok(_) => Ok(true),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether somebody else holds the lock of `rank`.
    pub(super) fn is_held(&self, rank: usize) -> io::Result<bool> {
        is_held(&self.file, rank)
    }

    fn state(&self) -> &State {
        // SAFETY: the map is page-aligned and longer than `SEATS_AT` (`map` checked it), lives as long as `self`, and
        // holds nothing but atomics at this place.
        unsafe { &*self.map.as_mut_ptr().add(STATE_AT).cast() }
    }

    fn seat(&self, rank: usize) -> &Seat {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        // SAFETY: the seats of `world` ranks lie within the map (`map` checked its length), at multiples of their
        // alignment from a page; the map lives as long as `self`, and a seat holds nothing but atomics.
        unsafe { &*self.map.as_mut_ptr().add(SEATS_AT).cast::<Seat>().add(rank) }
    }

    /// Where the slot of `rank` for `stage` starts: stages use the two slots in turn.
    fn slot(&self, rank: usize, stage: u64) -> *mut f32 {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        let index = 2 * rank + (stage % 2) as usize;
        let offset = slots_at(self.world) + index * SLOT_LEN * size_of::<f32>();
        // SAFETY: two slots for each of `world` ranks lie within the map (`map` checked its length).
        unsafe { self.map.as_mut_ptr().add(offset).cast() }
    }

    /// Numbers that `rank` wrote for `stage`. Panics when `range` is not within a slot.
    ///
    /// # Safety
    ///
    /// `rank` has arrived at `stage`, and the caller, as a rank, not yet at the one after it, for as long as the slice
    /// lives. Then nobody writes there: `rank` writes to this slot again when all have arrived at that next stage.
    pub(super) unsafe fn numbers(&self, rank: usize, stage: u64, range: Range<usize>) -> &[f32] {
        assert!(range.start <= range.end && range.end <= SLOT_LEN, "{range:?} of {SLOT_LEN}");
        // SAFETY: the range lies within the slot, which lies within the map; page-aligned and any bits are floats.
        unsafe { std::slice::from_raw_parts(self.slot(rank, stage).add(range.start), range.len()) }
    }

    /// The slot to write the caller's own numbers for `stage` to.
    ///
    /// # Safety
    ///
    /// The caller is `rank` and has not arrived at `stage`, but all ranks have arrived at the one before it, for as long
    /// as the slice lives. Then nobody reads there, and no other slice of it exists.
    #[expect(clippy::mut_from_ref, reason = "the memory is the other processes', not self's")]
    pub(super) unsafe fn numbers_mut(&self, rank: usize, stage: u64) -> &mut [f32] {
        // SAFETY: the slot lies within the map; page-aligned and any bits are floats.
        unsafe { std::slice::from_raw_parts_mut(self.slot(rank, stage), SLOT_LEN) }
    }

    /// Tells the others that `rank` has reached `stage` in `call`: from now on they may read its slot.
    pub(super) fn arrive(&self, rank: usize, stage: u64, call: &Call) {
        let seat = self.seat(rank);
        let words = [
            call.index,
            call.work,
            call.operation.map_or(0, Operation::number),
            call.rows,
            call.cols,
            call.division,
        ];
        for (word, value) in seat.calls[(stage % 2) as usize].iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
        // Sequentially consistent, like what a sleeper does in the other order: either it sees this, or we see it.
        seat.arrived.store(stage, Ordering::SeqCst);
        for peer in (0..self.world).filter(|peer| *peer != rank) {
            if self.seat(peer).sleeper.waits_for.load(Ordering::SeqCst) == rank as u32 + 1 {
                self.ring(peer);
            }
        }
    }

    /// Whether `rank` has reached `stage`.
    pub(super) fn has_arrived(&self, rank: usize, stage: u64) -> bool {
        self.seat(rank).arrived.load(Ordering::Acquire) >= stage
    }

    /// The call that `rank` was in at `stage`, which it has reached and not left.
    pub(super) fn call(&self, rank: usize, stage: u64) -> Call {
        let [index, work, operation, rows, cols, division] =
            self.seat(rank).calls[(stage % 2) as usize].each_ref().map(|word| word.load(Ordering::Relaxed));
        Call { index, work, operation: Operation::from_number(operation), rows, cols, division }
    }

    /// Why the group has failed, if it has.
    pub(super) fn failure(&self) -> Option<Failure> {
        Failure::from_word(self.state().failure.load(Ordering::Acquire))
    }

    /// Makes the group fail, unless it has already: answers the first failure. Wakes everybody.
    pub(super) fn fail(&self, failure: Failure) -> Failure {
        let failed = &self.state().failure;
        let first = failed.compare_exchange(0, failure.to_word(), Ordering::SeqCst, Ordering::SeqCst);
        (0..self.world).for_each(|rank| self.ring(rank));
        first.err().and_then(Failure::from_word).unwrap_or(failure)
    }

    fn ring(&self, rank: usize) {
        let bell = &self.seat(rank).sleeper.bell;
        bell.fetch_add(1, Ordering::SeqCst);
        // It cannot fail on a mapped word. One thread at a time waits for a rank.
        let _ = futex::wake(bell, futex::Flags::empty(), 1);
    }

    /// Sleeps as `rank` until `peer` has reached `stage`, the group has failed, or about `limit` has passed; may also
    /// return for no reason.
    pub(super) fn sleep(&self, rank: usize, peer: usize, stage: u64, limit: Duration) {
        let sleeper = &self.seat(rank).sleeper;
        let heard = sleeper.bell.load(Ordering::SeqCst);
        sleeper.waits_for.store(peer as u32 + 1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // What happened before this line is seen here; whatever happens after it rings, and then the bell is not as
        // `heard`, and there is no sleep.
        if !self.has_arrived(peer, stage) && self.failure().is_none() {
            let limit = futex::Timespec {
                tv_sec: limit.as_secs().min(i64::MAX as u64) as i64,
                tv_nsec: i64::from(limit.subsec_nanos()),
            };
            // Not private: the ranks are processes. Every reason to return is one to look again.
            let _ = futex::wait(&sleeper.bell, futex::Flags::empty(), heard, Some(&limit));
        }
        sleeper.waits_for.store(0, Ordering::SeqCst);
    }
}

/// Whether somebody else holds the lock of `rank` on `file`.
pub(super) fn is_held(file: &File, rank: usize) -> io::Result<bool> {
    let mut lock = byte_lock(rank);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// The lock that says that a rank lives. Of the open file, not of the process: threads can be ranks too, and no other
/// use of the file in this process lets go of it.
fn byte_lock(rank: usize) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: rank as libc::off_t,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let identity = Identity::new(3);
        assert_eq!(Identity::from_bytes(&identity.to_bytes()), Some(identity));
        assert_eq!(Identity::from_bytes(&[0; Identity::LEN]), None);
    }

    #[test]
    fn a_failure_is_read_as_it_was_written() {
        for failure in [Failure::Aborted(0), Failure::Aborted(63), Failure::Gone(0), Failure::Gone(63)] {
            assert_eq!(Failure::from_word(failure.to_word()), Some(failure));
        }
        assert_eq!(Failure::from_word(0), None);
    }

    #[test]
    fn seats_and_slots_do_not_touch() {
        assert!(Identity::LEN <= STATE_AT && STATE_AT + size_of::<State>() <= SEATS_AT);
        for world in [1, 2, 8, 64] {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(file_len(world) as u64).expect("its length");
            let shared = Shared::map(file, world).expect("a map");
            let address = |rank, stage| shared.slot(rank, stage) as usize;
            let seat = std::ptr::from_ref(shared.seat(world - 1)) as usize;
            assert!(seat + size_of::<Seat>() <= address(0, 0), "world {world}");
            for slot in 0..2 * world - 1 {
                let [this, next] = [slot, slot + 1].map(|slot| address(slot / 2, slot as u64));
                assert_eq!(next - this, SLOT_LEN * size_of::<f32>(), "world {world}");
            }
            let end = address(world - 1, 1) + SLOT_LEN * size_of::<f32>();
            assert_eq!(end - shared.map.as_mut_ptr() as usize, file_len(world), "world {world}");
        }
    }

    #[test]
    fn a_lock_is_seen_by_others_until_its_holder_is_gone() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(file_len(2) as u64).expect("its length");
        let map = || Shared::map(file.reopen().expect("opened again"), 2).expect("a map");
        let (ours, theirs) = (map(), map());
        assert!(!ours.is_held(1).expect("a look"));
        assert!(theirs.lock(1).expect("a try"));
        assert!(ours.is_held(1).expect("a look") && !ours.is_held(0).expect("a look"));
        assert!(!ours.lock(1).expect("a try"));
        drop(theirs);
        assert!(!ours.is_held(1).expect("a look") && ours.lock(1).expect("a try"));
    }
}
