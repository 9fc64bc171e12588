//! Requests that may have made the shards fail.
//!
//! Whoever took part in a pass that failed is a suspect. Most are innocent, and mostly the failure had nothing to do with
//! any of them: so a suspect that had been generating goes on with all others. One that was only beginning, or that takes
//! part in a second failure before it has got anywhere, is tried: its passes are its own, while the others sit them out.
//! If two of those fail, the request is answered with an error, and cannot take anybody down again; one alone may still
//! have had another cause. A token that it gets, in any company, clears it.

use proto::units::TokenCount;

/// Passes of its own that fail until a request is taken for the cause.
const FAILURES_MAX: u8 = 2;

/// What is known of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing against it.
    #[default]
    Clear,
    /// It took part in a pass that failed.
    Suspect,
    /// It computes alone until it gets a token. So many of its own passes have failed.
    Tried(u8),
}

impl Standing {
    /// After a pass that failed, in which this request took part; `generated` tokens of it were there before. `None` if it is
    /// the cause.
    pub(super) fn after_failure(self, generated: TokenCount) -> Option<Self> {
        match self {
            Self::Clear if generated > TokenCount(0) => Some(Self::Suspect),
            Self::Clear | Self::Suspect => Some(Self::Tried(0)),
            Self::Tried(failures) => (failures + 1 < FAILURES_MAX).then_some(Self::Tried(failures + 1)),
        }
    }

    /// Whether its passes are its own.
    pub(super) fn is_tried(self) -> bool {
        matches!(self, Self::Tried(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(generated: u32) -> Vec<Standing> {
        let next = |standing: &Standing| standing.after_failure(TokenCount(generated));
        std::iter::successors(Some(Standing::Clear), next).collect()
    }

    #[test]
    fn a_request_that_had_only_begun_is_tried_at_once() {
        assert_eq!(failures(0), [Standing::Clear, Standing::Tried(0), Standing::Tried(1)]);
    }

    #[test]
    fn a_request_that_was_generating_goes_on_in_company_first() {
        let expected = [Standing::Clear, Standing::Suspect, Standing::Tried(0), Standing::Tried(1)];
        assert_eq!(failures(5), expected);
    }
}
