//! Stop strings, found anywhere in the generated text: across tokens and inside one.

/// The stop strings of one request, and the end of its text so far.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The last text that a stop string may have begun in, shorter than the longest of them.
    window: String,
}

/// A stop string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Bytes of the latest text that lie behind the stop string.
    pub excess: usize,
}

impl StopStrings {
    /// Empty strings never match.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, window: String::new() }
    }

    /// Whether nothing can match.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Takes the next text; says whether a stop string is complete now. If several are, the one that ends first wins, as
    /// if the text had come character by character.
    pub fn push(&mut self, text: &str) -> Option<Found> {
        let longest = self.stops.iter().map(String::len).max()?;
        self.window.push_str(text);
        let ends = self.stops.iter().filter_map(|stop| Some(self.window.find(stop.as_str())? + stop.len()));
        if let Some(end) = ends.min() {
            return Some(Found { excess: self.window.len() - end });
        }
        let keep = self.window.floor_char_boundary(self.window.len().saturating_sub(longest - 1));
        self.window.drain(..keep);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `texts`; the index of the text that ended it, and the bytes behind the stop string.
    fn run(stops: &[&str], texts: &[&str]) -> Option<(usize, usize)> {
        let mut strings = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        texts.iter().enumerate().find_map(|(index, text)| Some((index, strings.push(text)?.excess)))
    }

    #[test]
    fn a_stop_string_is_found_at_the_end_across_tokens_and_inside_one() {
        assert_eq!(run(&["end"], &["the ", "end"]), Some((1, 0)));
        assert_eq!(run(&["end"], &["the e", "n", "d of"]), Some((2, 3)));
        assert_eq!(run(&["lo"], &[" dolor"]), Some((0, 1)));
    }

    #[test]
    fn without_a_match_nothing_is_found() {
        assert_eq!(run(&["end", ""], &["e", "n", "", "e", "nd"]), Some((4, 0)));
        assert_eq!(run(&["end"], &["en", "nd", "END"]), None);
        assert_eq!(run(&[""], &["anything"]), None);
        assert_eq!(run(&[], &["anything"]), None);
    }

    #[test]
    fn the_one_that_ends_first_wins() {
        assert_eq!(run(&["abcd", "bc"], &["xabcdx"]), Some((0, 2)));
        assert_eq!(run(&["b", "a"], &["ab"]), Some((0, 1)));
    }

    #[test]
    fn a_long_stop_string_spread_over_many_tokens_is_found() {
        let stop = "s".repeat(999) + "t";
        let texts: Vec<&str> = std::iter::repeat_n("s", 5000).chain(["t", "u"]).collect();
        assert_eq!(run(&[&stop], &texts), Some((5000, 0)));
    }

    #[test]
    fn the_window_never_splits_a_character() {
        assert_eq!(run(&["é!"], &["€€€", "é", "!"]), Some((2, 0)));
        assert_eq!(run(&["xx"], &["€", "€", "xx"]), Some((2, 0)));
    }
}
