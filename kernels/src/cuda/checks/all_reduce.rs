use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{Checker, FLOATS, Random};
use crate::OpError;
use crate::collective::{GroupSpec, LocalGroup};
use crate::cuda::comm::{Comm, Peer, PeerLimits};
use crate::cuda::{Buffer, Element};

const WORLDS: [usize; 2] = [2, 4];
const ROUNDS: usize = 30;

/// So small that few elements need several pieces, and two steps; then so that a slot takes several blocks. How much longer
/// the runs are then.
const LIMITS: [(PeerLimits, usize); 2] = [
    (PeerLimits { slot_bytes: 1024, two_step_bytes: 384 }, 1),
    (PeerLimits { slot_bytes: 20 << 10, two_step_bytes: 7 << 10 }, 19),
];

/// Nothing, one, vectors and their neighbours, each way to sum, and several pieces.
const LENGTHS: [usize; 12] = [0, 1, 3, 4, 8, 9, 33, 95, 97, 200, 257, 601];

/// Of what a graph sums.
const REPLAYED: Element = Element::BF16;
const REPLAYED_LEN: usize = 300;

/// Ranks that are threads, each with a stream of its own. What one of them gets wrong, or does not wait for, shows in
/// numbers that are new in every round.
pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    let cases = WORLDS.into_iter().flat_map(|world| LIMITS.map(|(limits, scale)| (world, limits, scale)));
    for (world, limits, scale) in cases {
        let (seed, path) = (c.random().below(1 << 30), meeting_place());
        let ranks = (0..world)
            .map(|rank| Ok((c.gpu().sibling()?, GroupSpec { path: path.clone(), rank, world })))
            .collect::<Result<Vec<_>, OpError>>()?;
        let found = thread::scope(|scope| {
            let start = |(gpu, spec)| {
                let checker = Checker { gpu, random: Random::new(seed as u64), findings: Vec::new() };
                scope.spawn(move || Rank::run(checker, &spec, limits, scale))
            };
            let threads: Vec<_> = ranks.into_iter().map(start).collect();
            threads.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Vec<_>>()
        });
        for rank in found {
            c.findings.extend(rank?.findings);
        }
    }
    #[cfg(feature = "cuda")]
    library(c)?;
    Ok(())
}

/// A file that no other group of this machine uses.
fn meeting_place() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("all-reduce-{}-{count}", std::process::id()))
}

/// One of several that draw the same random numbers, and so do the same.
struct Rank {
    checker: Checker,
    peer: Peer,
    scale: usize,
    /// For what each does by itself.
    own: Random,
}

/// A call, and what has to come of it.
struct Round {
    case: String,
    call: Call,
    /// Where the result is.
    out: Buffer,
    expected: Vec<f32>,
}

enum Call {
    /// Of a part of `out`.
    Reduce(Range<usize>),
    /// To `out`.
    Gather { own: Buffer, rows: usize, cols: Vec<usize> },
    /// Of what the graph takes, by the graph.
    Replay { own: Buffer },
}

impl Rank {
    /// Where ranks share a device, whoever allocates, frees or loads may wait for all of it, and so for others that wait for
    /// him. So that is done before the first call, and after the last.
    fn run(checker: Checker, spec: &GroupSpec, limits: PeerLimits, scale: usize) -> Result<Checker, OpError> {
        let failed = |error: String| OpError::driver("check", error);
        let group =
            LocalGroup::join(spec, Duration::from_secs(60)).map_err(|error| failed(error.to_string()))?;
        let gpu = checker.gpu();
        let peer = Peer::new(&gpu, &Arc::new(group), limits, None)?;
        let peer = peer.ok_or_else(|| failed("threads do not reach each other's memory".to_owned()))?;
        let mut rank = Self { checker, peer, scale, own: Random::new(spec.rank as u64 + 7) };
        let mut rounds = (0..ROUNDS).map(|index| rank.round(index)).collect::<Result<Vec<_>, _>>()?;
        // What is recorded once is a round of its own each time.
        let mut data = rank.checker.unwritten(REPLAYED, REPLAYED_LEN)?;
        let graph = gpu.capture(|| rank.peer.all_reduce(data.all_mut()))?;
        rank.peer.barrier()?;

        for round in &mut rounds {
            // Each comes at another time.
            (0..rank.own.below(4)).for_each(|_| thread::yield_now());
            match &round.call {
                Call::Reduce(range) => rank.peer.all_reduce(round.out.all_mut().slice_mut(range.clone()))?,
                Call::Gather { own, rows, cols } => {
                    rank.peer.all_gather_columns(own.all(), *rows, cols, round.out.all_mut())?;
                }
                Call::Replay { own } => {
                    data.copy_from(own.all())?;
                    graph.replay()?;
                    round.out.copy_from(data.all())?;
                }
            }
        }
        gpu.synchronize()?;
        rank.peer.check()?;
        // Who leaves now is missed by nobody, and nobody waits.
        rank.peer.barrier()?;
        for Round { case, out, expected, .. } in rounds {
            let found = rank.checker.read(&out)?;
            rank.checker.equal(case, &found, &expected);
        }
        Ok(rank.checker)
    }

    fn round(&mut self, index: usize) -> Result<Round, OpError> {
        let element = FLOATS[self.random().below(FLOATS.len())];
        match self.random().below(5) {
            0 => self.gather(index, element),
            1 => self.replay(index),
            _ => self.reduce(index, element),
        }
    }

    fn random(&mut self) -> &mut Random {
        self.checker.random()
    }

    /// What each rank brings, as its type holds it.
    fn numbers(&mut self, element: Element, lens: &[usize]) -> Result<Vec<Vec<f32>>, OpError> {
        let rounded = |len: &usize| {
            let numbers = self.checker.random.numbers(*len);
            Ok(self.checker.given(element, &numbers)?.host)
        };
        lens.iter().map(rounded).collect()
    }

    fn case(&self, what: &str, index: usize, element: Element, len: usize) -> String {
        let (rank, world) = (self.peer.rank(), self.peer.world());
        format!("{what} {index} of {len} {element:?}, rank {rank} of {world}")
    }

    fn reduce(&mut self, index: usize, element: Element) -> Result<Round, OpError> {
        let len = LENGTHS[self.random().below(LENGTHS.len())] * self.scale;
        let numbers = self.numbers(element, &vec![len; self.peer.world()])?;
        let sums = self.sums(element, &numbers)?;
        // At any address, which is another on every rank; what lies around stays.
        let (before, behind) = (self.own.below(5), self.own.below(3));
        let around = |numbers: &[f32]| [&vec![0.5; before], numbers, &vec![0.5; behind]].concat();
        Ok(Round {
            case: self.case("sum", index, element, len),
            call: Call::Reduce(before..before + len),
            out: self.checker.given(element, &around(&numbers[self.peer.rank()]))?.buffer,
            expected: around(&sums),
        })
    }

    fn replay(&mut self, index: usize) -> Result<Round, OpError> {
        let numbers = self.numbers(REPLAYED, &vec![REPLAYED_LEN; self.peer.world()])?;
        let own = self.checker.given(REPLAYED, &numbers[self.peer.rank()])?.buffer;
        Ok(Round {
            case: self.case("replayed sum", index, REPLAYED, REPLAYED_LEN),
            call: Call::Replay { own },
            out: self.checker.unwritten(REPLAYED, REPLAYED_LEN)?,
            expected: self.sums(REPLAYED, &numbers)?,
        })
    }

    /// In the order of the ranks, rounded once.
    fn sums(&mut self, element: Element, numbers: &[Vec<f32>]) -> Result<Vec<f32>, OpError> {
        let mut sums = numbers[0].clone();
        for more in &numbers[1..] {
            sums.iter_mut().zip(more).for_each(|(sum, number)| *sum += number);
        }
        Ok(self.checker.given(element, &sums)?.host)
    }

    fn gather(&mut self, index: usize, element: Element) -> Result<Round, OpError> {
        let (rows, cols_max) = (self.random().below(4), 150 * self.scale);
        let cols: Vec<usize> = (0..self.peer.world()).map(|_| self.checker.random.below(cols_max)).collect();
        let lens: Vec<usize> = cols.iter().map(|cols| rows * cols).collect();
        let numbers = self.numbers(element, &lens)?;
        let mut expected = Vec::new();
        for row in 0..rows {
            for (numbers, cols) in numbers.iter().zip(&cols) {
                expected.extend(&numbers[row * cols..][..*cols]);
            }
        }
        let own = self.checker.given(element, &numbers[self.peer.rank()])?.buffer;
        Ok(Round {
            case: self.case("columns", index, element, expected.len()),
            call: Call::Gather { own, rows, cols },
            out: self.checker.unwritten(element, expected.len())?,
            expected,
        })
    }
}

/// NVIDIA's library with one rank, as far as one GPU can show: that its functions are what they are taken for.
#[cfg(feature = "cuda")]
fn library(c: &mut Checker) -> Result<(), OpError> {
    use crate::cuda::comm::Nccl;

    let spec = GroupSpec { path: meeting_place(), rank: 0, world: 1 };
    let group = LocalGroup::join(&spec, Duration::from_secs(60));
    let group = Arc::new(group.map_err(|error| OpError::driver("check", error.to_string()))?);
    let Some(nccl) = Nccl::new(&c.gpu(), &group)? else { return Ok(()) };
    for element in FLOATS {
        let given = c.floats(element, 300)?;
        let mut data = given.buffer;
        nccl.all_reduce(data.all_mut())?;
        let mut out = c.unwritten(element, 300)?;
        nccl.all_gather_columns(data.all(), 3, &[100], out.all_mut())?;
        let graph = c.gpu().capture(|| nccl.all_reduce(out.all_mut()))?;
        graph.replay()?;
        nccl.check()?;
        let found = c.read(&out)?;
        c.equal(format!("{} alone, {element:?}", nccl.description()), &found, &given.host);
    }
    Ok(())
}
