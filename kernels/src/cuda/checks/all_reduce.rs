use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::ranks::{Rank, Round};
use super::{Checker, FLOATS, Random};
use crate::OpError;
use crate::collective::{GroupSpec, LocalGroup};
use crate::cuda::comm::{Peer, PeerLimits, SumOrder};

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
                scope.spawn(move || run(checker, &spec, limits, scale))
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
fn run(checker: Checker, spec: &GroupSpec, limits: PeerLimits, scale: usize) -> Result<Checker, OpError> {
    let failed = |error: String| OpError::driver("check", error);
    let group = LocalGroup::join(spec, Duration::from_secs(60)).map_err(|error| failed(error.to_string()))?;
    let peer = Peer::new(&checker.gpu(), &Arc::new(group), limits, None)?;
    let peer = peer.ok_or_else(|| failed("threads do not reach each other's memory".to_owned()))?;
    let mut rank = Rank::new(checker, Arc::new(peer), SumOrder::OfRanks);
    let rounds = (0..ROUNDS).map(|index| round(&mut rank, index, scale)).collect::<Result<_, _>>()?;
    rank.run(rounds)?;
    Ok(rank.into_checker())
}

fn round(rank: &mut Rank, index: usize, scale: usize) -> Result<Round, OpError> {
    let element = FLOATS[rank.random().below(FLOATS.len())];
    match rank.random().below(5) {
        0 => {
            let rows = rank.random().below(4);
            let cols = (0..rank.world()).map(|_| rank.random().below(150 * scale)).collect();
            rank.gather(index, element, rows, cols)
        }
        1 => rank.replay(index),
        _ => {
            let len = LENGTHS[rank.random().below(LENGTHS.len())] * scale;
            rank.reduce(index, element, len)
        }
    }
}

/// NVIDIA's library with one rank, as far as one GPU can show: that its functions are what they are taken for.
#[cfg(feature = "cuda")]
fn library(c: &mut Checker) -> Result<(), OpError> {
    use crate::cuda::comm::{Comm, Nccl};

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
