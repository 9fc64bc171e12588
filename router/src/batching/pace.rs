//! How many prompt tokens a pass may take beside rows that are generating: as many as keep the pass within a multiple of the
//! time that it takes without prompts.
//!
//! What a token costs depends on the model, on the machine, and on how much of its prompt lies before it. So there is no
//! model of it, but a controller: after each such pass the number moves towards the one that would have met the limit.

use std::time::Duration;

use proto::units::TokenCount;

/// Every prompt gets on by so many tokens per pass, whatever that takes: kernels compute so many at a time, and a pass reads
/// all that lies before them however few they are.
const TOKENS_MIN: f64 = 16.0;
/// Where the search begins.
const TOKENS_FIRST: f64 = 64.0;
/// Weight of the newest pass in the average.
const NEWEST: f64 = 0.25;
/// Aims a little below the limit, because passes vary.
const MARGIN: f64 = 0.9;
/// A pass changes the number by no more than this factor, down and up.
const CHANGES: (f64, f64) = (0.5, 1.3);

/// What passes have taken, and what follows for the next one.
#[derive(Debug)]
pub(super) struct Pace {
    /// The multiple; `None` is no limit.
    stretch: Option<f64>,
    /// Seconds of a pass without prompts.
    plain: Option<f64>,
    /// Prompt tokens that a pass may take.
    tokens: f64,
}

impl Pace {
    /// Passes with prompts may take up to `stretch` times as long as those without.
    pub(super) fn new(stretch: Option<f64>) -> Self {
        Self { stretch, plain: None, tokens: TOKENS_FIRST }
    }

    /// A pass in which `generating` rows took part, and `prompt` tokens of prompts.
    pub(super) fn observe(&mut self, generating: usize, prompt: TokenCount, took: Duration) {
        let took = took.as_secs_f64();
        if took == 0.0 || generating == 0 {
            return;
        }
        if prompt.0 == 0 {
            self.plain = Some(self.plain.map_or(took, |plain| plain + NEWEST * (took - plain)));
            return;
        }
        let (Some(stretch), Some(plain)) = (self.stretch, self.plain) else { return };
        let ratio = (plain * stretch * MARGIN / took).clamp(CHANGES.0, CHANGES.1);
        // A pass with room to spare says nothing about a full one.
        let was_full = f64::from(prompt.0) > self.tokens / 2.0;
        if ratio < 1.0 || was_full {
            let most = f64::from(u32::MAX);
            self.tokens = (self.tokens.min(f64::from(prompt.0) * 2.0) * ratio).clamp(TOKENS_MIN, most);
        }
    }

    /// Prompt tokens that fit beside rows that are generating.
    pub(super) fn prompt_tokens(&self) -> TokenCount {
        match (self.stretch, self.plain) {
            (Some(_), Some(_)) => TokenCount(self.tokens as u32),
            _ => TokenCount(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Passes of 10 ms, and what prompt tokens take on top.
    fn settle(stretch: Option<f64>, on_top: impl Fn(u32) -> Duration) -> u32 {
        let mut pace = Pace::new(stretch);
        (0..10).for_each(|_| pace.observe(8, TokenCount(0), 10 * MILLISECOND));
        for _ in 0..100 {
            let tokens = pace.prompt_tokens().0.min(4096);
            pace.observe(8, TokenCount(tokens), 10 * MILLISECOND + on_top(tokens));
        }
        pace.prompt_tokens().0
    }

    #[test]
    fn prompts_take_the_time_that_the_stretch_leaves() {
        // 10 ms * (2 * 0.9 - 1), at 20 µs for a token.
        let on_top = |tokens| tokens * Duration::from_micros(20);
        assert!((380..=400).contains(&settle(Some(2.0), on_top)), "{}", settle(Some(2.0), on_top));
        assert!((1200..=1300).contains(&settle(Some(4.0), on_top)), "{}", settle(Some(4.0), on_top));
    }

    #[test]
    fn what_a_pass_costs_however_few_the_tokens_are_does_not_stop_a_prompt() {
        assert_eq!(settle(Some(2.0), |_| 50 * MILLISECOND), 16);
        assert_eq!(settle(Some(1.0), |tokens| tokens * MILLISECOND), 16);
    }

    #[test]
    fn without_a_limit_and_before_anything_was_seen_any_number_may_come() {
        assert_eq!(settle(None, |tokens| tokens * MILLISECOND), u32::MAX);
        assert_eq!(Pace::new(Some(2.0)).prompt_tokens(), TokenCount(u32::MAX));
    }

    #[test]
    fn short_prompts_in_time_change_nothing_and_late_ones_do() {
        let mut pace = Pace::new(Some(2.0));
        pace.observe(8, TokenCount(0), 10 * MILLISECOND);
        pace.observe(8, TokenCount(5), 11 * MILLISECOND);
        assert_eq!(pace.prompt_tokens(), TokenCount(64));
        pace.observe(8, TokenCount(30), 36 * MILLISECOND);
        assert_eq!(pace.prompt_tokens(), TokenCount(30));
    }
}
