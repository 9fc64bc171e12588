//! Ranks for the tests of groups: threads, and processes that run this test program again.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use kernels::collective::{GroupSpec, LocalGroup};

/// What happens at once happens within this, on a busy machine too.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Numbers that depend on the seed alone (xorshift, Marsaglia 2003).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// What a rank brings to a call. Of different sizes, so that the order of a sum shows in its bits.
pub(crate) fn numbers_of(seed: u64, rank: usize, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed.wrapping_mul(31).wrapping_add(rank as u64));
    let number =
        |_| (random.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0) * 10f32.powi(random.below(7) as i32);
    (0..len).map(number).collect()
}

/// The sum over all ranks, one after another.
pub(crate) fn plain_sum(seed: u64, world: usize, len: usize) -> Vec<f32> {
    let mut sum = numbers_of(seed, 0, len);
    for rank in 1..world {
        for (sum, number) in sum.iter_mut().zip(numbers_of(seed, rank, len)) {
            *sum += number;
        }
    }
    sum
}

/// The columns of all ranks, element by element.
pub(crate) fn plain_gather(seed: u64, rows: usize, cols: &[usize]) -> Vec<f32> {
    let parts: Vec<_> =
        cols.iter().enumerate().map(|(rank, width)| numbers_of(seed, rank, rows * width)).collect();
    let mut out = Vec::new();
    for row in 0..rows {
        for (part, width) in parts.iter().zip(cols) {
            out.extend((0..*width).map(|col| part[row * width + col]));
        }
    }
    out
}

pub(crate) fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Runs `run` on one thread per rank, each with its own view of the memory.
pub(crate) fn threads(world: usize, run: impl Fn(&LocalGroup) + Sync) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("group");
    std::thread::scope(|scope| {
        for rank in 0..world {
            let (spec, run) = (GroupSpec { path: path.clone(), rank, world }, &run);
            scope.spawn(move || run(&LocalGroup::join(&spec, SOON).expect("joined")));
        }
    });
}

const ROLE: &str = "RANK_PROCESS_ROLE";

/// A process that runs the test `rank_process` of this program.
pub(crate) struct Child(std::process::Child);

impl Child {
    pub(crate) fn start(role: &str, spec: &GroupSpec) -> Self {
        let value = format!("{role}|{}|{}|{}", spec.rank, spec.world, spec.path.display());
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.args(["--exact", "rank_process", "--nocapture"]).env(ROLE, value).stdout(Stdio::null());
        Self(command.spawn().expect("started"))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// SIGKILL, and no wait: it may stay a zombie.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("killed");
    }

    pub(crate) fn expect_success(mut self) {
        assert!(self.0.wait().expect("waited for").success());
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What this process was started for, if it is such a [`Child`].
pub(crate) fn role() -> Option<(String, GroupSpec)> {
    let value = std::env::var(ROLE).ok()?;
    let mut parts = value.splitn(4, '|');
    let mut next = || parts.next().expect("four parts").to_owned();
    let role = next();
    let [rank, world] = [(); 2].map(|()| next().parse().expect("a number"));
    Some((role, GroupSpec { path: PathBuf::from(next()), rank, world }))
}
