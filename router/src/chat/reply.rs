//! Generated text to the text of an answer in OpenAI's meaning: special tokens and stop strings are left out.
//!
//! While streaming, an end of the text that may be the beginning of a stop string is held back until it is decided.
//! However the text is cut into pieces, what comes out concatenates to the text up to the first stop string.

/// The text of one answer while it comes in.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl Reply {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes a piece of text; returns what can be shown by now.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(start) = first_stop(&self.held, &self.stops) {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let shown = self.held.len() - self.undecided();
        let rest = self.held.split_off(shown);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text has ended: what was held back was no stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string has appeared.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Bytes at the end that are the beginning of a stop string. Whatever begins earlier is decided already.
    fn undecided(&self) -> usize {
        let beginning = |stop: &String| {
            let longest = self.held.len().min(stop.len().saturating_sub(1));
            (1..=longest)
                .rev()
                .find(|&length| stop.is_char_boundary(length) && self.held.ends_with(&stop[..length]))
        };
        self.stops.iter().filter_map(beginning).max().unwrap_or(0)
    }
}

/// Where the text ends: before the stop string that is complete first, and of those that are complete at once, before the
/// longest. Which one begins first would depend on text that no longer comes once another is complete.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    let place = |stop: &String| text.find(stop.as_str()).map(|start| (start + stop.len(), start));
    stops.iter().filter_map(place).min().map(|(_, start)| start)
}

/// A whole text up to the first stop string, and whether there was one.
pub(crate) fn whole(text: &str, stops: &[String]) -> (String, bool) {
    let mut reply = Reply::new(stops.to_vec());
    let mut shown = reply.push(text);
    shown.push_str(&reply.finish());
    (shown, reply.stopped())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(stops: &[&str], pieces: &[&str]) -> Vec<String> {
        let mut reply = Reply::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown: Vec<_> = pieces.iter().map(|piece| reply.push(piece)).collect();
        shown.push(reply.finish());
        shown
    }

    #[test]
    fn a_possible_beginning_is_held_back_until_it_is_decided() {
        assert_eq!(pieces(&["END"], &["a E", "N", "x"]), ["a ", "", "ENx", ""]);
        assert_eq!(pieces(&["END"], &["a E", "N", "D b", "c"]), ["a ", "", "", "", ""]);
        assert_eq!(pieces(&["END"], &["a E"]), ["a ", "E"]);
    }

    #[test]
    fn a_stop_string_inside_a_piece_ends_the_text() {
        assert_eq!(pieces(&["lo"], &[" dolor", " sit"]), [" do", "", ""]);
    }

    #[test]
    fn the_first_of_several_stop_strings_counts() {
        assert_eq!(pieces(&["c", "bc"], &["abcd"]), ["a", ""]);
    }

    #[test]
    fn a_stop_string_that_is_complete_ends_the_text_although_a_longer_one_has_begun_before() {
        assert_eq!(pieces(&["béé", "é"], &["bé", "é"]), ["b", "", ""]);
        assert_eq!(pieces(&["béé", "é"], &["béé"]), ["b", ""]);
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        assert_eq!(pieces(&["€!"], &["a€", "b"]), ["a", "€b", ""]);
        assert_eq!(pieces(&["éé"], &["xé", "é"]), ["x", "", ""]);
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        assert_eq!(pieces(&[], &["a", "b"]), ["a", "b", ""]);
    }

    proptest! {
        #[test]
        fn the_cut_into_pieces_does_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..8),
            stops in prop::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let mut reply = Reply::new(stops.clone());
            let mut shown: String = pieces.iter().map(|piece| reply.push(piece)).collect();
            shown += &reply.finish();
            let text = pieces.concat();
            // The end of the shortest beginning that has a stop string at its end.
            let ends = text.char_indices().map(|(at, character)| at + character.len_utf8());
            let stop_at = |end: usize| {
                let found = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
                found.map(|stop| end - stop.len()).min()
            };
            let cut = ends.into_iter().find_map(stop_at);
            prop_assert_eq!(&shown, &text[..cut.unwrap_or(text.len())]);
            prop_assert_eq!(reply.stopped(), cut.is_some());
            prop_assert_eq!(whole(&text, &stops).0, shown);
        }
    }
}
