use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::GroupSpec;

/// Why a group was not joined, or a call was not carried out. After the latter, the group has failed for good.
#[derive(Debug, Error)]
pub enum GroupError {
    /// The group cannot exist.
    #[error("rank {rank} of {world}: a group has 1 to {} ranks, numbered from 0", GroupSpec::WORLD_MAX)]
    Spec {
        /// Who wanted to join.
        rank: usize,
        /// How many there would be.
        world: usize,
    },
    /// Not on this system.
    #[error("several processes for one model work on Linux only")]
    Unsupported,
    /// The system said no.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// The file of the group.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// A group that lives is there already.
    #[error("{}: another group with living processes uses this file", path.display())]
    InUse {
        /// The file of the group.
        path: PathBuf,
    },
    /// Somebody else is this rank.
    #[error("{}: there is a rank {rank} already", path.display())]
    RankTaken {
        /// The file of the group.
        path: PathBuf,
        /// The rank.
        rank: usize,
    },
    /// What lies there was not made by this user's rank 0.
    #[error("{}: not the file of a group: {reason}", path.display())]
    Foreign {
        /// The file of the group.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Processes of one group were told different numbers of ranks.
    #[error("{}: rank {rank} was started for {ours} ranks, rank 0 for {theirs}", path.display())]
    World {
        /// The file of the group.
        path: PathBuf,
        /// This process.
        rank: usize,
        /// The ranks it knows of.
        ours: usize,
        /// The ranks that rank 0 knows of.
        theirs: usize,
    },
    /// Processes of one group come from different builds, which need not compute the same.
    #[error("{}: rank {rank} is build {ours}, rank 0 is build {theirs}", path.display())]
    Build {
        /// The file of the group.
        path: PathBuf,
        /// This process.
        rank: usize,
        /// Its build.
        ours: String,
        /// The build of rank 0.
        theirs: String,
    },
    /// Some never came.
    #[error("{}: rank {rank} has waited {waited:?} for {} to join", path.display(), Ranks(missing))]
    Timeout {
        /// The file of the group.
        path: PathBuf,
        /// Who waited.
        rank: usize,
        /// Who did not come.
        missing: Vec<usize>,
        /// How long.
        waited: Duration,
    },
    /// The process of a rank has ended.
    #[error("the process of rank {rank} has ended")]
    PeerGone {
        /// Whose.
        rank: usize,
    },
    /// A rank has given up on the group.
    #[error("rank {rank} has given up")]
    Aborted {
        /// Who.
        rank: usize,
    },
    /// Ranks do different things.
    #[error("rank {rank} is at {ours}, but rank {peer} is at {theirs}")]
    Mismatch {
        /// This process.
        rank: usize,
        /// What it does.
        ours: Call,
        /// The other.
        peer: usize,
        /// What the other does.
        theirs: Call,
    },
    /// A length does not follow from the other arguments.
    #[error("{operation}: {what} has {found} elements, {expected} expected")]
    Length {
        /// The operation.
        operation: Operation,
        /// The argument.
        what: &'static str,
        /// What follows from the other arguments.
        expected: usize,
        /// What it is.
        found: usize,
    },
}

/// Rank numbers as a sentence has them.
struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.len() == 1 { "rank" } else { "ranks" })?;
        self.0
            .iter()
            .enumerate()
            .try_for_each(|(index, rank)| write!(f, "{} {rank}", if index == 0 { "" } else { "," }))
    }
}

/// What the ranks of a group do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Wait for each other.
    Barrier,
    /// Agree on the least of their numbers.
    Least,
    /// Tell the others bytes.
    Broadcast,
    /// Sum vectors.
    AllReduce,
    /// Put columns side by side.
    AllGatherColumns,
}

impl Operation {
    /// How it is written in shared memory.
    pub(super) fn number(self) -> u64 {
        match self {
            Operation::Barrier => 1,
            Operation::AllReduce => 2,
            Operation::AllGatherColumns => 3,
            Operation::Least => 4,
            Operation::Broadcast => 5,
        }
    }

    /// Reads what [`number`](Self::number) wrote. None when nobody did.
    pub(super) fn from_number(number: u64) -> Option<Self> {
        use Operation::{AllGatherColumns, AllReduce, Barrier, Broadcast, Least};
        [Barrier, AllReduce, AllGatherColumns, Least, Broadcast]
            .into_iter()
            .find(|operation| operation.number() == number)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Barrier => "barrier",
            Operation::Least => "least",
            Operation::Broadcast => "broadcast",
            Operation::AllReduce => "all_reduce",
            Operation::AllGatherColumns => "all_gather_columns",
        })
    }
}

/// One call that all ranks of a group have to make alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// How many calls this rank had made before.
    pub index: u64,
    /// What it is for, as the rank has said last with [`set_work`](super::LocalGroup::set_work).
    pub work: u64,
    /// What it is. None when a rank has written nonsense into the shared memory.
    pub operation: Option<Operation>,
    /// Rows of the result; of a broadcast, the rank whose bytes they are.
    pub rows: u64,
    /// Columns of the result: of one row, the elements of a sum, or the bytes of a broadcast.
    pub cols: u64,
    /// A hash of how the columns are divided between the ranks.
    pub division: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self { index, work, rows, cols, division, .. } = self;
        write!(f, "call {index} for work {work:x}, ")?;
        match self.operation {
            Some(operation @ (Operation::Barrier | Operation::Least)) => write!(f, "{operation}"),
            Some(operation @ Operation::Broadcast) => {
                write!(f, "{operation} of {cols} bytes from rank {rows}")
            }
            Some(operation @ Operation::AllReduce) => {
                write!(f, "{operation} of {cols} elements")
            }
            Some(operation @ Operation::AllGatherColumns) => {
                write!(f, "{operation} of {rows} rows and {cols} columns (division {division:x})")
            }
            None => f.write_str("which no build of this program makes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_names_who_is_missing() {
        let error = |missing| GroupError::Timeout {
            path: "/run/group".into(),
            rank: 0,
            missing,
            waited: Duration::from_secs(2),
        };
        assert_eq!(error(vec![1, 3]).to_string(), "/run/group: rank 0 has waited 2s for ranks 1, 3 to join");
        assert_eq!(error(vec![2]).to_string(), "/run/group: rank 0 has waited 2s for rank 2 to join");
    }

    #[test]
    fn a_mismatch_names_both_calls() {
        let call = |operation, rows, cols| Call {
            index: 7,
            work: 255,
            operation: Some(operation),
            rows,
            cols,
            division: 0,
        };
        let error = GroupError::Mismatch {
            rank: 1,
            ours: call(Operation::AllReduce, 1, 4096),
            peer: 0,
            theirs: call(Operation::AllGatherColumns, 2, 512),
        };
        assert_eq!(
            error.to_string(),
            "rank 1 is at call 7 for work ff, all_reduce of 4096 elements, \
             but rank 0 is at call 7 for work ff, all_gather_columns of 2 rows and 512 columns (division 0)"
        );
    }
}
