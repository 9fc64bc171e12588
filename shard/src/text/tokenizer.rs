//! The model's tokenizer, with what its neighbouring files say about special tokens.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use proto::units::{TokenCount, TokenId};
use serde_json::Value;
use tokenizers::AddedToken;

use crate::small_file;

/// Largest file accepted. The tokenizers of the largest vocabularies have some 30 MB.
const BYTES_MAX: u64 = 1 << 30;

/// Fields of `tokenizer_config.json` that name one special token each.
const SPECIAL_FIELDS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Whether the tokenizer frames a prompt with its special tokens, such as a beginning-of-sequence token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// The post-processor's tokens are added.
    Add,
    /// Only what the text says.
    Omit,
}

/// Text to ids and back. Cheap to share, immutable after loading.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: BTreeSet<u32>,
    end_of_sequence: BTreeSet<u32>,
    length_max: Option<TokenCount>,
}

/// Why a tokenizer could not be loaded, or a prompt not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not what its name says.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The tokenizer refused a text.
    #[error("the prompt cannot be tokenized: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Reads `tokenizer.json`, which must exist, and what `tokenizer_config.json`, `generation_config.json` and
    /// `config.json` say of special tokens, where they exist.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let bytes = small_file::read(&path, BYTES_MAX)
            .map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| TokenizerError::Parse { path, message: error.to_string() })?;
        let tokenizer_config = absent_if_broken(read_optional(&dir.join("tokenizer_config.json")))?;
        let [generation_config, config] =
            ["generation_config.json", "config.json"].map(|name| read_optional(&dir.join(name)));
        Ok(Self::assemble(inner, &tokenizer_config, &[generation_config?, config?]))
    }

    /// `id_sources` are configurations whose `eos_token_id` counts.
    fn assemble(mut inner: tokenizers::Tokenizer, tokenizer_config: &Value, id_sources: &[Value]) -> Self {
        // Truncation and padding are requests' business, whatever the file was saved with.
        inner.with_padding(None);
        inner.with_truncation(None).expect("no truncation is always accepted");
        mark_special(&mut inner, tokenizer_config);
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let end_of_sequence = id_sources
            .iter()
            .flat_map(|config| integers(&config["eos_token_id"]))
            .chain(token_text(&tokenizer_config["eos_token"]).and_then(|text| inner.token_to_id(text)))
            .collect();
        // Python writes "no limit" as 1e30.
        let length_max = tokenizer_config["model_max_length"]
            .as_f64()
            .filter(|length| (1.0..f64::from(u32::MAX)).contains(length))
            .map(|length| TokenCount(length as u32));
        Self { inner, special, end_of_sequence, length_max }
    }

    /// Ids of `text`, at most `truncate` of them: what is too much is dropped on the left, but not the special tokens
    /// that frame the prompt as long as those alone fit.
    pub fn encode(
        &self,
        text: &str,
        special: SpecialTokens,
        truncate: TokenCount,
    ) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .encode(text, special == SpecialTokens::Add)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        let framing = encoding.get_special_tokens_mask();
        let mut excess = encoding.len().saturating_sub(truncate.0 as usize);
        let mut ids: Vec<u32> = encoding
            .get_ids()
            .iter()
            .zip(framing)
            .filter_map(|(id, &frames)| {
                let dropped = excess > 0 && frames == 0;
                excess -= usize::from(dropped);
                (!dropped).then_some(*id)
            })
            .collect();
        ids.drain(..excess);
        Ok(ids)
    }

    /// Text of `ids`, special tokens included. Incomplete or invalid bytes show as U+FFFD; ids beyond the vocabulary
    /// have no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// Text of `ids` without special tokens.
    pub fn decode_plain(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// Whether the token is control rather than text.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.contains(&id.0)
    }

    /// Whether the token ends a sequence: the union of what `generation_config.json`, `config.json` and
    /// `tokenizer_config.json` name.
    pub fn ends_sequence(&self, id: TokenId) -> bool {
        self.end_of_sequence.contains(&id.0)
    }

    /// The longest sequence the tokenizer's author had in mind, if stated.
    pub fn length_max(&self) -> Option<TokenCount> {
        self.length_max
    }
}

/// An absent file says nothing; a broken one is an error.
fn read_optional(path: &Path) -> Result<Value, TokenizerError> {
    let bytes = match small_file::read(path, BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(source) => return Err(TokenizerError::Read { path: path.to_owned(), source }),
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| TokenizerError::Parse { path: path.to_owned(), message: error.to_string() })
}

/// A `tokenizer_config.json` that cannot be parsed counts as absent, as it does for TGI: chats have no template then, but
/// prompts are served.
fn absent_if_broken(file: Result<Value, TokenizerError>) -> Result<Value, TokenizerError> {
    match file {
        Err(TokenizerError::Parse { path, message }) => {
            tracing::warn!("{} is ignored: {message}", path.display());
            Ok(Value::Null)
        }
        other => other,
    }
}

/// Tokens that only `tokenizer_config.json` calls special become special, as they do in the reference library.
fn mark_special(inner: &mut tokenizers::Tokenizer, tokenizer_config: &Value) {
    let extra = tokenizer_config["additional_special_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let fields = SPECIAL_FIELDS.iter().map(|field| &tokenizer_config[*field]);
    let known = inner.get_added_tokens_decoder();
    let missing: Vec<AddedToken> = fields
        .chain(extra)
        .filter_map(token_text)
        .filter(|text| {
            let id = inner.token_to_id(text);
            id.is_some_and(|id| known.get(&id).is_none_or(|token| !token.special))
        })
        .map(|text| AddedToken::from(text, true))
        .collect();
    if let Err(error) = inner.add_special_tokens(missing) {
        tracing::warn!(%error, "special tokens of tokenizer_config.json are ignored");
    }
}

/// A token is written as its text, or as an object with its text in `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// One id or a list of them.
fn integers(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) const BEGIN: u32 = 256;
    pub(crate) const END: u32 = 257;
    pub(crate) const DOLOR: u32 = 258;

    /// One token per byte, with the byte's value as its id, a begin token in front, an end token, and `" dolor"`.
    pub(crate) fn byte_tokenizer() -> Tokenizer {
        let vocabulary: serde_json::Map<String, Value> =
            byte_alphabet().into_iter().enumerate().map(|(id, text)| (text, json!(id))).collect();
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        };
        let file = json!({
            "version": "1.0",
            "added_tokens":
                [added(BEGIN, "<begin>", true), added(END, "<end>", true), added(DOLOR, " dolor", false)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<begin>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<begin>": {"id": "<begin>", "ids": [BEGIN], "tokens": ["<begin>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        });
        let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
        Tokenizer::assemble(inner, &json!({"eos_token": {"content": "<end>"}}), &[])
    }

    /// The printable character by which byte-level tokenizers write each byte (GPT-2's table).
    fn byte_alphabet() -> Vec<String> {
        let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        (0..256)
            .map(|byte| {
                let code = if printable(byte) { byte } else { next };
                next += u32::from(!printable(byte));
                char::from_u32(code).unwrap().to_string()
            })
            .collect()
    }

    fn encode(text: &str, special: SpecialTokens, truncate: u32) -> Vec<u32> {
        byte_tokenizer().encode(text, special, TokenCount(truncate)).unwrap()
    }

    #[test]
    fn truncation_drops_the_left_of_the_text_and_keeps_the_framing() {
        assert_eq!(encode("abc", SpecialTokens::Add, 10), [BEGIN, 97, 98, 99]);
        assert_eq!(encode("abc", SpecialTokens::Add, 3), [BEGIN, 98, 99]);
        assert_eq!(encode("abc", SpecialTokens::Add, 1), [BEGIN]);
        assert_eq!(encode("abc", SpecialTokens::Omit, 2), [98, 99]);
        assert_eq!(encode("abc", SpecialTokens::Add, 0), [0_u32; 0]);
    }

    #[test]
    fn a_special_token_written_in_the_text_may_be_truncated() {
        assert_eq!(encode("<end>ab", SpecialTokens::Add, 3), [BEGIN, 97, 98]);
    }

    #[test]
    fn special_tokens_show_unless_they_are_skipped() {
        let tokenizer = byte_tokenizer();
        assert_eq!(tokenizer.decode(&[97, END]), "a<end>");
        assert_eq!(tokenizer.decode_plain(&[BEGIN, 97, END, DOLOR]), "a dolor");
        assert_eq!(tokenizer.decode(&[100_000]), "");
        assert!(tokenizer.is_special(TokenId(END)) && !tokenizer.is_special(TokenId(DOLOR)));
    }

    #[test]
    fn ends_of_sequence_are_the_union_of_all_sources() {
        let inner = byte_tokenizer().inner;
        let sources = [json!({"eos_token_id": [7, 8]}), json!({"eos_token_id": 9})];
        let tokenizer = Tokenizer::assemble(inner, &json!({"eos_token": "<end>"}), &sources);
        assert_eq!(tokenizer.end_of_sequence, BTreeSet::from([7, 8, 9, END]));
    }

    #[test]
    fn a_token_that_only_the_configuration_calls_special_is_special() {
        let inner = byte_tokenizer().inner;
        let tokenizer = Tokenizer::assemble(inner, &json!({"additional_special_tokens": [" dolor"]}), &[]);
        assert!(tokenizer.is_special(TokenId(DOLOR)));
        assert_eq!(tokenizer.decode_plain(&[97, DOLOR]), "a");
    }

    #[test]
    fn pythons_no_limit_is_no_limit() {
        let inner = || byte_tokenizer().inner;
        let length = |value: Value| {
            Tokenizer::assemble(inner(), &json!({"model_max_length": value}), &[]).length_max()
        };
        assert_eq!(length(json!(1e30)), None);
        assert_eq!(length(json!(1024)), Some(TokenCount(1024)));
        assert_eq!(length(Value::Null), None);
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
    }
}
