//! Requests and answers as messages of the contract. The only place that knows both sides.

use std::time::Duration;

use proto::units::{BlockSize, RequestId, TokenCount, TokenId};
use proto::v3;

use super::info::{Extensions, ShardInfo};
use super::{End, Generation, ShardError, Timings};
use crate::batching::{Admission, FinishReason, Grant, NewBatch, PromptToken, Step, Token};
use crate::request::{Sampling, ValidRequest};

/// The rows that join, as a message.
pub(super) fn batch(new: &NewBatch, info: &ShardInfo) -> v3::Batch {
    let most_blocks = new.admissions.iter().map(|admission| admission.blocks.len()).max().unwrap_or(0);
    let blocks: usize = new.admissions.iter().map(|admission| admission.blocks.len()).sum();
    v3::Batch {
        id: new.id.0,
        requests: new.admissions.iter().map(|admission| request(admission, info)).collect(),
        size: new.admissions.len() as u32,
        max_tokens: (blocks as u32).saturating_mul(info.block_size.get()),
        max_blocks: most_blocks as u32,
    }
}

fn request(admission: &Admission, info: &ShardInfo) -> v3::Request {
    let ValidRequest { prompt, sampling, stopping, prompt_logprobs, top_n_tokens, adapter, .. } =
        &*admission.request;
    let (inputs, input_chunks, input_ids) = match info.extensions.input_ids {
        // The text would travel for nothing.
        true => {
            let ids = prompt.ids.iter().chain(&admission.generated);
            (String::new(), Vec::new(), ids.map(|id| id.0).collect())
        }
        false => {
            let chunk = Some(v3::input_chunk::Chunk::Text(prompt.text.clone()));
            (prompt.text.clone(), vec![v3::InputChunk { chunk }], Vec::new())
        }
    };
    v3::Request {
        id: admission.id.0,
        inputs,
        truncate: prompt.length().0,
        parameters: Some(parameters(sampling, info.extensions)),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: stopping.max_new_tokens.0,
            stop_sequences: stopping.stop_sequences.clone(),
            ignore_eos_token: stopping.ignore_eos_token,
        }),
        // They were reported with the first token.
        prefill_logprobs: *prompt_logprobs && admission.generated.is_empty(),
        top_n_tokens: *top_n_tokens,
        input_chunks: Some(v3::Input { chunks: input_chunks }),
        blocks: admission.blocks.iter().map(|block| block.0).collect(),
        // Where blocks are granted, slots follow from them.
        slots: if admission.reach.is_some() { slots(admission, info.block_size) } else { Vec::new() },
        adapter_id: adapter.as_deref().map(|adapter| adapter.wire_id().to_owned()),
        cache_len: admission.cached.0,
        add_special_tokens: prompt.add_special_tokens,
        chunk_len: admission.is_cut().then_some(admission.chunk.0),
        input_ids,
        generated: admission.generated.len() as u32,
    }
}

/// What running rows get, as messages.
pub(super) fn grants(grants: &[Grant]) -> Vec<v3::Grant> {
    let grant = |Grant { id, blocks, tokens }: &Grant| v3::Grant {
        request_id: id.0,
        blocks: blocks.iter().map(|block| block.0).collect(),
        tokens: tokens.map(|tokens| tokens.0),
    };
    grants.iter().map(grant).collect()
}

fn slots(admission: &Admission, block_size: BlockSize) -> Vec<u32> {
    admission.slots(block_size).map(|slot| slot.0).collect()
}

/// Fields of an extension that was not announced stay neutral: the scheduler has refused requests that need them.
fn parameters(sampling: &Sampling, extensions: Extensions) -> v3::NextTokenChooserParameters {
    let plain = v3::NextTokenChooserParameters {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        typical_p: sampling.typical_p,
        do_sample: sampling.do_sample,
        seed: sampling.seed,
        repetition_penalty: sampling.repetition_penalty,
        watermark: sampling.watermark,
        frequency_penalty: sampling.frequency_penalty,
        grammar: String::new(),
        grammar_type: v3::GrammarType::None.into(),
        ..Default::default()
    };
    if !extensions.sampling_more {
        return plain;
    }
    let bias = |&(token, bias): &(TokenId, f32)| v3::LogitBias { token_id: token.0, bias };
    v3::NextTokenChooserParameters {
        presence_penalty: sampling.presence_penalty,
        count_penalty: sampling.count_penalty,
        min_p: sampling.min_p,
        logit_bias: sampling.logit_bias.iter().map(bias).collect(),
        ..plain
    }
}

/// What one rank answered to a step. Prefill and decode answer alike.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub(super) generations: Vec<v3::Generation>,
    pub(super) batch: Option<v3::CachedBatch>,
    pub(super) timings: Timings,
}

impl From<v3::PrefillResponse> for Answer {
    fn from(response: v3::PrefillResponse) -> Self {
        let v3::PrefillResponse { generations, batch, forward_ns, decode_ns, total_ns, concat_ns } = response;
        Self { generations, batch, timings: timings(forward_ns, decode_ns, total_ns, concat_ns) }
    }
}

impl From<v3::DecodeResponse> for Answer {
    fn from(response: v3::DecodeResponse) -> Self {
        let v3::DecodeResponse { generations, batch, forward_ns, decode_ns, total_ns, concat_ns } = response;
        Self { generations, batch, timings: timings(forward_ns, decode_ns, total_ns, concat_ns) }
    }
}

fn timings(forward_ns: u64, decode_ns: u64, total_ns: u64, concat_ns: Option<u64>) -> Timings {
    Timings {
        drops: Duration::ZERO,
        concat: concat_ns.map(Duration::from_nanos),
        forward: Duration::from_nanos(forward_ns),
        decode: Duration::from_nanos(decode_ns),
        total: Duration::from_nanos(total_ns),
    }
}

impl Answer {
    /// The answers of all ranks as one: each request is reported by one rank, the batch is the same on all of them, and
    /// the slowest rank tells the time.
    pub(super) fn join(mut answers: Vec<Self>) -> Result<Self, ShardError> {
        let last = answers.pop().ok_or(ShardError::Empty)?;
        let slowest = answers.iter().map(|answer| answer.timings).fold(last.timings, slower);
        let others = answers.into_iter().flat_map(|answer| answer.generations);
        let generations = last.generations.into_iter().chain(others).collect();
        Ok(Self { generations, batch: last.batch, timings: slowest })
    }
}

fn slower(one: Timings, other: Timings) -> Timings {
    if other.total > one.total { other } else { one }
}

/// What the messages say of requests that generated something, and of those that have failed.
///
/// Errors as [`generation`].
pub(super) fn generations(messages: Vec<v3::Generation>) -> Result<(Vec<Generation>, Failures), ShardError> {
    let (mut generations, mut failures) = (Vec::with_capacity(messages.len()), Vec::new());
    for message in messages {
        match message.failure {
            Some(reason) => failures.push((RequestId(message.request_id), ShardError::Request(reason))),
            None => generations.push(generation(message)?),
        }
    }
    Ok((generations, failures))
}

/// Requests that have ended without a further token.
type Failures = Vec<(RequestId, ShardError)>;

/// Errors when parallel lists differ in length, or when there is no token.
fn generation(message: v3::Generation) -> Result<Generation, ShardError> {
    let id = message.request_id;
    let broken = |what: &str| ShardError::Answer(format!("request {id}: {what}"));
    let mut alternatives = message.top_tokens.into_iter().map(tokens);
    let mut steps = Vec::new();
    for token in
        tokens(message.tokens.unwrap_or_default()).ok_or_else(|| broken("token lists differ in length"))?
    {
        let best = alternatives.next().unwrap_or_else(|| Some(Vec::new()));
        let best = best.ok_or_else(|| broken("alternatives differ in length"))?;
        steps.push(Step { token, alternatives: best });
    }
    let newest = steps.pop().ok_or_else(|| broken("no token"))?;
    let prompt = message
        .prefill_tokens
        .map(|tokens| prompt(tokens).ok_or_else(|| broken("prompt lists differ in length")));
    let end = message.generated_text.map(end).transpose()?;
    Ok(Generation { request: RequestId(id), prompt: prompt.transpose()?, earlier: steps, newest, end })
}

/// `None` if the lists differ in length.
fn tokens(message: v3::Tokens) -> Option<Vec<Token>> {
    let v3::Tokens { ids, logprobs, texts, is_special } = message;
    let count = ids.len();
    if [logprobs.len(), texts.len(), is_special.len()].iter().any(|&length| length != count) {
        return None;
    }
    let rest = texts.into_iter().zip(logprobs).zip(is_special);
    let token = |(id, ((text, logprob), special))| Token { id: TokenId(id), text, logprob, special };
    Some(ids.into_iter().zip(rest).map(token).collect())
}

/// `None` if the lists differ in length. The log-probability of a token that follows nothing is not a number.
fn prompt(message: v3::Tokens) -> Option<Vec<PromptToken>> {
    let v3::Tokens { ids, logprobs, texts, .. } = message;
    if logprobs.len() != ids.len() || texts.len() != ids.len() {
        return None;
    }
    let token = |(id, (text, logprob)): (u32, (String, f32))| PromptToken {
        id: TokenId(id),
        text,
        logprob: (!logprob.is_nan()).then_some(logprob),
    };
    Some(ids.into_iter().zip(texts.into_iter().zip(logprobs)).map(token).collect())
}

fn end(message: v3::GeneratedText) -> Result<End, ShardError> {
    let v3::GeneratedText { text, generated_tokens, finish_reason, seed } = message;
    let reason = match v3::FinishReason::try_from(finish_reason) {
        Ok(v3::FinishReason::Length) => FinishReason::Length,
        Ok(v3::FinishReason::EosToken) => FinishReason::EndOfSequence,
        Ok(v3::FinishReason::StopSequence) => FinishReason::StopSequence,
        Err(_) => return Err(ShardError::Answer(format!("finish reason {finish_reason}"))),
    };
    Ok(End { text, tokens: TokenCount(generated_tokens), reason, seed })
}
