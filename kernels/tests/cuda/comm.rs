//! Ranks that are threads: the way through the host, ranks that do not come, and arguments that do not fit.

use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};
use kernels::OpError;
use kernels::collective::{GroupSpec, LocalGroup};
use kernels::cuda::checks::{Finding, run_rank};
use kernels::cuda::comm::{Comm, Peer, PeerLimits, Staged, Way, connect};
use kernels::cuda::{Buffer, Gpu, Schedule};

const SOON: Duration = Duration::from_secs(60);

/// Runs `run` on one thread per rank, each with a device.
fn ranks(world: usize, run: impl Fn(&Arc<Gpu>, &Arc<LocalGroup>) + Sync) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("group");
    std::thread::scope(|scope| {
        for rank in 0..world {
            let (spec, run) = (GroupSpec { path: path.clone(), rank, world }, &run);
            scope.spawn(move || {
                let group = LocalGroup::join(&spec, SOON).expect("joined");
                run(&Gpu::emulated(Schedule::Forward), &Arc::new(group));
            });
        }
    });
}

fn peer(gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Peer {
    let limits = PeerLimits { slot_bytes: 1024, two_step_bytes: 512 };
    Peer::new(gpu, group, limits, None).expect("a connection").expect("memory that all reach")
}

/// What rank `rank` brings.
fn number(rank: usize, index: usize) -> f32 {
    (index as f32 - 3.0) / (rank as f32 + 1.5)
}

fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| number(rank, index)).collect()
}

#[test]
fn sums_through_the_host_are_those_of_the_numbers_that_the_type_holds() {
    ranks(3, |gpu, group| {
        let staged = Staged::new(gpu, group);
        let own = numbers(group.rank(), 20);

        let mut data = gpu.upload(&own).expect("memory");
        staged.all_reduce(data.all_mut()).expect("a sum");
        let sums: Vec<f32> = (0..20).map(|i| number(0, i) + number(1, i) + number(2, i)).collect();
        assert_eq!(data.read::<f32>().expect("read"), sums);

        let rounded: Vec<bf16> = own.iter().map(|number| bf16::from_f32(*number)).collect();
        let mut data = gpu.upload(&rounded).expect("memory");
        staged.all_reduce(data.all_mut().slice_mut(5..20)).expect("a sum of a part");
        let held = |rank, i| bf16::from_f32(number(rank, i)).to_f32();
        let sums: Vec<bf16> = (5..20).map(|i| bf16::from_f32(held(0, i) + held(1, i) + held(2, i))).collect();
        assert_eq!(data.read::<bf16>().expect("read"), [&rounded[..5], &sums].concat());

        let mut nothing = gpu.buffer(kernels::cuda::Element::F16, 0).expect("nothing");
        staged.all_reduce(nothing.all_mut()).expect("a sum of nothing");
        staged.barrier().expect("all are there");
    });
}

#[test]
fn columns_are_put_side_by_side_whichever_way_they_go() {
    ranks(3, |gpu, group| {
        let ways: [Arc<dyn Comm>; 2] = [Arc::new(Staged::new(gpu, group)), Arc::new(peer(gpu, group))];
        for way in ways {
            for (rows, cols) in [(2, [3, 0, 5]), (1, [4, 4, 4]), (3, [0, 0, 0])] {
                let row = |rank: usize, row: usize| {
                    (0..cols[rank]).map(move |col| f16::from_f32(number(rank, row * 7 + col)))
                };
                let own: Vec<f16> = (0..rows).flat_map(|index| row(group.rank(), index)).collect();
                let own: Buffer = gpu.upload(&own).expect("memory");
                let expected: Vec<f16> =
                    (0..rows).flat_map(|index| (0..3).flat_map(move |rank| row(rank, index))).collect();
                let mut out = gpu.buffer(own.element(), expected.len()).expect("memory");
                way.all_gather_columns(own.all(), rows, &cols, out.all_mut()).expect("columns");
                assert_eq!(out.read::<f16>().expect("read"), expected, "{}", way.description());
            }
            way.barrier().expect("all are there");
        }
    });
}

#[test]
fn two_ranks_hold_the_same_sums_and_columns_whichever_way_they_go() {
    ranks(2, |gpu, group| {
        for way in [Way::Best, Way::Peer, Way::Staged] {
            let comm = way.connect(gpu, group).expect("a connection").expect("a way that threads have");
            let findings = run_rank(gpu, group, (way, comm), 5000, 9).expect("both take part");
            let wrong: Vec<String> =
                findings.iter().filter(|finding| !finding.passes()).map(Finding::to_string).collect();
            assert!(findings.len() >= 30 && wrong.is_empty(), "{way}: {wrong:#?}");
        }
        assert!(Way::Nccl.connect(gpu, group).expect("an answer").is_none());
    });
}

#[test]
fn ranks_connect_the_best_way_that_all_have() {
    ranks(2, |gpu, group| {
        let comm = connect(gpu, group).expect("a connection");
        assert_eq!((comm.rank(), comm.world()), (group.rank(), 2));
        assert_eq!(comm.description(), "peer memory");
        let mut data = gpu.upload(&[1f32, 2.0]).expect("memory");
        comm.all_reduce(data.all_mut()).expect("a sum");
        assert_eq!(data.read::<f32>().expect("read"), [2.0, 4.0]);
        comm.barrier().expect("all are there");
    });
    ranks(9, |gpu, group| {
        let comm = connect(gpu, group).expect("a connection");
        assert_eq!(comm.description(), "through the host's memory");
        comm.barrier().expect("all are there");
    });
    ranks(1, |gpu, group| {
        let comm = connect(gpu, group).expect("a connection");
        let mut data = gpu.upload(&[1f32, 2.0]).expect("memory");
        comm.all_reduce(data.all_mut()).expect("a sum");
        assert_eq!(data.read::<f32>().expect("read"), [1.0, 2.0]);
    });
}

#[test]
fn a_device_does_not_wait_for_a_rank_that_has_given_up() {
    ranks(2, |gpu, group| {
        let peer = peer(gpu, group);
        let mut data = gpu.upload(&[1f32; 8]).expect("memory");
        peer.all_reduce(data.all_mut()).expect("a sum");
        peer.barrier().expect("all are there");
        if group.rank() == 1 {
            peer.abort();
            peer.all_reduce(data.all_mut()).expect_err("given up");
            return;
        }
        // The kernel waits for a rank that does not come, until the patrol has found that out. Or it is not started.
        let _ = peer.all_reduce(data.all_mut());
        let error = peer.check().expect_err("numbers that mean nothing");
        assert!(error.to_string().starts_with("check: "), "{error}");
        let error = peer.all_reduce(data.all_mut()).expect_err("for good");
        assert!(matches!(error, OpError::Driver { op: "all_reduce", .. }), "{error}");
        peer.barrier().expect_err("for good");
        gpu.synchronize().expect("the device itself is well");
    });
}

#[test]
fn a_device_does_not_wait_for_a_rank_that_is_gone() {
    ranks(2, |gpu, group| {
        let peer = peer(gpu, group);
        peer.barrier().expect("all are there");
        if group.rank() == 1 {
            return;
        }
        let mut data = gpu.upload(&[1f32; 8]).expect("memory");
        let _ = peer.all_reduce(data.all_mut());
        let error = peer.check().expect_err("numbers that mean nothing");
        assert_eq!(error.to_string(), "check: the process of rank 1 has ended");
    });
}

#[test]
fn what_does_not_fit_is_refused_before_anybody_waits() {
    ranks(2, |gpu, group| {
        let ways: [Arc<dyn Comm>; 2] = [Arc::new(Staged::new(gpu, group)), Arc::new(peer(gpu, group))];
        for way in ways {
            let mut words = gpu.upload(&[1u32; 4]).expect("memory");
            let error = way.all_reduce(words.all_mut()).expect_err("no floats");
            assert_eq!(error.to_string(), "all_reduce: not for elements of type U32");
            let own = gpu.upload(&[1f32; 4]).expect("memory");
            let mut out = gpu.upload(&[1f32; 7]).expect("memory");
            let error = way.all_gather_columns(own.all(), 2, &[2, 2], out.all_mut()).expect_err("no room");
            assert_eq!(error.to_string(), "all_gather_columns: out has 7 elements, 8 expected");
            let error = way.all_gather_columns(own.all(), 2, &[4], out.all_mut()).expect_err("one rank");
            assert_eq!(error.to_string(), "all_gather_columns: cols has 1 elements, 2 expected");
            way.barrier().expect("nothing has happened");
        }
        let staged = Staged::new(gpu, group);
        let mut data = gpu.upload(&[1f32; 4]).expect("memory");
        let error = gpu.capture(|| staged.all_reduce(data.all_mut())).expect_err("it waits");
        assert_eq!(error.to_string(), "all_reduce: not while a graph is captured");
    });
}
