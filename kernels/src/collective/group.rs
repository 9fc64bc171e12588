use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Call, GroupError, Operation};
use super::shared::{Failure, SLOT_LEN, Shared};
use super::{GroupSpec, join};

/// The place of one process in a group of processes on this machine.
///
/// Every rank has to make the same calls in the same order. A call returns when all ranks have made it, however long
/// that takes, and errors as soon as one of them cannot any more. An error in a call fails the group: what the arguments
/// then hold means nothing, and every call of every rank from then on is an error, at once.
///
/// Dropping it, or the end of the process, tells the others that this rank is gone.
#[derive(Debug)]
pub struct LocalGroup {
    shared: Shared,
    rank: usize,
    /// How long to look again and again before sleeping.
    hope: Duration,
    turn: Mutex<Turn>,
}

/// How far this rank is.
#[derive(Debug)]
struct Turn {
    /// Stages it has reached.
    stage: u64,
    /// Calls it has made.
    calls: u64,
    /// What the calls are for.
    work: u64,
}

/// How long a rank looks for the others before it sleeps, if each of them can have a core of its own.
///
/// About what a sleep and a wake-up cost: 13 microseconds for a sum of 4 KiB by two ranks that sleep, under 1 for two that
/// find each other awake (two cores of an AMD EPYC). Whoever hopes in vain has lost as much again, at most.
const HOPE: Duration = Duration::from_micros(10);

/// How often a sleeper looks whether those that it waits for live.
const PATROL: Duration = Duration::from_millis(100);

/// From how many ranks, and how many elements, on a rank sums a part of the elements and hands it round, instead of all.
///
/// Two ranks read as much either way. At 16384 elements, 8 ranks took 163 microseconds for the whole and 130 by parts, 4
/// took 50 for both; at 65536, 4 ranks took 340 and 125. At 4096, 8 ranks took 56 and 101.
const SPLIT_WORLD: usize = 3;
const SPLIT_LEN: usize = 16 * 1024;

/// Parts of a sum start at multiples of this many elements: a cache line.
const PART_UNIT: usize = 16;

impl LocalGroup {
    /// Meets the other ranks at the file of `spec`, for which it waits up to `timeout`.
    ///
    /// Rank 0 replaces the file of a group whose rank 0 is gone. When all have come, it takes the file away.
    ///
    /// Errors when the ranks do not agree on their number or their build, when this rank is there already, when the file
    /// cannot be made or is not this user's, when some do not come in time, and when rank 0 ends or gives up meanwhile.
    pub fn join(spec: &GroupSpec, timeout: Duration) -> Result<Self, GroupError> {
        spec.check()?;
        let deadline = Instant::now() + timeout;
        let (shared, published) = join::meet(spec, deadline, timeout)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let hope = if cores >= spec.world { HOPE } else { Duration::ZERO };
        let turn = Mutex::new(Turn { stage: 0, calls: 0, work: 0 });
        let group = Self { shared, rank: spec.rank, hope, turn };
        group.join_all(spec, deadline, timeout)?;
        drop(published);
        Ok(group)
    }

    /// Who this process is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        self.shared.world()
    }

    /// Gives up on the group: the calls of all ranks, those that wait in one included, error from now on. For a rank
    /// whose step has failed. From any thread.
    pub fn abort(&self) {
        self.shared.fail(Failure::Aborted(self.rank));
    }

    /// Says what the following calls of this rank are for: a number, such as a hash of the inputs of a step. Ranks whose
    /// calls are alike but for different work are told so; without it they would exchange numbers that mean nothing.
    pub fn set_work(&self, work: u64) {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner).work = work;
    }

    /// Waits until all ranks have called it.
    pub fn barrier(&self) -> Result<(), GroupError> {
        self.call(Operation::Barrier, [0, 0, 0], |group, turn, call| group.stage(turn, call, |_| ()))
    }

    /// The least of what all ranks bring.
    pub fn least(&self, value: u64) -> Result<u64, GroupError> {
        // Two floats that carry its bits; nobody calculates with them.
        let words = [value as u32, (value >> 32) as u32].map(f32::from_bits);
        self.call(Operation::Least, [1, 1, 0], |group, turn, call| {
            group.stage(turn, call, |slot| slot[..2].copy_from_slice(&words))?;
            let value_of = |rank| {
                // SAFETY: all have arrived at this stage, and this rank not yet at the next one.
                let words = unsafe { group.shared.numbers(rank, turn.stage, 0..2) };
                u64::from(words[1].to_bits()) << 32 | u64::from(words[0].to_bits())
            };
            Ok((0..group.world()).map(value_of).min().unwrap_or(value))
        })
    }

    /// `bytes` becomes what rank `root` brings. Its length has to be the same on all. Panics when there is no such rank.
    pub fn broadcast_bytes(&self, root: usize, bytes: &mut [u8]) -> Result<(), GroupError> {
        assert!(root < self.world(), "rank {root} of {}", self.world());
        self.call(Operation::Broadcast, [root as u64, bytes.len() as u64, 0], |group, turn, call| {
            let mut pieces = bytes.chunks_mut(SLOT_LEN * size_of::<f32>());
            let mut next = pieces.next().or(Some(&mut []));
            while let Some(piece) = next {
                // Floats that carry the bits; nobody calculates with them.
                group.stage(turn, call, |slot| {
                    if group.rank == root {
                        slot.iter_mut().zip(piece.chunks(4)).for_each(|(to, from)| *to = pack(from));
                    }
                })?;
                // SAFETY: all have arrived at this stage, and this rank not yet at the next one.
                let words = unsafe { group.shared.numbers(root, turn.stage, 0..piece.len().div_ceil(4)) };
                for (to, from) in piece.chunks_mut(4).zip(words) {
                    to.copy_from_slice(&from.to_bits().to_le_bytes()[..to.len()]);
                }
                next = pieces.next();
            }
            Ok(())
        })
    }

    /// Errors when the group has failed, or the process of a rank has ended: for who waits for the others elsewhere.
    pub fn check(&self) -> Result<(), GroupError> {
        self.check_failure()?;
        match self.peers().find(|peer| !self.is_alive(*peer)) {
            None => Ok(()),
            Some(peer) => Err(self.error_of(self.shared.fail(Failure::Gone(peer)))),
        }
    }

    /// Sums `data` over all ranks, in place. Its length has to be the same on all.
    ///
    /// An element is ((d0 + d1) + d2) + ..., where dr is that of rank r: the same bits on every rank.
    pub fn all_reduce(&self, data: &mut [f32]) -> Result<(), GroupError> {
        let shape = [1, data.len() as u64, 0];
        self.call(Operation::AllReduce, shape, |group, turn, call| {
            let split = group.world() >= SPLIT_WORLD && data.len() >= SPLIT_LEN;
            let sum = if split { Self::sum_by_parts } else { Self::sum_whole };
            pieces(data.len()).try_for_each(|piece| sum(group, turn, call, &mut data[piece]))
        })
    }

    /// Puts the columns of all ranks side by side.
    ///
    /// - `own`: `[rows, cols[rank]]`, this rank's columns
    /// - `cols`: how many columns each rank has, some perhaps none
    /// - `out`: `[rows, sum of cols]`, the columns of rank 0 first
    pub fn all_gather_columns(
        &self,
        own: &[f32],
        rows: usize,
        cols: &[usize],
        out: &mut [f32],
    ) -> Result<(), GroupError> {
        let operation = Operation::AllGatherColumns;
        let total: usize = cols.iter().sum();
        let shape = [rows as u64, total as u64, division(cols)];
        self.call(operation, shape, |group, turn, call| {
            check_length(operation, "cols", group.world(), cols.len())?;
            check_length(operation, "own", rows * cols[group.rank], own.len())?;
            check_length(operation, "out", rows * total, out.len())?;
            // Each rank's numbers are a row-major run; the runs go in pieces, whatever rows they cut.
            let longest = rows * cols.iter().copied().max().unwrap_or(0);
            pieces(longest).try_for_each(|piece| {
                let part = |rank: usize| {
                    let len = rows * cols[rank];
                    piece.start.min(len)..piece.end.min(len)
                };
                let mine = &own[part(group.rank)];
                group.stage(turn, call, |slot| slot[..mine.len()].copy_from_slice(mine))?;
                let mut columns = 0..0;
                for (rank, width) in cols.iter().enumerate() {
                    columns = columns.end..columns.end + width;
                    // SAFETY: all have arrived at this stage, and this rank not yet at the next one.
                    let numbers = unsafe { group.shared.numbers(rank, turn.stage, 0..part(rank).len()) };
                    place(numbers, part(rank).start, out, total, &columns);
                }
                Ok(())
            })
        })
    }

    /// Runs the stages of one call, one call at a time. Its error fails the group.
    fn call<R>(
        &self,
        operation: Operation,
        [rows, cols, division]: [u64; 3],
        run: impl FnOnce(&Self, &mut Turn, &Call) -> Result<R, GroupError>,
    ) -> Result<R, GroupError> {
        // A panic inside a call left the stages out of step, and failed the group (below): nothing is hidden here.
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_failure()?;
        let Turn { calls: index, work, .. } = *turn;
        let call = Call { index, work, operation: Some(operation), rows, cols, division };
        turn.calls += 1;
        let failing = FailOnDrop(self);
        let result = run(self, &mut turn, &call)?;
        std::mem::forget(failing);
        Ok(result)
    }

    /// Shows the others what `fill` writes into this rank's slot, and waits until they have all done the same.
    fn stage(&self, turn: &mut Turn, call: &Call, fill: impl FnOnce(&mut [f32])) -> Result<(), GroupError> {
        turn.stage += 1;
        // SAFETY: this is this rank, at one stage at a time (`turn` is locked), not yet arrived; that all have arrived
        // at the stage before is what the call for it waited for.
        fill(unsafe { self.shared.numbers_mut(self.rank, turn.stage) });
        self.shared.arrive(self.rank, turn.stage, call);
        for peer in self.peers() {
            self.wait_for(peer, turn.stage)?;
            let theirs = self.shared.call(peer, turn.stage);
            if theirs != *call {
                return Err(GroupError::Mismatch { rank: self.rank, ours: *call, peer, theirs });
            }
        }
        Ok(())
    }

    /// Every rank reads everything: two copies and a wait.
    fn sum_whole(&self, turn: &mut Turn, call: &Call, data: &mut [f32]) -> Result<(), GroupError> {
        self.stage(turn, call, |slot| slot[..data.len()].copy_from_slice(data))?;
        // SAFETY: the stage has just been waited for.
        unsafe { self.add_up(turn.stage, 0..data.len(), data) };
        Ok(())
    }

    /// Every rank sums its part and reads the others' sums: less to read, and a wait more.
    fn sum_by_parts(&self, turn: &mut Turn, call: &Call, data: &mut [f32]) -> Result<(), GroupError> {
        let len = data.len();
        let part = |rank: usize| {
            let units = len.div_ceil(PART_UNIT);
            let [start, end] = [rank, rank + 1].map(|rank| units * rank / self.world() * PART_UNIT);
            start.min(len)..end.min(len)
        };
        self.stage(turn, call, |slot| slot[..len].copy_from_slice(data))?;
        let (own, addends) = (part(self.rank), turn.stage);
        self.stage(turn, call, |slot| {
            // SAFETY: that stage has been waited for, and this rank fills its slot before it arrives at this one.
            unsafe { self.add_up(addends, own.clone(), &mut slot[own.clone()]) }
        })?;
        for rank in 0..self.world() {
            let part = part(rank);
            // SAFETY: all have arrived at this stage, and this rank not yet at the next one.
            let sums = unsafe { self.shared.numbers(rank, turn.stage, part.clone()) };
            data[part].copy_from_slice(sums);
        }
        Ok(())
    }

    /// `out` becomes the sum of the numbers of all ranks in `range`, in the order of the ranks.
    ///
    /// # Safety
    ///
    /// All have arrived at `stage`, and this rank not yet at the next one.
    unsafe fn add_up(&self, stage: u64, range: Range<usize>, out: &mut [f32]) {
        // Short enough to stay in the first-level cache from one rank to the next.
        const BLOCK: usize = 1024;
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = range.start + index * BLOCK;
            let block = start..start + out.len();
            // SAFETY: as this function requires; and `out` is the caller's, or in the slot of another stage.
            let numbers = |rank| unsafe { self.shared.numbers(rank, stage, block.clone()) };
            out.copy_from_slice(numbers(0));
            for rank in 1..self.world() {
                out.iter_mut().zip(numbers(rank)).for_each(|(sum, addend)| *sum += addend);
            }
        }
    }

    fn peers(&self) -> impl Iterator<Item = usize> {
        let rank = self.rank;
        (0..self.world()).filter(move |peer| *peer != rank)
    }

    /// Returns when `peer` has reached `stage`. Errors when it never will.
    fn wait_for(&self, peer: usize, stage: u64) -> Result<(), GroupError> {
        if self.hope_for(peer, stage) {
            return Ok(());
        }
        let mut looked = Instant::now();
        while !self.shared.has_arrived(peer, stage) {
            self.check_failure()?;
            self.shared.sleep(self.rank, peer, stage, PATROL);
            if looked.elapsed() >= PATROL {
                self.check_alive(stage)?;
                looked = Instant::now();
            }
        }
        Ok(())
    }

    /// Looks for `peer` at `stage` for as long as hope lasts: whether it came.
    fn hope_for(&self, peer: usize, stage: u64) -> bool {
        // Reading the clock costs about as much as so many looks.
        const LOOKS: usize = 16;
        let mut since = None;
        loop {
            for _ in 0..LOOKS {
                if self.shared.has_arrived(peer, stage) {
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.get_or_insert_with(Instant::now).elapsed() >= self.hope {
                return false;
            }
        }
    }

    /// Errors when a rank that has not reached `stage` lives no more.
    fn check_alive(&self, stage: u64) -> Result<(), GroupError> {
        for peer in self.peers() {
            // In this order: a rank may arrive and end between two looks, and then it has done its part.
            let gone = !self.is_alive(peer) && !self.shared.has_arrived(peer, stage);
            if gone {
                return Err(self.error_of(self.shared.fail(Failure::Gone(peer))));
            }
        }
        Ok(())
    }

    /// Whether `rank` lives, as far as one can tell.
    fn is_alive(&self, rank: usize) -> bool {
        self.shared.is_held(rank).unwrap_or(true)
    }

    fn check_failure(&self) -> Result<(), GroupError> {
        self.shared.failure().map_or(Ok(()), |failure| Err(self.error_of(failure)))
    }

    fn error_of(&self, failure: Failure) -> GroupError {
        match failure {
            Failure::Aborted(rank) => GroupError::Aborted { rank },
            Failure::Gone(rank) => GroupError::PeerGone { rank },
        }
    }

    /// The first stage: everybody has opened the file.
    fn join_all(&self, spec: &GroupSpec, deadline: Instant, timeout: Duration) -> Result<(), GroupError> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        turn.stage += 1;
        let join = Call { index: 0, work: 0, operation: None, rows: 0, cols: 0, division: 0 };
        self.shared.arrive(self.rank, turn.stage, &join);
        for peer in self.peers() {
            while !self.shared.has_arrived(peer, turn.stage) {
                self.check_failure()?;
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let missing = self.peers().filter(|peer| !self.shared.has_arrived(*peer, turn.stage));
                    let missing = missing.collect();
                    let path = spec.path.clone();
                    return Err(GroupError::Timeout { path, rank: self.rank, missing, waited: timeout });
                }
                self.shared.sleep(self.rank, peer, turn.stage, left.min(PATROL));
                // Others may not have come yet, but rank 0 has made the file.
                if self.rank != 0 && !self.is_alive(0) {
                    return Err(self.error_of(self.shared.fail(Failure::Gone(0))));
                }
            }
        }
        Ok(())
    }
}

/// Fails the group when a call ends in an error or a panic.
struct FailOnDrop<'a>(&'a LocalGroup);

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Up to four bytes as the bits of a float.
fn pack(bytes: &[u8]) -> f32 {
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    f32::from_bits(u32::from_le_bytes(word))
}

/// `len` elements in pieces that fit a slot: at least one, if only to meet.
fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(SLOT_LEN).max(1)).map(move |index| index * SLOT_LEN..len.min((index + 1) * SLOT_LEN))
}

/// Copies a run of a row-major matrix, its elements from `start` on, into these `columns` of the row-major
/// `[rows, total]` that `out` is.
fn place(numbers: &[f32], start: usize, out: &mut [f32], total: usize, columns: &Range<usize>) {
    let width = columns.len();
    let (mut numbers, mut at) = (numbers, start);
    while !numbers.is_empty() {
        let (row, col) = (at / width, at % width);
        let (now, later) = numbers.split_at(numbers.len().min(width - col));
        out[row * total + columns.start + col..][..now.len()].copy_from_slice(now);
        (numbers, at) = (later, at + now.len());
    }
}

/// A hash of how columns are divided (FNV-1a over the counts), for ranks to compare.
fn division(cols: &[usize]) -> u64 {
    cols.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, count| (hash ^ *count as u64).wrapping_mul(0x0100_0000_01b3))
}

fn check_length(
    operation: Operation,
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), GroupError> {
    if found == expected { Ok(()) } else { Err(GroupError::Length { operation, what, expected, found }) }
}
