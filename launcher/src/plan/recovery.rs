//! What happens when a child dies or hangs.

use super::PlanInput;
use super::values::Derived;
use crate::args::OnShardFailure;

/// When children are started again, and when no more.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// `restart`, or `exit`: everything ends.
    pub on_shard_failure: Derived<&'static str>,
    /// Restarts in a row, without a step of the model in between; 0 when there are none.
    pub max_shard_restarts: Derived<u32>,
    /// Seconds after which a step may count as hung; 0 when none does.
    pub step_timeout: Derived<f64>,
}

impl Recovery {
    pub(super) fn derive(input: PlanInput<'_>) -> Self {
        let args = input.args;
        let (on_shard_failure, max_shard_restarts) = match (args.on_shard_failure, args.max_shard_restarts) {
            (OnShardFailure::Exit, _) => {
                (Derived::new("exit", "--on-shard-failure"), Derived::new(0, "--on-shard-failure exit"))
            }
            (OnShardFailure::Restart, 0) => {
                (Derived::new("exit", "--max-shard-restarts 0"), Derived::new(0, "--max-shard-restarts"))
            }
            (OnShardFailure::Restart, max) => (
                Derived::new("restart", "--on-shard-failure: all shards start again, requests go on"),
                Derived::new(max, "--max-shard-restarts, in a row without a step in between"),
            ),
        };
        let step_timeout = match args.step_timeout {
            0.0 => Derived::new(0.0, "--step-timeout 0: no step counts as hung"),
            seconds => Derived::new(
                seconds,
                "--step-timeout, in seconds; more where eight times the longest usual step is more",
            ),
        };
        Self { on_shard_failure, max_shard_restarts, step_timeout }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::plan;

    fn recovery(words: &[&str]) -> (&'static str, u32) {
        let recovery = plan(words).values.recovery;
        (recovery.on_shard_failure.value, recovery.max_shard_restarts.value)
    }

    #[test]
    fn shards_are_started_again_ten_times_in_a_row_unless_said_otherwise() {
        assert_eq!(recovery(&[]), ("restart", 10));
        assert_eq!(recovery(&["--max-shard-restarts=3"]), ("restart", 3));
    }

    #[test]
    fn no_restarts_means_the_end_however_it_is_said() {
        let both = ["--on-shard-failure=exit", "--max-shard-restarts=3"];
        for words in [&both[..1], &both[..], &["--max-shard-restarts=0"]] {
            assert_eq!(recovery(words), ("exit", 0), "{words:?}");
        }
    }
}
