//! Pool of worker threads behind one async call. A long prompt is tens of milliseconds of work, which the threads that
//! serve connections must not do.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use proto::units::{TokenCount, TokenId};
use thiserror::Error;
use tokenizers::Encoding;
use tokio::sync::{mpsc, oneshot};

/// Jobs that may wait per worker before callers wait to hand theirs over.
const WAITING_PER_WORKER: usize = 64;

/// Text that could not be made into tokens.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum TokenizerError {
    #[error("the tokenizer failed: {0}")]
    Failed(String),
    #[error("the work on this text has panicked")]
    Panicked,
    #[error("the threads for work on texts have stopped")]
    Stopped,
}

/// A tokenizer that could not be loaded.
#[derive(Debug, Error)]
#[error("tokenizer {}: {reason}", path.display())]
pub(crate) struct LoadError {
    path: PathBuf,
    reason: String,
}

/// A text and its tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Encoded {
    pub(crate) text: String,
    pub(crate) ids: Arc<[TokenId]>,
}

/// A token and the bytes of the text it stands for, half-open; both 0 for a token the tokenizer added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) id: TokenId,
    pub(crate) start: usize,
    pub(crate) stop: usize,
}

type Job = Box<dyn FnOnce(&tokenizers::Tokenizer) + Send>;

/// Handle to the pool. Cheap to clone; the threads end with the last handle.
#[derive(Clone, Debug)]
pub(crate) struct Tokenizer {
    jobs: mpsc::Sender<Job>,
    vocabulary: u32,
}

impl Tokenizer {
    /// Loads `tokenizer.json` and starts the threads.
    pub(crate) fn load(path: &Path, workers: NonZeroUsize) -> Result<Self, LoadError> {
        let failed = |reason: String| LoadError { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        // The library panics on some files that lie about themselves.
        let inner = catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|_| failed("the file makes the tokenizer library panic".to_owned()))?
            .map_err(|error| failed(error.to_string()))?;
        Self::start(inner, workers).map_err(failed)
    }

    fn start(mut inner: tokenizers::Tokenizer, workers: NonZeroUsize) -> Result<Self, String> {
        // Files carry the settings of their training run; a request says itself what it wants.
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let vocabulary = inner.get_vocab(true).values().max().map_or(0, |last| last.saturating_add(1));
        let (jobs, queue) = mpsc::channel(workers.get() * WAITING_PER_WORKER);
        let (inner, queue) = (Arc::new(inner), Arc::new(Mutex::new(queue)));
        for number in 0..workers.get() {
            let (inner, queue) = (inner.clone(), queue.clone());
            thread::Builder::new()
                .name(format!("tokenizer-{number}"))
                .spawn(move || work(&inner, &queue))
                .map_err(|error| format!("cannot start a thread: {error}"))?;
        }
        Ok(Self { jobs, vocabulary })
    }

    /// One more than the largest token id, which may be more than the model has.
    pub(crate) fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// Tokens of a text. With `longest`, only that many are kept: the last ones, and of the special tokens all.
    pub(crate) async fn encode(
        &self,
        text: String,
        add_special_tokens: bool,
        longest: Option<TokenCount>,
    ) -> Result<Encoded, TokenizerError> {
        self.run(move |tokenizer| {
            let encoding = tokenizer.encode_fast(text.as_str(), add_special_tokens).map_err(failed)?;
            let ids = match longest {
                Some(longest) => last_tokens(&encoding, longest.0 as usize),
                None => encoding.get_ids().iter().copied().map(TokenId).collect(),
            };
            Ok(Encoded { text, ids })
        })
        .await
    }

    /// Tokens of a text with the bytes they stand for.
    pub(crate) async fn spans(
        &self,
        text: String,
        add_special_tokens: bool,
    ) -> Result<(String, Vec<Span>), TokenizerError> {
        self.run(move |tokenizer| {
            let encoding = tokenizer.encode(text.as_str(), add_special_tokens).map_err(failed)?;
            let spans = std::iter::zip(encoding.get_ids(), encoding.get_offsets())
                .map(|(&id, &(start, stop))| Span { id: TokenId(id), start, stop })
                .collect();
            Ok((text, spans))
        })
        .await
    }

    /// Runs work on one of the threads. Work whose caller has left is skipped; a panic in it is its own failure alone.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&tokenizers::Tokenizer) -> Result<T, TokenizerError> + Send + 'static,
    ) -> Result<T, TokenizerError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |tokenizer| {
            if reply.is_closed() {
                return;
            }
            let result = catch_unwind(AssertUnwindSafe(|| work(tokenizer)));
            // A caller that has left meanwhile needs no answer.
            let _ = reply.send(result.unwrap_or(Err(TokenizerError::Panicked)));
        });
        self.jobs.send(job).await.map_err(|_| TokenizerError::Stopped)?;
        answer.await.map_err(|_| TokenizerError::Stopped)?
    }
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Failed(error.to_string())
}

fn work(tokenizer: &tokenizers::Tokenizer, queue: &Mutex<mpsc::Receiver<Job>>) {
    loop {
        // Held while waiting for a job: the next idle thread waits for the lock instead.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        match job {
            Some(job) => job(tokenizer),
            None => return,
        }
    }
}

/// The special tokens around the text, and of the text's tokens as many of the last as there is room for.
fn last_tokens(encoding: &Encoding, longest: usize) -> Arc<[TokenId]> {
    let sequences = encoding.get_sequence_ids();
    let length = sequences.iter().filter(|sequence| sequence.is_some()).count();
    let special = sequences.len() - length;
    let mut dropped = length.saturating_sub(longest.saturating_sub(special));
    let kept = std::iter::zip(encoding.get_ids(), sequences).filter(|(_, sequence)| {
        let drop = sequence.is_some() && dropped > 0;
        dropped -= usize::from(drop);
        !drop
    });
    // A limit below the number of special tokens leaves the first of them.
    kept.take(longest).map(|(&id, _)| TokenId(id)).collect()
}

#[cfg(test)]
pub(crate) mod testing {
    //! A tokenizer for tests: `a` to `f` are a token each, words are split at whitespace, `<s>` comes first.

    use super::*;

    const WORDS: &str = r#"{
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "unk_token": "?",
                  "vocab": {"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "?": 7, "é": 8, "never": 9}}
    }"#;

    /// The pool with one worker.
    pub(crate) fn words() -> Tokenizer {
        let inner = tokenizers::Tokenizer::from_bytes(WORDS).expect("the text above is a tokenizer");
        Tokenizer::start(inner, NonZeroUsize::MIN).expect("a thread can be started")
    }

    /// Ids of words of that vocabulary.
    pub(crate) fn ids(words: &str) -> Vec<TokenId> {
        let position = |word: &str| ["<s>", "a", "b", "c", "d", "e", "f"].iter().position(|w| *w == word);
        words.split(' ').map(|word| TokenId(position(word).expect("a known word") as u32)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{ids, words};
    use super::*;

    #[tokio::test]
    async fn settings_of_the_training_run_are_dropped() {
        let encoded = words().encode("a b c".to_owned(), true, None).await.unwrap();
        assert_eq!(encoded.ids.as_ref(), ids("<s> a b c"));
    }

    #[tokio::test]
    async fn truncation_keeps_the_end_and_the_special_tokens() {
        let words = words();
        let cut = async |longest, special| {
            words.encode("a b c".to_owned(), special, Some(TokenCount(longest))).await.unwrap().ids
        };
        assert_eq!(cut(3, true).await.as_ref(), ids("<s> b c"));
        assert_eq!(cut(2, false).await.as_ref(), ids("b c"));
        assert_eq!(cut(1, true).await.as_ref(), ids("<s>"));
        assert_eq!(cut(9, true).await.as_ref(), ids("<s> a b c"));
    }

    #[tokio::test]
    async fn offsets_count_bytes_and_added_tokens_have_none() {
        let (text, spans) = words().spans("é b".to_owned(), true).await.unwrap();
        let span = |id, start, stop| Span { id: TokenId(id), start, stop };
        assert_eq!(spans, [span(0, 0, 0), span(8, 0, 2), span(2, 3, 4)]);
        assert_eq!(&text[3..4], "b");
    }

    #[tokio::test]
    async fn a_panic_fails_one_call_and_the_worker_goes_on() {
        let words = words();
        let result: Result<(), _> = words.run(|_| panic!("on purpose")).await;
        assert_eq!(result, Err(TokenizerError::Panicked));
        assert!(words.encode("a".to_owned(), true, None).await.is_ok());
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{}").unwrap();
        let error = Tokenizer::load(file.path(), NonZeroUsize::MIN).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
    }
}
