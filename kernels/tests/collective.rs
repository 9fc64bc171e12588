//! Processes and threads that sum and gather through shared memory.
#![cfg(target_os = "linux")]

mod ranks;

use std::time::{Duration, Instant};

use kernels::collective::{GroupError, GroupSpec, LocalGroup, Operation};
use ranks::{Child, SOON, bits, numbers_of, plain_gather, plain_sum, threads};

/// Nothing, one, odd, a chunk and its neighbours, several chunks with a rest.
const LENGTHS: [usize; 9] = [0, 1, 7, 4096, 8191, 8192 + 5, 65_535, 65_537, 200_003];

const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];

/// Every rank runs a long list of calls that follows from `seed`, and compares each with plain loops.
fn exercise(group: &LocalGroup, seed: u64, calls: usize) -> Result<(), GroupError> {
    let (rank, world) = (group.rank(), group.world());
    let mut random = ranks::Random::new(seed);
    let mut pauses = ranks::Random::new(seed + 1 + rank as u64);
    for call in 0..calls as u64 {
        let seed = seed ^ (call << 32);
        // Each rank comes at another time: awake, asleep, first or last.
        (0..pauses.below(4)).for_each(|_| std::thread::yield_now());
        match random.below(3) {
            0 => group.barrier()?,
            1 => {
                let len = random.below(20_000);
                let mut data = numbers_of(seed, rank, len);
                group.all_reduce(&mut data)?;
                assert_eq!(bits(&data), bits(&plain_sum(seed, world, len)), "call {call}, {len} numbers");
            }
            _ => {
                let rows = random.below(5);
                let cols: Vec<usize> = (0..world).map(|_| random.below(3000)).collect();
                let own = numbers_of(seed, rank, rows * cols[rank]);
                let mut out = vec![f32::NAN; rows * cols.iter().sum::<usize>()];
                group.all_gather_columns(&own, rows, &cols, &mut out)?;
                assert_eq!(bits(&out), bits(&plain_gather(seed, rows, &cols)), "call {call}, {cols:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_sum_has_the_bits_of_a_plain_loop_on_every_rank() {
    for world in WORLDS {
        threads(world, |group| {
            for len in LENGTHS {
                let mut data = numbers_of(len as u64, group.rank(), len);
                group.all_reduce(&mut data).expect("a sum");
                assert!(bits(&data) == bits(&plain_sum(len as u64, world, len)), "{world} ranks, {len}");
            }
        });
    }
}

#[test]
fn gathered_columns_lie_side_by_side() {
    for world in WORLDS {
        threads(world, |group| {
            for (rows, width) in [(0, 5), (1, 1), (3, 7), (1, 70_001), (5, 30_011), (300, 997)] {
                // Each rank has another width; one has none.
                let cols: Vec<usize> = (0..world).map(|rank| width * rank.abs_diff(1)).collect();
                let own = numbers_of(9, group.rank(), rows * cols[group.rank()]);
                let mut out = vec![f32::NAN; rows * cols.iter().sum::<usize>()];
                group.all_gather_columns(&own, rows, &cols, &mut out).expect("a gather");
                assert!(bits(&out) == bits(&plain_gather(9, rows, &cols)), "{rows} rows of {cols:?}");
            }
        });
    }
}

#[test]
fn long_lists_of_calls_agree_with_plain_loops() {
    for (seed, world) in WORLDS.into_iter().enumerate() {
        threads(world, |group| exercise(group, seed as u64, 150).expect("every call"));
    }
}

#[test]
fn processes_agree_with_plain_loops() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("group");
    for world in [2, 4] {
        let children: Vec<_> = (0..world)
            .map(|rank| Child::start("exercise", &GroupSpec { path: path.clone(), rank, world }))
            .collect();
        children.into_iter().for_each(Child::expect_success);
        assert!(!path.exists(), "the file is taken away when all have come");
    }
    assert_eq!(directory.path().read_dir().expect("a directory").count(), 0, "and nothing else is left");
}

/// What a process does that these tests start: nothing, unless it is one.
#[test]
fn rank_process() {
    let Some((role, spec)) = ranks::role() else { return };
    let group = LocalGroup::join(&spec, SOON).expect("joined");
    match role.as_str() {
        "exercise" => exercise(&group, 5, 200).expect("every call"),
        "sum until killed" => loop {
            group.all_reduce(&mut [1.0; 4096]).expect("a sum");
        },
        "wait" => {
            // The test does not come to this barrier before it has looked at this process.
            group.barrier().expect("the end of the wait");
        }
        other => panic!("no role {other}"),
    }
}

#[test]
fn the_death_of_a_process_ends_the_calls_of_the_others() {
    let directory = tempfile::tempdir().expect("a directory");
    let spec = |rank| GroupSpec { path: directory.path().join("group"), rank, world: 3 };
    let mut child = Child::start("sum until killed", &spec(2));
    let survivor = |rank| {
        let spec = spec(rank);
        std::thread::spawn(move || {
            let group = LocalGroup::join(&spec, SOON).expect("joined");
            let mut sums = 0;
            loop {
                match group.all_reduce(&mut [1.0; 4096]) {
                    Ok(()) => sums += 1,
                    Err(error) => {
                        break (Instant::now(), sums, error, group.barrier().expect_err("failed for good"));
                    }
                }
                if sums == 100 && rank == 0 {
                    child_signal(&spec);
                }
            }
        })
    };
    let survivors = [survivor(0), survivor(1)];
    wait_for_file(&signal_path(&spec(0)));
    child.kill();
    let killed = Instant::now();
    for survivor in survivors {
        let (ended, sums, error, after) = survivor.join().expect("no panic");
        assert!(sums >= 99, "{sums} sums before");
        assert!(matches!(error, GroupError::PeerGone { rank: 2 }), "{error}");
        assert!(matches!(after, GroupError::PeerGone { rank: 2 }), "{after}");
        let late = ended.saturating_duration_since(killed);
        assert!(late < Duration::from_secs(1), "{late:?}");
    }
}

fn signal_path(spec: &GroupSpec) -> std::path::PathBuf {
    spec.path.with_extension("hundred")
}

fn child_signal(spec: &GroupSpec) {
    std::fs::write(signal_path(spec), "").expect("a file");
}

fn wait_for_file(path: &std::path::Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < SOON, "{} never came", path.display());
        std::thread::yield_now();
    }
}

#[test]
fn giving_up_ends_the_calls_of_the_others() {
    threads(3, |group| {
        group.barrier().expect("all are there");
        if group.rank() == 1 {
            group.abort();
            assert!(matches!(group.barrier(), Err(GroupError::Aborted { rank: 1 })));
        } else {
            let error = group.all_reduce(&mut [0.0; 5]).expect_err("rank 1 does not come");
            assert!(matches!(error, GroupError::Aborted { rank: 1 }), "{error}");
        }
    });
}

#[test]
fn a_panic_between_calls_is_seen_as_the_end_of_the_rank() {
    let directory = tempfile::tempdir().expect("a directory");
    let spec = |rank| GroupSpec { path: directory.path().join("group"), rank, world: 2 };
    let (ours, theirs) = (spec(0), spec(1));
    let other = std::thread::spawn(move || {
        let _group = LocalGroup::join(&theirs, SOON).expect("joined");
        std::panic::resume_unwind(Box::new("the step of this rank"));
    });
    let group = LocalGroup::join(&ours, SOON).expect("joined");
    let error = group.barrier().expect_err("rank 1 is gone");
    assert!(matches!(error, GroupError::PeerGone { rank: 1 }), "{error}");
    other.join().expect_err("the panic");
}

#[test]
fn different_calls_are_told_to_both_sides() {
    threads(2, |group| {
        group.barrier().expect("the same call");
        let error = match group.rank() {
            0 => group.all_reduce(&mut [1.0; 3]),
            _ => group.all_gather_columns(&[1.0; 2], 1, &[2, 2], &mut [0.0; 4]),
        };
        let error = error.expect_err("different calls");
        let GroupError::Mismatch { rank, ours, peer, theirs } = &error else { panic!("{error}") };
        assert_eq!((*rank, *peer), (group.rank(), 1 - group.rank()));
        let reduce = if group.rank() == 0 { ours } else { theirs };
        let gather = if group.rank() == 0 { theirs } else { ours };
        assert_eq!((reduce.operation, reduce.index, reduce.cols), (Some(Operation::AllReduce), 1, 3));
        assert_eq!((gather.operation, gather.rows, gather.cols), (Some(Operation::AllGatherColumns), 1, 4));
        assert!(group.barrier().is_err(), "a group that has failed stays failed");
    });
}

#[test]
fn the_least_number_is_found_whatever_its_bits() {
    threads(3, |group| {
        let offers = [u64::MAX, 0x7f80_0001_7fc0_0001, 0x7f80_0001_ffff_ffff];
        assert_eq!(group.least(offers[group.rank()]).expect("a number"), offers[1]);
        assert_eq!(group.least(7 - group.rank() as u64).expect("a number"), 5);
    });
}

#[test]
fn everybody_is_told_the_same_bytes() {
    threads(3, |group| {
        // Nothing, parts of a word, and more than fits at once.
        for len in [0, 1, 3, 4, 128, 262_144, 600_001] {
            for root in 0..3 {
                let byte = |index: usize| (index * 7 + root + len) as u8;
                let mut bytes = vec![0xffu8; len];
                if group.rank() == root {
                    bytes = (0..len).map(byte).collect();
                }
                group.broadcast_bytes(root, &mut bytes).expect("a broadcast");
                assert!(bytes.iter().enumerate().all(|(index, found)| *found == byte(index)), "{len}");
            }
        }
        // Who is told by whom has to be agreed.
        let error = group.broadcast_bytes(group.rank().min(1), &mut [0; 4]).expect_err("two roots");
        assert!(matches!(error, GroupError::Mismatch { .. } | GroupError::Aborted { .. }), "{error}");
    });
}

#[test]
fn who_waits_elsewhere_can_ask_whether_all_are_there() {
    let directory = tempfile::tempdir().expect("a directory");
    let waiting = Child::start("wait", &spec_in(&directory, 1, 2));
    let group = LocalGroup::join(&spec_in(&directory, 0, 2), SOON).expect("joined");
    group.check().expect("both are there");
    drop(waiting);
    assert!(matches!(group.check(), Err(GroupError::PeerGone { rank: 1 })));
    assert!(matches!(group.barrier(), Err(GroupError::PeerGone { rank: 1 })));
}

#[test]
fn the_same_call_for_different_work_is_told_to_both_sides() {
    threads(2, |group| {
        group.set_work(5);
        group.all_reduce(&mut [1.0; 3]).expect("the same work");
        group.set_work(6 + group.rank() as u64);
        let error = group.all_reduce(&mut [1.0; 3]).expect_err("different work");
        let GroupError::Mismatch { ours, theirs, .. } = &error else { panic!("{error}") };
        assert_eq!(ours.work + theirs.work, 13);
    });
}

#[test]
fn sums_of_different_lengths_are_told_to_both_sides() {
    threads(2, |group| {
        let mut data = vec![1.0; if group.rank() == 0 { 70_000 } else { 69_999 }];
        let error = group.all_reduce(&mut data).expect_err("different lengths");
        assert!(matches!(error, GroupError::Mismatch { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("70000") && text.contains("69999"), "{text}");
    });
}

#[test]
fn a_wrong_length_is_named_and_ends_the_calls_of_the_others() {
    threads(2, |group| {
        let own = vec![0.0; if group.rank() == 0 { 4 } else { 3 }];
        let error = group.all_gather_columns(&own, 2, &[2, 2], &mut [0.0; 8]).expect_err("a wrong length");
        match group.rank() {
            0 => assert!(matches!(error, GroupError::Aborted { rank: 1 }), "{error}"),
            _ => assert_eq!(error.to_string(), "all_gather_columns: own has 3 elements, 4 expected"),
        }
    });
}

/// A directory with one spec of rank `rank` of `world` in it.
fn spec_in(directory: &tempfile::TempDir, rank: usize, world: usize) -> GroupSpec {
    GroupSpec { path: directory.path().join("group"), rank, world }
}

const AT_ONCE: Duration = Duration::from_millis(1);

#[test]
fn who_waits_in_vain_is_told_for_whom() {
    let directory = tempfile::tempdir().expect("a directory");
    for rank in [0, 1] {
        let error = LocalGroup::join(&spec_in(&directory, rank, 3), AT_ONCE).expect_err("nobody comes");
        let GroupError::Timeout { missing, .. } = &error else { panic!("{error}") };
        assert_eq!(*missing, if rank == 0 { vec![1, 2] } else { vec![0] });
        assert_eq!(directory.path().read_dir().expect("a directory").count(), 0, "nothing is left");
    }
}

#[test]
fn the_file_of_a_killed_run_is_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = spec_in(&directory, 0, 2).path;
    // Rank 0 waits for a rank 1 that never comes, and is killed.
    let mut child = Child::start("exercise", &spec_in(&directory, 0, 2));
    wait_for_file(&path);
    let living = LocalGroup::join(&spec_in(&directory, 0, 2), SOON).expect_err("its rank 0 lives");
    assert!(matches!(living, GroupError::InUse { .. }), "{living}");
    child.kill();
    drop(child);
    assert!(path.exists(), "it could not take its file away");
    let error = LocalGroup::join(&spec_in(&directory, 1, 2), AT_ONCE).expect_err("only a stale file");
    assert!(matches!(&error, GroupError::Timeout { missing, .. } if *missing == [0]), "{error}");
    let other = Child::start("exercise", &spec_in(&directory, 1, 2));
    exercise(&LocalGroup::join(&spec_in(&directory, 0, 2), SOON).expect("joined"), 5, 200)
        .expect("every call");
    other.expect_success();
}

#[test]
fn ranks_that_disagree_on_their_number_are_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let two = spec_in(&directory, 0, 2);
    let zero =
        std::thread::spawn(move || LocalGroup::join(&two, SOON).expect_err("rank 1 is of another group"));
    let error = LocalGroup::join(&spec_in(&directory, 1, 3), SOON).expect_err("another number");
    assert!(matches!(error, GroupError::World { rank: 1, ours: 3, theirs: 2, .. }), "{error}");
    let error = zero.join().expect("no panic");
    assert!(matches!(error, GroupError::Aborted { rank: 1 }), "{error}");
}

#[test]
fn a_rank_exists_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let (refused, refusals) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        // Rank 1 twice; both need rank 2 to come, and one of them is told before that.
        let ranks = [0, 1, 1].map(|rank| {
            let (spec, refused) = (spec_in(&directory, rank, 3), refused.clone());
            scope.spawn(move || LocalGroup::join(&spec, SOON).map_err(|error| refused.send(error)).ok())
        });
        let error = refusals.recv_timeout(SOON).expect("a refusal");
        assert!(matches!(error, GroupError::RankTaken { rank: 1, .. }), "{error}");
        // Nobody leaves before all have met: a rank that is gone would be missed.
        let two = LocalGroup::join(&spec_in(&directory, 2, 3), SOON).expect("joined");
        let met: Vec<LocalGroup> =
            ranks.into_iter().filter_map(|rank| rank.join().expect("no panic")).collect();
        assert_eq!(met.len(), 2, "{:?}", refusals.try_recv());
        drop(two);
    });
}

#[test]
fn a_file_that_no_rank_made_is_not_joined() {
    let directory = tempfile::tempdir().expect("a directory");
    let spec = spec_in(&directory, 1, 2);
    std::os::unix::fs::symlink("/dev/null", &spec.path).expect("a link");
    let error = LocalGroup::join(&spec, AT_ONCE).expect_err("a link");
    assert!(matches!(error, GroupError::Io { .. }), "{error}");
    for (rank, world) in [(0, 0), (2, 2), (0, 65)] {
        let error = LocalGroup::join(&spec_in(&directory, rank, world), AT_ONCE).expect_err("no such rank");
        assert!(matches!(error, GroupError::Spec { .. }), "{error}");
    }
}

#[test]
fn the_file_is_for_its_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let path = spec_in(&directory, 0, 2).path;
    let _child = Child::start("exercise", &spec_in(&directory, 0, 2));
    wait_for_file(&path);
    let mode = path.metadata().expect("the file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Processor time that a process has used, in ticks of a hundredth of a second.
fn ticks_of(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it lives");
    let fields: Vec<&str> =
        text.rsplit(')').next().expect("its name in brackets").split_whitespace().collect();
    // Of all fields, number 14 and 15; these start with number 3.
    fields[11].parse::<u64>().expect("user time") + fields[12].parse::<u64>().expect("system time")
}

#[test]
fn who_waits_sleeps() {
    let directory = tempfile::tempdir().expect("a directory");
    let waiting = Child::start("wait", &spec_in(&directory, 1, 2));
    let group = LocalGroup::join(&spec_in(&directory, 0, 2), SOON).expect("joined");
    let before = ticks_of(waiting.id());
    // The length of the measurement, not a wait for something: it may start before the other is in its barrier.
    std::thread::sleep(Duration::from_millis(700));
    let used = ticks_of(waiting.id()) - before;
    assert!(used <= 3, "{used} hundredths of a second in 0.7 s");
    group.barrier().expect("the end of the wait");
    waiting.expect_success();
}
