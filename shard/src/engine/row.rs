//! One request on the shard: its history, how much of it is computed, and what comes of its next token.

use std::sync::Arc;

use proto::units::{BlockCount, BlockId, BlockSize, RequestId, TokenCount, TokenId};

use super::answer::{FinishReason, GeneratedText, Generation, PromptTokens, Token};
use super::error::RequestError;
use super::request::Stopping;
use super::slots::SlotTable;
use crate::layers::Adapter;
use crate::sampling::{Choice, Pick, Sampler, SamplingParams, Scored};
use crate::text::detokenizer::{Detokenizer, generated_text};
use crate::text::stop::{Found, StopStrings};
use crate::text::tokenizer::Tokenizer;

/// How much of a request's history is in the cache, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tokens whose keys and values are stored.
    pub cached: usize,
    /// Tokens of the next step.
    pub next: usize,
}

/// What a row is made of.
#[derive(Debug)]
pub struct Parts {
    /// The request.
    pub id: RequestId,
    /// Its prompt.
    pub ids: Vec<u32>,
    /// Where to start, in the prompt and what was generated before.
    pub progress: Progress,
    /// Cache blocks it reserves.
    pub blocks: BlockCount,
    /// Slots of the positions it may reach, or of the first of them.
    pub slots: SlotTable,
    /// Whether further blocks come with grants.
    pub granted: bool,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stopping: Stopping,
    /// Whether log-probabilities of the prompt are wanted.
    pub prompt_logprobs: bool,
    /// Alternatives to report per token.
    pub top: usize,
    /// What changes its tokens.
    pub adapter: Option<Arc<Adapter>>,
}

/// A request in a batch.
///
/// Invariant: while it runs, `progress.cached + progress.next <= ids.len()`, and the step that makes them equal yields a
/// token. A decoding request is one with a single token left to feed. No step computes a token that has no slot.
#[derive(Debug)]
pub struct Row {
    id: RequestId,
    /// Prompt and generated tokens.
    ids: Vec<u32>,
    prompt_length: usize,
    /// Tokens that came with the request: its prompt, and what it had generated before.
    given: usize,
    progress: Progress,
    blocks: BlockCount,
    slots: SlotTable,
    granted: bool,
    sampler: Sampler,
    top: usize,
    tokens_max: usize,
    ignore_end_of_sequence: bool,
    stop: StopStrings,
    detokenizer: Detokenizer,
    /// Until they are delivered, if wanted.
    prompt_logprobs: Option<Vec<f32>>,
    /// The one it began with, whatever has been unloaded since.
    adapter: Option<Arc<Adapter>>,
    stopped: bool,
}

impl Progress {
    /// Of `given` tokens, of which `cached` are in the cache and the next step computes `chunk` more, or all.
    pub fn new(given: usize, cached: TokenCount, chunk: Option<TokenCount>) -> Result<Self, RequestError> {
        let start = cached.0 as usize;
        if start >= given {
            return Err(RequestError::CacheLength { cached, given });
        }
        let remaining = given - start;
        match chunk {
            None => Ok(Self { cached: start, next: remaining }),
            Some(chunk) if (1..=remaining).contains(&(chunk.0 as usize)) => {
                Ok(Self { cached: start, next: chunk.0 as usize })
            }
            Some(chunk) => Err(RequestError::Chunk { chunk, remaining }),
        }
    }
}

impl Row {
    /// A request that has not run yet.
    pub fn new(parts: Parts) -> Self {
        let prompt_length = parts.ids.len();
        // Nothing predicts the first token, and cached ones are not computed.
        let unknown = parts.progress.cached + 1;
        Self {
            id: parts.id,
            prompt_length,
            given: prompt_length,
            progress: parts.progress,
            blocks: parts.blocks,
            slots: parts.slots,
            granted: parts.granted,
            sampler: Sampler::new(parts.sampling, &parts.ids),
            top: parts.top,
            tokens_max: parts.stopping.tokens_max.0 as usize,
            ignore_end_of_sequence: parts.stopping.ignore_end_of_sequence,
            stop: StopStrings::new(parts.stopping.strings),
            detokenizer: Detokenizer::new(prompt_length),
            prompt_logprobs: parts.prompt_logprobs.then(|| vec![f32::NAN; unknown]),
            adapter: parts.adapter,
            stopped: false,
            ids: parts.ids,
        }
    }

    /// Goes on behind tokens that were generated before, here or elsewhere: from now on everything is as if they had been
    /// chosen by this row. Errors when they end the request.
    pub fn resume(&mut self, generated: &[u32], tokenizer: &Tokenizer) -> Result<(), RequestError> {
        for (id, index) in generated.iter().zip(1..) {
            let id = TokenId(*id);
            self.sampler.advance(id);
            self.ids.push(id.0);
            let text = self.detokenizer.push(tokenizer, &self.ids);
            if self.finish(id, &text, tokenizer).is_some() {
                return Err(RequestError::Ended { index, generated: generated.len() });
            }
        }
        self.given = self.ids.len();
        Ok(())
    }

    /// The request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Prompt and generated tokens.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What is computed and what comes next.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Cache blocks it reserves.
    pub fn blocks(&self) -> BlockCount {
        self.blocks
    }

    /// Whether further blocks come with grants.
    pub fn is_granted(&self) -> bool {
        self.granted
    }

    /// Whether it may end alone where no token can be chosen for it. A router that knows only the contract would wait for it:
    /// then all of its batch fails.
    pub fn fails_alone(&self) -> bool {
        self.granted || self.given > self.prompt_length
    }

    /// Slots of the positions it may reach, as far as they are known.
    pub fn slots(&self) -> &SlotTable {
        &self.slots
    }

    /// What changes its tokens, if anything.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// Whether it takes part in no further step.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Length of the history when the token at `position` came: the prompt came at once, the others one by one.
    pub fn length_at(&self, position: usize) -> usize {
        self.prompt_length.max(position + 1)
    }

    /// Tokens that came with the request and are not computed yet.
    pub fn remaining(&self) -> usize {
        self.given.saturating_sub(self.progress.cached)
    }

    /// Tokens that a step can feed.
    pub fn left(&self) -> usize {
        if self.stopped { 0 } else { self.remaining().max(1) }
    }

    /// Whether the logits of every prompt token are needed.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Appends blocks to those it has.
    pub fn grant(&mut self, blocks: &[BlockId], size: BlockSize) {
        self.blocks.0 += blocks.len() as u32;
        self.slots.extend(blocks, size);
    }

    /// Decides how many tokens the next step computes.
    pub fn set_next(&mut self, tokens: usize) {
        self.progress.next = tokens;
    }

    /// Notes that the next `tokens` tokens are in the cache.
    pub fn advance(&mut self, tokens: usize) {
        self.progress.cached += tokens;
        self.progress.next -= tokens;
    }

    /// The prompt tokens that follow those at `start .. start + count`, if their log-probabilities are wanted.
    pub fn prompt_tokens_behind(&self, start: usize, count: usize) -> &[u32] {
        let end = self.prompt_length.min(start + 1 + count);
        if self.wants_prompt_logprobs() { self.ids.get(start + 1..end).unwrap_or_default() } else { &[] }
    }

    /// Takes the log-probabilities of the next prompt tokens.
    pub fn note_prompt_logprobs(&mut self, next: &[f32]) {
        if let Some(logprobs) = &mut self.prompt_logprobs {
            logprobs.extend_from_slice(next);
        }
    }

    /// The token that follows the last one, to be chosen from this row of logits.
    pub fn pick(&mut self, row: usize) -> Pick<'_> {
        Pick { row, sampler: &mut self.sampler, top: self.top }
    }

    /// Appends the chosen token: makes its text and finds out whether the request stops with it.
    pub fn accept(&mut self, choice: Choice, tokenizer: &Tokenizer) -> Generation {
        let id = choice.token.id;
        self.ids.push(id.0);
        self.progress.next = 1;
        let special = tokenizer.is_special(id);
        let mut text = self.detokenizer.push(tokenizer, &self.ids);
        let end = self.finish(id, &text, tokenizer);
        self.stopped = end.is_some();
        if let Some((reason, excess)) = end {
            text.truncate(text.len() - excess);
            if reason != FinishReason::StopString {
                text.push_str(&self.detokenizer.flush(tokenizer, &self.ids));
            }
        }
        Generation {
            request: self.id,
            prompt: self.prompt_tokens(tokenizer),
            token: Token { id, logprob: choice.token.logprob, text, special },
            top: choice.top.into_iter().map(|scored| alone(scored, tokenizer)).collect(),
            end: end
                .map(|(reason, excess)| self.generated(reason, if special { 0 } else { excess }, tokenizer)),
        }
    }

    /// Appends the chosen token of a request that another rank answers: finds out whether it stops with it, as
    /// [`accept`](Self::accept) does there, and makes no more text than that takes.
    pub fn follow(&mut self, id: TokenId, tokenizer: &Tokenizer) {
        self.ids.push(id.0);
        self.progress.next = 1;
        let text = match self.stop.is_empty() {
            true => String::new(),
            false => self.detokenizer.push(tokenizer, &self.ids),
        };
        self.stopped = self.finish(id, &text, tokenizer).is_some();
        // Delivered with the first token, there.
        self.prompt_logprobs = None;
    }

    /// Ends without a further token.
    pub fn fail(&mut self) {
        self.stopped = true;
    }

    /// The first rule that holds, and the bytes of `text` behind a stop string.
    fn finish(&mut self, id: TokenId, text: &str, tokenizer: &Tokenizer) -> Option<(FinishReason, usize)> {
        if self.ids.len() - self.prompt_length >= self.tokens_max {
            return Some((FinishReason::Length, 0));
        }
        if !self.ignore_end_of_sequence && tokenizer.ends_sequence(id) {
            return Some((FinishReason::EndOfSequence, 0));
        }
        let Found { excess } = self.stop.push(text)?;
        Some((FinishReason::StopString, excess))
    }

    /// `excess` bytes at the end lie behind a stop string.
    fn generated(&self, reason: FinishReason, excess: usize, tokenizer: &Tokenizer) -> GeneratedText {
        let mut text = generated_text(tokenizer, &self.ids, self.prompt_length);
        text.truncate(text.floor_char_boundary(text.len().saturating_sub(excess)));
        let tokens = TokenCount((self.ids.len() - self.prompt_length) as u32);
        GeneratedText { text, tokens, reason, seed: self.sampler.seed() }
    }

    /// With the first token, once.
    fn prompt_tokens(&mut self, tokenizer: &Tokenizer) -> Option<PromptTokens> {
        let logprobs = self.prompt_logprobs.take()?;
        let ids = self.ids[..self.prompt_length].to_vec();
        let texts = ids.iter().map(|id| tokenizer.decode(&[*id])).collect();
        Some(PromptTokens { ids, logprobs, texts })
    }
}

/// A token with its text on its own.
fn alone(scored: Scored, tokenizer: &Tokenizer) -> Token {
    Token {
        id: scored.id,
        logprob: scored.logprob,
        text: tokenizer.decode(&[scored.id.0]),
        special: tokenizer.is_special(scored.id),
    }
}
