//! Messages to engine values and back. Checks here need nothing but the message.

use proto::units::{BatchId, BlockCount, BlockId, RequestId, TokenCount, TokenId};
use proto::v3;
use proto::v3::input_chunk::Chunk;

use crate::engine::adapters::AdapterId;
use crate::engine::answer::{
    BatchSummary, Failure, FinishReason, GeneratedText, Generation, PromptTokens, StepReport, Token,
};
use crate::engine::error::{EngineError, RequestError};
use crate::engine::request::{NewBatch, NewRequest, Placement, Prompt, Stopping};
use crate::engine::slots::SlotTable;
use crate::engine::step_plan::{Grant, StepPlan};
use crate::engine::warmup::Warmup;
use crate::sampling::SamplingParams;
use crate::sampling::penalties::{Penalties, Watermark};
use crate::text::tokenizer::SpecialTokens;

/// A warm-up as the engine takes it. The contract's client gives all its requests the id 0, which is fine here.
pub(super) fn warmup(request: v3::WarmupRequest, watermark: Watermark) -> Result<Warmup, EngineError> {
    Ok(Warmup {
        batch: new_batch(request.batch.ok_or(EngineError::MissingBatch)?, watermark)?,
        prefill_max: TokenCount(request.max_prefill_tokens),
        input_max: request.max_input_tokens.map(TokenCount),
        total_max: request.max_total_tokens.map(TokenCount),
    })
}

/// A prefill as the engine takes it: the new batch, the one it joins, and what becomes of that.
pub(super) fn prefill(
    request: v3::PrefillRequest,
    watermark: Watermark,
) -> Result<(NewBatch, Option<BatchId>, StepPlan), EngineError> {
    let batch = new_batch(request.batch.ok_or(EngineError::MissingBatch)?, watermark)?;
    let onto = request.cached_batch.map(|batch| BatchId(batch.id));
    Ok((batch, onto, step_plan(request.grants, request.drops)))
}

/// What a router has decided about requests that are in batches.
pub(super) fn step_plan(grants: Vec<v3::Grant>, drops: Vec<u64>) -> StepPlan {
    let grant = |v3::Grant { request_id, blocks, tokens }| Grant {
        request: RequestId(request_id),
        blocks: blocks.into_iter().map(BlockId).collect(),
        tokens: tokens.map(TokenCount),
    };
    StepPlan {
        grants: grants.into_iter().map(grant).collect(),
        drops: drops.into_iter().map(RequestId).collect(),
    }
}

/// `watermark` is what a request that asks for one gets.
fn new_batch(batch: v3::Batch, watermark: Watermark) -> Result<NewBatch, EngineError> {
    let requests = batch
        .requests
        .into_iter()
        .map(|request| {
            let id = RequestId(request.id);
            new_request(request, watermark).map_err(|source| EngineError::Request { request: id, source })
        })
        .collect::<Result<_, _>>()?;
    Ok(NewBatch { id: BatchId(batch.id), requests })
}

fn new_request(request: v3::Request, watermark: Watermark) -> Result<NewRequest, RequestError> {
    let parameters = request.parameters.ok_or(RequestError::Missing("parameters"))?;
    let stopping = request.stopping_parameters.ok_or(RequestError::Missing("stopping_parameters"))?;
    let prompt = if request.input_ids.is_empty() {
        Prompt::Text {
            text: text_of(request.input_chunks)?,
            special: if request.add_special_tokens { SpecialTokens::Add } else { SpecialTokens::Omit },
            truncate: TokenCount(request.truncate),
        }
    } else {
        Prompt::Ids(request.input_ids)
    };
    let placement = match (BlockCount(request.blocks.len() as u32), request.slots.is_empty()) {
        (BlockCount(0), _) => Placement::Numbered,
        (_, true) => Placement::Granted { blocks: request.blocks.into_iter().map(BlockId).collect() },
        (blocks, false) => Placement::Given { blocks, slots: SlotTable::from_wire(request.slots) },
    };
    Ok(NewRequest {
        id: RequestId(request.id),
        prompt,
        generated: TokenCount(request.generated),
        sampling: sampling(parameters, watermark)?,
        stopping: Stopping {
            tokens_max: TokenCount(stopping.max_new_tokens),
            strings: stopping.stop_sequences,
            ignore_end_of_sequence: stopping.ignore_eos_token,
        },
        prompt_logprobs: request.prefill_logprobs,
        top: request.top_n_tokens as usize,
        placement,
        cached: TokenCount(request.cache_len),
        chunk: request.chunk_len.map(TokenCount),
        adapter: request.adapter_id.filter(|adapter| !adapter.is_empty()).map(AdapterId),
    })
}

/// The one text of a prompt; a text model ignores images.
fn text_of(input: Option<v3::Input>) -> Result<String, RequestError> {
    let chunks = input.map(|input| input.chunks).unwrap_or_default();
    let mut texts: Vec<String> = chunks
        .into_iter()
        .filter_map(|chunk| match chunk.chunk {
            Some(Chunk::Text(text)) => Some(text),
            Some(Chunk::Image(_)) | None => None,
        })
        .collect();
    match (texts.pop(), texts.len()) {
        (Some(text), 0) => Ok(text),
        (None, _) => Err(RequestError::TextChunks(0)),
        (Some(_), others) => Err(RequestError::TextChunks(others + 1)),
    }
}

fn sampling(
    parameters: v3::NextTokenChooserParameters,
    watermark: Watermark,
) -> Result<SamplingParams, RequestError> {
    if parameters.grammar_type != v3::GrammarType::None as i32 {
        return Err(RequestError::Unsupported("a grammar"));
    }
    let share = |name, value: f32| check(name, value, (0.0..=1.0).contains(&value), "between 0 and 1");
    let positive =
        |name, value: f32| check(name, value, value > 0.0 && value.is_finite(), "a number above 0");
    let number = |name, value: f32| check(name, value, value.is_finite(), "a number");
    let logit_bias = parameters
        .logit_bias
        .iter()
        .map(|entry| Ok((TokenId(entry.token_id), number("logit_bias", entry.bias)?)))
        .collect::<Result<_, RequestError>>()?;
    Ok(SamplingParams {
        temperature: positive("temperature", parameters.temperature)?,
        top_k: parameters.top_k,
        top_p: share("top_p", parameters.top_p)?,
        typical_p: share("typical_p", parameters.typical_p)?,
        min_p: share("min_p", parameters.min_p)?,
        do_sample: parameters.do_sample,
        seed: parameters.seed,
        penalties: Penalties {
            repetition: positive("repetition_penalty", parameters.repetition_penalty)?,
            frequency: number("frequency_penalty", parameters.frequency_penalty)?,
            presence: number("presence_penalty", parameters.presence_penalty)?,
            count: number("count_penalty", parameters.count_penalty)?,
        },
        logit_bias,
        watermark: parameters.watermark.then_some(watermark),
    })
}

fn check(name: &'static str, value: f32, holds: bool, expected: &'static str) -> Result<f32, RequestError> {
    if holds { Ok(value) } else { Err(RequestError::Parameter { name, value, expected }) }
}

/// Parts that the answers to Prefill and Decode share.
pub(super) struct Step {
    pub(super) generations: Vec<v3::Generation>,
    pub(super) batch: Option<v3::CachedBatch>,
    pub(super) forward_ns: u64,
    pub(super) decode_ns: u64,
    pub(super) total_ns: u64,
    pub(super) concat_ns: Option<u64>,
}

impl From<StepReport> for Step {
    fn from(report: StepReport) -> Self {
        let nanoseconds = |duration: std::time::Duration| duration.as_nanos() as u64;
        Self {
            generations: report
                .generations
                .into_iter()
                .map(generation)
                .chain(report.failures.into_iter().map(failure))
                .collect(),
            batch: report.batch.map(cached_batch),
            forward_ns: nanoseconds(report.timings.forward),
            decode_ns: nanoseconds(report.timings.decode),
            total_ns: nanoseconds(report.timings.total),
            concat_ns: report.timings.concat.map(nanoseconds),
        }
    }
}

/// A batch as the router sees it.
pub(super) fn cached_batch(batch: BatchSummary) -> v3::CachedBatch {
    v3::CachedBatch {
        id: batch.id.0,
        size: batch.requests.len() as u32,
        request_ids: batch.requests.into_iter().map(|id| id.0).collect(),
        max_tokens: batch.tokens_max.0,
        current_tokens: batch.tokens_next.0,
    }
}

fn generation(generation: Generation) -> v3::Generation {
    let Generation { request, prompt, token, top, end } = generation;
    v3::Generation {
        request_id: request.0,
        prefill_tokens: prompt.map(prompt_tokens),
        tokens: Some(tokens(vec![token])),
        generated_text: end.map(generated_text),
        top_tokens: if top.is_empty() { Vec::new() } else { vec![tokens(top)] },
        failure: None,
    }
}

fn failure(Failure { request, reason }: Failure) -> v3::Generation {
    v3::Generation { request_id: request.0, failure: Some(reason.to_string()), ..Default::default() }
}

fn prompt_tokens(PromptTokens { ids, logprobs, texts }: PromptTokens) -> v3::Tokens {
    v3::Tokens { ids, logprobs, texts, is_special: Vec::new() }
}

fn tokens(tokens: Vec<Token>) -> v3::Tokens {
    v3::Tokens {
        ids: tokens.iter().map(|token| token.id.0).collect(),
        logprobs: tokens.iter().map(|token| token.logprob).collect(),
        is_special: tokens.iter().map(|token| token.special).collect(),
        texts: tokens.into_iter().map(|token| token.text).collect(),
    }
}

fn generated_text(GeneratedText { text, tokens, reason, seed }: GeneratedText) -> v3::GeneratedText {
    let finish_reason = match reason {
        FinishReason::Length => v3::FinishReason::Length,
        FinishReason::EndOfSequence => v3::FinishReason::EosToken,
        FinishReason::StopString => v3::FinishReason::StopSequence,
    };
    v3::GeneratedText { text, generated_tokens: tokens.0, finish_reason: finish_reason as i32, seed }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::sampling::NotNumbers;

    const WATERMARK: Watermark = Watermark { gamma: 0.5, delta: 2.0 };

    pub(crate) fn neutral() -> v3::NextTokenChooserParameters {
        v3::NextTokenChooserParameters {
            temperature: 1.0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            ..Default::default()
        }
    }

    pub(crate) fn request(id: u64, text: &str) -> v3::Request {
        v3::Request {
            id,
            input_chunks: Some(v3::Input { chunks: vec![text_chunk(text)] }),
            truncate: 100,
            parameters: Some(neutral()),
            stopping_parameters: Some(v3::StoppingCriteriaParameters {
                max_new_tokens: 4,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn text_chunk(text: &str) -> v3::InputChunk {
        v3::InputChunk { chunk: Some(Chunk::Text(text.to_owned())) }
    }

    fn error(change: impl FnOnce(&mut v3::Request)) -> String {
        let mut request = request(5, "hello");
        change(&mut request);
        let batch = v3::Batch { id: 1, requests: vec![request], ..Default::default() };
        new_batch(batch, WATERMARK).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_with_a_request_is_named() {
        assert_eq!(error(|request| request.parameters = None), "request 5: parameters is missing");
        let parameters = |change: fn(&mut v3::NextTokenChooserParameters)| {
            error(|request| change(request.parameters.as_mut().unwrap()))
        };
        assert_eq!(
            parameters(|p| p.temperature = 0.0),
            "request 5: temperature is 0, but must be a number above 0"
        );
        assert_eq!(parameters(|p| p.top_p = 1.5), "request 5: top_p is 1.5, but must be between 0 and 1");
        assert!(parameters(|p| p.frequency_penalty = f32::NAN).contains("frequency_penalty is NaN"));
        assert!(parameters(|p| p.grammar_type = 2).contains("a grammar is not supported"));
    }

    #[test]
    fn a_text_model_takes_one_text_and_ignores_images() {
        let image = v3::InputChunk { chunk: Some(Chunk::Image(v3::Image::default())) };
        let input = |chunks: Vec<v3::InputChunk>| Some(v3::Input { chunks });
        assert_eq!(text_of(input(vec![text_chunk("a"), image.clone()])).unwrap(), "a");
        let count = |input| match text_of(input) {
            Err(RequestError::TextChunks(count)) => count,
            other => panic!("{other:?}"),
        };
        assert_eq!(count(None), 0);
        assert_eq!(count(input(vec![image])), 0);
        assert_eq!(count(input(vec![text_chunk("a"), text_chunk("b")])), 2);
    }

    #[test]
    fn ids_of_the_router_go_before_its_text() {
        let mut request = request(5, "hello");
        request.input_ids = vec![1, 2];
        let request = new_request(request, WATERMARK).unwrap();
        assert!(matches!(request.prompt, Prompt::Ids(ids) if ids == [1, 2]));
    }

    #[test]
    fn a_step_becomes_an_answer() {
        let token =
            |id, text: &str| Token { id: TokenId(id), logprob: -0.5, text: text.into(), special: id > 9 };
        let report = StepReport {
            generations: vec![Generation {
                request: RequestId(3),
                prompt: None,
                token: token(7, "x"),
                top: vec![token(7, "x"), token(10, "<e>")],
                end: Some(GeneratedText {
                    text: "x".into(),
                    tokens: TokenCount(1),
                    reason: FinishReason::StopString,
                    seed: Some(9),
                }),
            }],
            failures: vec![Failure { request: RequestId(4), reason: NotNumbers }],
            batch: None,
            timings: Default::default(),
        };
        let step = Step::from(report);
        let generation = &step.generations[0];
        assert_eq!(generation.tokens.as_ref().unwrap().texts, ["x"]);
        assert_eq!(generation.top_tokens[0].is_special, [false, true]);
        assert_eq!(
            generation.generated_text.as_ref().unwrap().finish_reason(),
            v3::FinishReason::StopSequence
        );
        let failed = &step.generations[1];
        assert_eq!((failed.request_id, &failed.tokens), (4, &None));
        assert_eq!(failed.failure.as_deref(), Some("the model's logits are not numbers"));
        assert_eq!((step.generations.len(), step.concat_ns), (2, None));
    }
}
