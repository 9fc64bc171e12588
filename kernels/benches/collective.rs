//! Time of a sum over two ranks: how long a layer waits for the other half of it.
//!
//! `cargo bench -p kernels --bench collective`. The other rank is a thread with its own view of the memory, which comes
//! to each call as soon as it can. Bytes are those of the vector.

use divan::Bencher;
use divan::counter::BytesCount;
use kernels::collective::{GroupSpec, LocalGroup};

fn main() {
    divan::main();
}

/// Times `call` on rank 0 of `world`, while the others call it for as long as rank 0 is there.
fn ranks(
    bencher: Bencher<'_, '_>,
    world: usize,
    len: usize,
    call: impl Fn(&LocalGroup, &mut [f32]) -> bool + Sync,
) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let join = |rank| {
        let spec = GroupSpec { path: directory.path().join("group"), rank, world };
        LocalGroup::join(&spec, std::time::Duration::from_secs(10)).expect("joined")
    };
    std::thread::scope(|scope| {
        for rank in 1..world {
            let (join, call) = (&join, &call);
            scope.spawn(move || {
                let (group, mut data) = (join(rank), vec![1e-30; len]);
                while call(&group, &mut data) {}
            });
        }
        let (group, mut data) = (join(0), vec![1e-30; len]);
        bencher.bench_local(|| assert!(call(&group, &mut data), "all are there"));
        group.abort();
    });
}

/// A token of hidden size 1024, 16 tokens of it, a prompt of 1024 tokens.
#[divan::bench(args = [1024, 16 * 1024, 1024 * 1024], consts = [2, 4], sample_size = 20)]
fn all_reduce<const WORLD: usize>(bencher: Bencher<'_, '_>, len: usize) {
    let bencher = bencher.counter(BytesCount::of_many::<f32>(len));
    // Sums of sums would soon be infinite.
    ranks(bencher, WORLD, len, |group, data| {
        data.fill(1.0);
        group.all_reduce(data).is_ok()
    });
}

/// What every call costs at least.
#[divan::bench(consts = [2])]
fn barrier<const WORLD: usize>(bencher: Bencher<'_, '_>) {
    ranks(bencher, WORLD, 0, |group, _| group.barrier().is_ok());
}

/// The logits of a token: half of a vocabulary of 128256 from each rank.
#[divan::bench(sample_size = 20)]
fn all_gather_logits(bencher: Bencher<'_, '_>) {
    const HALF: usize = 64_128;
    ranks(bencher.counter(BytesCount::of_many::<f32>(2 * HALF)), 2, 2 * HALF, |group, out| {
        group.all_gather_columns(&[0.5; HALF], 1, &[HALF; 2], out).is_ok()
    });
}
