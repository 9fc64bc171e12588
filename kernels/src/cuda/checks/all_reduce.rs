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
const ROUNDS: usize = 24;

/// So small that few elements need several pieces, and two steps; then so that a slot takes several blocks. How much longer
/// the runs are then.
const LIMITS: [(PeerLimits, usize); 2] = [
    (PeerLimits { slot_bytes: 1024, two_step_bytes: 384 }, 1),
    (PeerLimits { slot_bytes: 20 << 10, two_step_bytes: 7 << 10 }, 19),
];

/// Nothing, one, vectors and their neighbours, each way to sum, and several pieces.
const LENGTHS: [usize; 12] = [0, 1, 3, 4, 8, 9, 33, 95, 97, 200, 257, 601];

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

impl Rank {
    fn run(checker: Checker, spec: &GroupSpec, limits: PeerLimits, scale: usize) -> Result<Checker, OpError> {
        let failed = |error: String| OpError::driver("check", error);
        let group =
            LocalGroup::join(spec, Duration::from_secs(60)).map_err(|error| failed(error.to_string()))?;
        let gpu = checker.gpu();
        let peer = Peer::new(&gpu, &Arc::new(group), limits, None)?;
        let peer = peer.ok_or_else(|| failed("threads do not reach each other's memory".to_owned()))?;
        let mut rank = Self { checker, peer, scale, own: Random::new(spec.rank as u64 + 7) };
        for round in 0..ROUNDS {
            let element = FLOATS[rank.random().below(FLOATS.len())];
            // Each comes at another time.
            (0..rank.own.below(4)).for_each(|_| thread::yield_now());
            if rank.random().below(4) == 0 {
                rank.gather(round, element)?;
            } else {
                rank.reduce(round, element)?;
            }
        }
        rank.replay()?;
        rank.peer.check()?;
        // Who leaves now is missed by nobody.
        rank.peer.barrier()?;
        Ok(rank.checker)
    }

    fn random(&mut self) -> &mut Random {
        self.checker.random()
    }

    fn world(&self) -> usize {
        self.peer.world()
    }

    /// What each rank brings, as its type holds it.
    fn numbers(&mut self, element: Element, lens: &[usize]) -> Result<Vec<Vec<f32>>, OpError> {
        let rounded = |len: &usize| {
            let numbers = self.checker.random.numbers(*len);
            Ok(self.checker.given(element, &numbers)?.host)
        };
        lens.iter().map(rounded).collect()
    }

    fn case(&self, what: &str, round: usize, element: Element, len: usize) -> String {
        let (rank, world) = (self.peer.rank(), self.world());
        format!("{what} {round} of {len} {element:?}, rank {rank} of {world}")
    }

    fn reduce(&mut self, round: usize, element: Element) -> Result<(), OpError> {
        let len = LENGTHS[self.random().below(LENGTHS.len())] * self.scale;
        let lens = vec![len; self.world()];
        let numbers = self.numbers(element, &lens)?;
        let expected = self.sums(element, &numbers)?;
        // At any address, which is another on every rank; what lies around stays.
        let (before, behind) = (self.own.below(5), self.own.below(3));
        let around = |numbers: &[f32]| [&vec![0.5; before], numbers, &vec![0.5; behind]].concat();
        let mut data = self.checker.given(element, &around(&numbers[self.peer.rank()]))?.buffer;
        self.peer.all_reduce(data.all_mut().slice_mut(before..before + len))?;
        let case = self.case("sum", round, element, len);
        let found = self.checker.read(&data)?;
        self.checker.equal(case, &found, &around(&expected));
        Ok(())
    }

    /// In the order of the ranks, rounded once.
    fn sums(&mut self, element: Element, numbers: &[Vec<f32>]) -> Result<Vec<f32>, OpError> {
        let mut sums = numbers[0].clone();
        for more in &numbers[1..] {
            sums.iter_mut().zip(more).for_each(|(sum, number)| *sum += number);
        }
        Ok(self.checker.given(element, &sums)?.host)
    }

    fn gather(&mut self, round: usize, element: Element) -> Result<(), OpError> {
        let rows = self.random().below(4);
        let cols_max = 150 * self.scale;
        let cols: Vec<usize> = (0..self.world()).map(|_| self.checker.random.below(cols_max)).collect();
        let lens: Vec<usize> = cols.iter().map(|cols| rows * cols).collect();
        let numbers = self.numbers(element, &lens)?;
        let mut expected = Vec::new();
        for row in 0..rows {
            for (numbers, cols) in numbers.iter().zip(&cols) {
                expected.extend(&numbers[row * cols..][..*cols]);
            }
        }
        let own = self.checker.given(element, &numbers[self.peer.rank()])?.buffer;
        let mut out = self.checker.unwritten(element, expected.len())?;
        self.peer.all_gather_columns(own.all(), rows, &cols, out.all_mut())?;
        let case = self.case("columns", round, element, expected.len());
        let found = self.checker.read(&out)?;
        self.checker.equal(case, &found, &expected);
        Ok(())
    }

    /// What is recorded once is a round of its own each time.
    fn replay(&mut self) -> Result<(), OpError> {
        let (element, len) = (Element::BF16, 300);
        let mut data: Buffer = self.checker.unwritten(element, len)?;
        let gpu = self.checker.gpu();
        let graph = gpu.capture(|| self.peer.all_reduce(data.all_mut()))?;
        for round in 0..5 {
            let lens = vec![len; self.world()];
            let numbers = self.numbers(element, &lens)?;
            let expected = self.sums(element, &numbers)?;
            let own = self.checker.given(element, &numbers[self.peer.rank()])?.buffer;
            data.copy_from(own.all())?;
            graph.replay()?;
            let case = self.case("replayed sum", round, element, len);
            let found = self.checker.read(&data)?;
            self.checker.equal(case, &found, &expected);
        }
        Ok(())
    }
}
