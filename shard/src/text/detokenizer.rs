//! Ids to text as they come: a token's text is what it adds to the text before it.
//!
//! A character may be spread over several tokens; its text is withheld until it is complete and then belongs to the
//! token that completes it.

use super::tokenizer::Tokenizer;

/// Tokens of context in front of the first generated one; they make spaces right in sentencepiece-like tokenizers.
const CONTEXT: usize = 5;

/// What stands for bytes that are not a character, or not yet.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// Progress of one request's text. Offsets count tokens of its history.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    /// Start of the context that is decoded along.
    prefix: usize,
    /// Tokens before this one have their text emitted.
    read: usize,
}

impl Detokenizer {
    /// For text that follows a prompt of this many tokens.
    pub fn new(prompt_length: usize) -> Self {
        Self { prefix: prompt_length.saturating_sub(CONTEXT), read: prompt_length }
    }

    /// The text that the last of `ids` adds, empty while a character is incomplete. `ids` is the whole history.
    pub fn push(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let text = self.pending(tokenizer, ids);
        if text.is_empty() || text.ends_with(INCOMPLETE) {
            return String::new();
        }
        self.prefix = self.read;
        self.read = ids.len();
        text
    }

    /// What is withheld and complete, when no further token will come: the whole characters before a cut one.
    pub fn flush(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let text = self.pending(tokenizer, ids).trim_end_matches(INCOMPLETE).to_owned();
        self.read = ids.len();
        text
    }

    /// The text of all tokens from `read` on.
    fn pending(&self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let before = tokenizer.decode(&ids[self.prefix..self.read]);
        let mut text = tokenizer.decode(&ids[self.prefix..]);
        text.drain(..after_characters(&text, before.chars().count()));
        text
    }
}

/// The text of everything generated: `ids[prompt_length..]` with special tokens skipped, one token of left context, and
/// without a cut character at the end.
pub fn generated_text(tokenizer: &Tokenizer, ids: &[u32], prompt_length: usize) -> String {
    let context = prompt_length.saturating_sub(1);
    let before = tokenizer.decode_plain(&ids[context..prompt_length]);
    let text = tokenizer.decode_plain(&ids[context..]);
    let start = after_characters(&text, before.chars().count());
    text[start..].trim_end_matches(INCOMPLETE).to_owned()
}

/// The byte offset behind the first `count` characters, or the end.
fn after_characters(text: &str, count: usize) -> usize {
    text.char_indices().nth(count).map_or(text.len(), |(offset, _)| offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{BEGIN, DOLOR, END, byte_tokenizer};

    /// Texts of `generated` after `prompt`, token by token.
    fn stream(prompt: &[u32], generated: &[u32]) -> Vec<String> {
        let tokenizer = byte_tokenizer();
        let mut detokenizer = Detokenizer::new(prompt.len());
        let mut ids = prompt.to_vec();
        generated
            .iter()
            .map(|id| {
                ids.push(*id);
                detokenizer.push(&tokenizer, &ids)
            })
            .collect()
    }

    #[test]
    fn a_character_belongs_to_the_token_that_completes_it() {
        assert_eq!(stream(&[BEGIN], &[97, 0xe2, 0x82, 0xac, 98]), ["a", "", "", "€", "b"]);
    }

    #[test]
    fn bytes_that_never_become_a_character_come_with_the_next_text() {
        assert_eq!(stream(&[BEGIN, 97], &[0xff, 98]), ["", "\u{fffd}b"]);
    }

    #[test]
    fn special_tokens_have_text() {
        assert_eq!(stream(&[97], &[DOLOR, END]), [" dolor", "<end>"]);
    }

    #[test]
    fn a_short_or_empty_prompt_is_context_enough() {
        assert_eq!(stream(&[], &[97]), ["a"]);
        assert_eq!(stream(&[0xe2], &[0x82, 0xac]), ["", ""]);
    }

    #[test]
    fn the_end_flushes_whole_characters_only() {
        let tokenizer = byte_tokenizer();
        let mut ids = vec![BEGIN, 0xff, 98, 0xe2];
        let mut detokenizer = Detokenizer::new(1);
        assert_eq!(detokenizer.push(&tokenizer, &ids), "");
        assert_eq!(detokenizer.flush(&tokenizer, &ids), "\u{fffd}b");
        ids.push(99);
        assert_eq!(detokenizer.push(&tokenizer, &ids), "c");
    }

    #[test]
    fn generated_text_skips_special_tokens_and_a_cut_character() {
        let tokenizer = byte_tokenizer();
        let text = |ids: &[u32]| generated_text(&tokenizer, ids, 2);
        assert_eq!(text(&[BEGIN, 97, 98, DOLOR, END]), "b dolor");
        assert_eq!(text(&[BEGIN, 97, 98, 0xe2, 0x82]), "b");
        assert_eq!(text(&[BEGIN, 97, 0xe2, 0x82, 0xac]), "€");
        assert_eq!(generated_text(&tokenizer, &[98], 0), "b");
    }
}
