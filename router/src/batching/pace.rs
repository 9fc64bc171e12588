//! How many prompt tokens a pass may take beside rows that are generating: as many as keep the pass within a multiple of the
//! time that it would take without them, going by what passes have taken so far.
//!
//! The model is as plain as can be, since it is corrected after every pass: a pass takes the time of one without prompts, and
//! a time per prompt token on top.

use std::time::Duration;

use proto::units::TokenCount;

/// A pass beside running rows takes at least so many prompt tokens, so that every prompt gets on.
const TOKENS_MIN: u32 = 16;
/// Weight of the newest pass in the averages.
const NEWEST: f64 = 0.25;
/// Aims a little below the limit, because passes vary.
const MARGIN: f64 = 0.9;

/// What passes have taken.
#[derive(Debug)]
pub(super) struct Pace {
    /// The multiple; `None` is no limit.
    stretch: Option<f64>,
    /// Seconds of a pass without prompts.
    plain: Option<f64>,
    /// Seconds of a prompt token.
    token: Option<f64>,
}

impl Pace {
    /// Passes with prompts may take up to `stretch` times as long as those without.
    pub(super) fn new(stretch: Option<f64>) -> Self {
        Self { stretch, plain: None, token: None }
    }

    /// A pass in which `generating` rows took part, and `prompt` tokens of prompts.
    pub(super) fn observe(&mut self, generating: usize, prompt: TokenCount, took: Duration) {
        let took = took.as_secs_f64();
        if took == 0.0 {
            return;
        }
        if prompt.0 == 0 {
            average(&mut self.plain, took);
            return;
        }
        let rest = if generating > 0 { self.plain.unwrap_or(0.0) } else { 0.0 };
        average(&mut self.token, (took - rest).max(0.0) / f64::from(prompt.0));
    }

    /// Prompt tokens that fit beside rows that are generating.
    pub(super) fn prompt_tokens(&self) -> TokenCount {
        let (Some(stretch), Some(plain), Some(token)) = (self.stretch, self.plain, self.token) else {
            return TokenCount(u32::MAX);
        };
        let spare = plain * (stretch * MARGIN - 1.0);
        // Saturates, also where a token takes no time at all.
        let fits = (spare / token) as u32;
        TokenCount((fits / TOKENS_MIN * TOKENS_MIN).max(TOKENS_MIN))
    }
}

fn average(value: &mut Option<f64>, newest: f64) {
    *value = Some(value.map_or(newest, |value| value + NEWEST * (newest - value)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// After passes of 10 ms without prompts, and one token per millisecond.
    fn pace(stretch: Option<f64>) -> Pace {
        let mut pace = Pace::new(stretch);
        pace.observe(0, TokenCount(100), 100 * MILLISECOND);
        (0..10).for_each(|_| pace.observe(8, TokenCount(0), 100 * MILLISECOND));
        pace
    }

    #[test]
    fn prompts_take_the_time_that_the_stretch_leaves() {
        // 100 ms * (2 * 0.9 - 1) are 80 tokens.
        assert_eq!(pace(Some(2.0)).prompt_tokens(), TokenCount(80));
        assert_eq!(pace(Some(4.0)).prompt_tokens(), TokenCount(256));
        assert_eq!(pace(None).prompt_tokens(), TokenCount(u32::MAX));
    }

    #[test]
    fn a_prompt_always_gets_on() {
        assert_eq!(pace(Some(1.0)).prompt_tokens(), TokenCount(16));
    }

    #[test]
    fn nothing_is_known_before_anything_was_seen() {
        assert_eq!(Pace::new(Some(2.0)).prompt_tokens(), TokenCount(u32::MAX));
    }

    #[test]
    fn tokens_that_become_slower_become_fewer() {
        let mut pace = pace(Some(2.0));
        (0..30).for_each(|_| pace.observe(8, TokenCount(80), 500 * MILLISECOND));
        assert_eq!(pace.prompt_tokens(), TokenCount(16));
    }
}
