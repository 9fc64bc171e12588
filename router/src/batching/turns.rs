//! Whose turn it is: may new rows join the running ones in the step being planned?
//!
//! Always, if prompts can be cut. Otherwise every admission stops the running rows for a pass, and two thresholds on
//! counts decide when that is worth it.

use super::budget::PromptPolicy;
use super::plan::JoinReason;

/// Decides between prompts and output, and remembers how long prompts have waited.
#[derive(Debug)]
pub(super) struct Turns {
    policy: PromptPolicy,
    /// Steps since the last admission, that one included.
    waited: u32,
    /// Who had the last pass.
    company: Company,
}

/// Who takes part in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Company {
    /// All but those that are tried.
    Others,
    /// One that is tried.
    Tried,
}

/// A step that may admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    /// Fewer are not worth it.
    pub(super) at_least: usize,
    /// For the metrics; `None` if nothing runs.
    pub(super) reason: Option<JoinReason>,
}

impl Turns {
    pub(super) fn new(policy: PromptPolicy) -> Self {
        Self { policy, waited: 0, company: Company::Others }
    }

    /// Whether rows may be admitted while `running` rows run.
    pub(super) fn opening(&self, running: usize) -> Option<Opening> {
        if running == 0 {
            return Some(Opening { at_least: 1, reason: None });
        }
        match self.policy {
            PromptPolicy::Chunked => Some(Opening { at_least: 1, reason: Some(JoinReason::Chunking) }),
            // The rows admitted last have not joined the others yet: only a decode joins them.
            PromptPolicy::Whole { .. } if self.waited <= 1 => None,
            PromptPolicy::Whole { max_waiting_tokens, .. } if self.waited >= max_waiting_tokens => {
                Some(Opening { at_least: 1, reason: Some(JoinReason::WaitExceeded) })
            }
            PromptPolicy::Whole { waiting_served_ratio, .. } => {
                let worth_it = (running as f32 * waiting_served_ratio) as usize;
                Some(Opening { at_least: worth_it.max(1), reason: Some(JoinReason::Backpressure) })
            }
        }
    }

    /// Whose turn it is when requests are `tried`, and `others` are there, too.
    pub(super) fn company(&mut self, tried: bool, others: bool) -> Company {
        self.company = match (tried, others, self.company) {
            (false, ..) | (true, true, Company::Tried) => Company::Others,
            (true, false, _) | (true, true, Company::Others) => Company::Tried,
        };
        self.company
    }

    /// A step was planned.
    pub(super) fn planned(&mut self, admits: bool) {
        self.waited = if admits { 1 } else { self.waited.saturating_add(1) };
    }

    /// Whether running rows take part in a pass that admits others.
    pub(super) fn shares_passes(&self) -> bool {
        self.policy == PromptPolicy::Chunked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole_after(steps: u32) -> Turns {
        let mut turns = Turns::new(PromptPolicy::Whole { waiting_served_ratio: 0.5, max_waiting_tokens: 4 });
        turns.planned(true);
        (0..steps).for_each(|_| turns.planned(false));
        turns
    }

    #[test]
    fn prompts_that_can_be_cut_may_always_join() {
        let turns = Turns::new(PromptPolicy::Chunked);
        let opening = Opening { at_least: 1, reason: Some(JoinReason::Chunking) };
        assert_eq!(turns.opening(100), Some(opening));
    }

    #[test]
    fn an_admission_of_whole_prompts_is_followed_by_a_decode() {
        assert_eq!(whole_after(0).opening(10), None);
        assert!(whole_after(1).opening(10).is_some());
    }

    #[test]
    fn whole_prompts_interrupt_when_enough_of_them_wait() {
        let opening = Opening { at_least: 5, reason: Some(JoinReason::Backpressure) };
        assert_eq!(whole_after(1).opening(10), Some(opening));
    }

    #[test]
    fn whole_prompts_interrupt_when_they_waited_long_enough() {
        let opening = Opening { at_least: 1, reason: Some(JoinReason::WaitExceeded) };
        assert_eq!(whole_after(3).opening(10), Some(opening));
    }

    #[test]
    fn nothing_is_interrupted_when_nothing_runs() {
        assert_eq!(whole_after(0).opening(0), Some(Opening { at_least: 1, reason: None }));
    }
}
