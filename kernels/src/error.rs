use thiserror::Error;

/// Why an operation was not carried out. Nothing was written, unless the device has failed.
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
    /// The device has no room for what is asked for.
    #[error("{op}: no memory for {bytes} bytes on the device, {free} are free")]
    Memory {
        /// The operation.
        op: &'static str,
        /// What is asked for.
        bytes: usize,
        /// What there is.
        free: usize,
    },
    /// The driver, or a library for the device, is missing or cannot do this. The device goes on.
    #[error("{op}: {reason}")]
    Driver {
        /// The operation.
        op: &'static str,
        /// What it says.
        reason: String,
    },
    /// The device has failed. What runs on it later fails too: the process has to end.
    #[error("{op}: {reason}")]
    Device {
        /// The operation.
        op: &'static str,
        /// What the driver says.
        reason: String,
    },
}

impl OpError {
    pub(crate) fn unsupported(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Unsupported { op, reason: reason.into() }
    }

    #[cfg(any(feature = "cuda", feature = "emulation"))]
    pub(crate) fn driver(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Driver { op, reason: reason.into() }
    }

    #[cfg(any(feature = "cuda", feature = "emulation"))]
    pub(crate) fn device(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Device { op, reason: reason.into() }
    }
}

/// The argument `what` of `op` must have `expected` elements.
pub(crate) fn check_length(
    op: &'static str,
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), OpError> {
    if found == expected { Ok(()) } else { Err(OpError::Length { op, what, expected, found }) }
}

/// The argument `what` of `op` must consist of whole rows of `width` elements: answers how many.
///
/// Rows without elements cannot be counted; then there are none, and an empty argument is right.
pub(crate) fn check_rows(
    op: &'static str,
    what: &'static str,
    width: usize,
    found: usize,
) -> Result<usize, OpError> {
    let rows = found.checked_div(width).unwrap_or(0);
    check_length(op, what, rows * width, found)?;
    Ok(rows)
}

/// Every one of `indices` must be below `limit`.
pub(crate) fn check_indices(
    op: &'static str,
    what: &'static str,
    indices: &[u32],
    limit: usize,
) -> Result<(), OpError> {
    // The maximum of a slice is vector code; looking for the culprit is not.
    match indices.iter().copied().max() {
        Some(largest) if largest as usize >= limit => {
            Err(OpError::Index { op, what, index: largest as usize, limit })
        }
        _ => Ok(()),
    }
}
