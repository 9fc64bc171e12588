use thiserror::Error;

/// Why an operation was not carried out. Nothing was written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OpError {
    /// A length does not follow from the other arguments.
    #[error("{op}: {what} has {found} elements, {expected} expected")]
    Length {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What follows from the other arguments.
        expected: usize,
        /// What it is.
        found: usize,
    },
    /// An index points outside of what it indexes.
    #[error("{op}: {what} {index} is out of range, the limit is {limit}")]
    Index {
        /// The operation.
        op: &'static str,
        /// What kind of index.
        what: &'static str,
        /// The index.
        index: usize,
        /// The first index that does not exist.
        limit: usize,
    },
    /// Arguments that each make sense, but not together.
    #[error("{op}: {reason}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What does not fit.
        reason: String,
    },
}
