use std::thread;
use std::time::Duration;

use kernels::collective::{GroupSpec, LocalGroup};
use shard::collective::Ranks;

/// Runs one closure per rank, each on a thread of its own, and returns what they return, in the order of the ranks.
pub(crate) fn run<T: Send>(world: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let path = directory.path().join("group");
    thread::scope(|scope| {
        let join = |rank| {
            let (path, work) = (path.clone(), &work);
            scope.spawn(move || {
                let spec = GroupSpec { path, rank, world };
                let group = LocalGroup::join(&spec, Duration::from_secs(30)).expect("all ranks come");
                work(Ranks::of(group))
            })
        };
        let ranks: Vec<_> = (0..world).map(join).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}
