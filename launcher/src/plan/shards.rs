//! How many shards there are, and which part of the machine each gets.

use std::path::{Path, PathBuf};

use super::PlanInput;
use super::checks::PlanError;
use super::values::Derived;

/// The kind of device that computes. Each shard finds out for itself whether it can have it.
pub(super) fn device(input: PlanInput<'_>) -> Derived<&'static str> {
    const CUDA: &str = "cuda";
    match input.args.device.as_str() {
        "cpu" => Derived::new("cpu", "--device"),
        "cuda" => Derived::new(CUDA, "--device"),
        "emulated" => Derived::new("emulated", "--device"),
        _ if !cfg!(feature = "cuda") => Derived::new("cpu", "this program was built without CUDA"),
        _ if !input.machine.gpu_driver => Derived::new("cpu", "no driver of NVIDIA GPUs is loaded"),
        _ if input.machine.devices.as_ref().is_some_and(|devices| devices.count == 0) => {
            Derived::new("cpu", "the environment hides every GPU")
        }
        _ => Derived::new(CUDA, "the driver of NVIDIA GPUs is loaded"),
    }
}

/// The number of shards. On the CPU there are several only when they are asked for: one shard uses all cores as it is.
pub(super) fn shard_count(input: PlanInput<'_>) -> Result<Derived<usize>, PlanError> {
    let (args, devices) = (input.args, input.machine.devices.as_ref());
    match (args.sharded, args.num_shard) {
        (Some(true), Some(1)) => Err(PlanError::OneShard),
        (Some(true), None) => match devices {
            Some(devices) if devices.count > 1 => {
                Ok(Derived::new(devices.count, format!("--sharded true, devices in {}", devices.variable)))
            }
            Some(devices) => Err(PlanError::TooFewDevices {
                reason: format!("{} names {}", devices.variable, devices.count),
            }),
            None => Err(PlanError::TooFewDevices {
                reason: "no variable names any; set CUDA_VISIBLE_DEVICES or --num-shard".to_owned(),
            }),
        },
        (_, Some(count)) => Ok(Derived::new(count, "--num-shard")),
        (Some(false), None) => Ok(Derived::new(1, "--sharded false")),
        (None, None) if device(input).value == "cpu" => Ok(Derived::new(1, "one device: the CPU")),
        (None, None) => Ok(match devices.filter(|devices| devices.count > 0) {
            Some(devices) => Derived::new(devices.count, format!("devices in {}", devices.variable)),
            None => Derived::new(1, "no variable names devices: the first one is used"),
        }),
    }
}

/// Threads that compute, of all shards together.
pub(super) fn cpu_threads(input: PlanInput<'_>) -> Derived<usize> {
    match (input.args.cpu_threads, input.variables.thread_count()) {
        (Some(threads), _) => Derived::new(threads, "--cpu-threads"),
        (None, Some(threads)) => Derived::new(threads.get(), "OMP_NUM_THREADS"),
        (None, None) => Derived::new(input.machine.cores, "one per core this process may use"),
    }
}

/// Threads of each shard. The same for all: they wait for the slowest in every layer.
pub(super) fn shard_threads(threads: usize, shards: usize) -> Derived<usize> {
    match (threads / shards, threads % shards) {
        (_, _) if shards == 1 => Derived::new(threads, "one shard has all of cpu-threads"),
        (0, _) => Derived::new(1, format!("{shards} shards share {threads} cpu-threads; each needs one")),
        (each, 0) => Derived::new(each, format!("cpu-threads over {shards} shards")),
        (each, left) => Derived::new(
            each,
            format!("cpu-threads over {shards} shards, the same for all, which leaves {left}"),
        ),
    }
}

/// The socket of one shard.
pub(super) fn socket_path(prefix: &Path, rank: usize) -> PathBuf {
    with_ending(prefix, &rank.to_string())
}

/// The file at which several shards meet; each of them derives it from its `--uds-path` too.
pub(super) fn group_path(prefix: &Path) -> PathBuf {
    with_ending(prefix, "group")
}

fn with_ending(prefix: &Path, ending: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push("-");
    path.push(ending);
    path.into()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, plan, refusal};
    use super::*;
    use crate::env::VisibleDevices;

    fn count(words: &[&str], devices: Option<usize>) -> Result<(usize, String), PlanError> {
        let mut case = Case::new(words);
        case.machine.devices =
            devices.map(|count| VisibleDevices { count, variable: "CUDA_VISIBLE_DEVICES" });
        let derived = case.plan()?.values.shard_count;
        Ok((derived.value, derived.reason))
    }

    #[test]
    fn the_number_of_shards_is_what_was_asked_for() {
        for words in [&["--num-shard=3"][..], &["--num-shard=3", "--sharded=false"]] {
            assert_eq!(count(words, Some(8)).unwrap(), (3, "--num-shard".to_owned()));
        }
        assert_eq!(count(&["--num-shard=2", "--sharded=true"], None).unwrap().0, 2);
        assert_eq!(count(&["--sharded=false"], Some(8)).unwrap(), (1, "--sharded false".to_owned()));
    }

    #[test]
    fn the_cpu_is_not_split_unless_asked_for() {
        for devices in [None, Some(0), Some(1), Some(8)] {
            assert_eq!(count(&[], devices).unwrap(), (1, "one device: the CPU".to_owned()));
        }
    }

    #[test]
    fn a_model_on_gpus_is_split_over_those_that_the_environment_names() {
        let words = &["--device=cuda"];
        assert_eq!(count(words, Some(4)).unwrap(), (4, "devices in CUDA_VISIBLE_DEVICES".to_owned()));
        for devices in [None, Some(0)] {
            assert_eq!(count(words, devices).unwrap().0, 1);
        }
        assert_eq!(count(&["--device=cuda", "--sharded=false"], Some(4)).unwrap().0, 1);
    }

    #[test]
    fn a_gpu_is_taken_where_its_driver_is_loaded() {
        let mut case = Case::new(&[]);
        let expected = if cfg!(feature = "cuda") { "cuda" } else { "cpu" };
        assert_eq!(case.plan().unwrap().values.device.value, "cpu");
        case.machine.gpu_driver = true;
        assert_eq!(case.plan().unwrap().values.device.value, expected);
        case.machine.devices = Some(VisibleDevices { count: 0, variable: "CUDA_VISIBLE_DEVICES" });
        assert_eq!(case.plan().unwrap().values.device.value, "cpu");
    }

    #[test]
    fn sharded_means_all_devices_that_the_environment_names() {
        let derived = count(&["--sharded=true"], Some(4)).unwrap();
        assert_eq!(derived, (4, "--sharded true, devices in CUDA_VISIBLE_DEVICES".to_owned()));
        let reason = |devices| count(&["--sharded=true"], devices).unwrap_err().to_string();
        assert!(reason(Some(1)).ends_with("CUDA_VISIBLE_DEVICES names 1"), "{}", reason(Some(1)));
        assert!(reason(Some(0)).ends_with("CUDA_VISIBLE_DEVICES names 0"), "{}", reason(Some(0)));
        assert!(reason(None).contains("--num-shard"), "{}", reason(None));
    }

    #[test]
    fn one_shard_is_not_sharded() {
        let line = refusal(&["--sharded=true", "--num-shard=1"]);
        assert_eq!(line, "--sharded true needs more than one shard, but --num-shard is 1");
    }

    #[test]
    fn threads_are_the_cores_unless_given() {
        assert_eq!(plan(&[]).values.cpu_threads, Derived::new(6, "one per core this process may use"));
        assert_eq!(plan(&["--cpu-threads=3"]).values.cpu_threads, Derived::new(3, "--cpu-threads"));

        let mut case = Case::new(&[]);
        case.variables.omp_num_threads = Some("4,2".into());
        assert_eq!(case.plan().unwrap().values.cpu_threads, Derived::new(4, "OMP_NUM_THREADS"));
    }

    #[test]
    fn every_shard_has_as_many_threads_as_the_others() {
        let shared = |threads, shards| {
            let Derived { value, reason } = shard_threads(threads, shards);
            (value, reason)
        };
        assert_eq!(shared(6, 1).0, 6);
        assert_eq!(shared(6, 2), (3, "cpu-threads over 2 shards".to_owned()));
        assert_eq!(shared(7, 2).0, 3);
        assert!(shared(7, 2).1.ends_with("which leaves 1"));
        assert_eq!(shared(2, 4).0, 1);
    }
}
