//! Raw parameters to a [`ValidRequest`]: one function per rule, called in the order in which failures are reported.

use std::sync::Arc;

use proto::units::{TokenCount, TokenId};
use thiserror::Error;

use super::params::{Dialect, Params};
use super::{Priority, Prompt, Sampling, Stopping, ValidRequest};
use crate::adapters::{Adapter, Adapters, UnknownAdapter};
use crate::text::{Encoded, Tokenizer, TokenizerError};

/// What requests are held against.
#[derive(Clone, Debug)]
pub(crate) struct RequestLimits {
    pub(crate) best_of_max: u32,
    pub(crate) choices_max: u32,
    pub(crate) stop_sequences_max: u32,
    pub(crate) top_n_tokens_max: u32,
    pub(crate) input_tokens_max: TokenCount,
    /// Prompt and output together; more than `input_tokens_max`.
    pub(crate) total_tokens_max: TokenCount,
    /// Tokens that the model has embeddings for, from id 0 on. A tokenizer may know more.
    pub(crate) vocabulary: u32,
    /// Whether the shards understand presence and count penalty, `min_p` and `logit_bias`.
    pub(crate) sampling_more: bool,
}

/// A request that cannot be served as it is. The text names the parameter, its value and the limit.
#[derive(Clone, Debug, Error, PartialEq)]
pub(crate) enum ValidationError {
    #[error("`{name}` is {value}, but must be {range}")]
    Range { name: &'static str, value: f32, range: &'static str },
    #[error("`{name}` is {value}, but must be at least 1")]
    NotPositive { name: &'static str, value: i64 },
    #[error("`priority` is {0}, but must be {range}", range = Priority::RANGE)]
    Priority(i64),
    #[error("`{name}` asks for {given}, but this server allows at most {limit} (`{flag}`)")]
    Limit { name: &'static str, given: u64, limit: u64, flag: &'static str },
    #[error("`stop` contains an empty string")]
    EmptyStop,
    #[error(
        "`best_of` is {0}, which needs sampling: set `do_sample`, `temperature`, `top_k`, `top_p` or `typical_p`"
    )]
    BestOfWithoutSampling(u32),
    #[error("`best_of` is {0}, which excludes `seed`: the sequences would be the same")]
    BestOfWithSeed(u32),
    #[error("`best_of` is {0}, but must be 1 when streaming, sampling or not")]
    BestOfStreamed(u32),
    #[error("`decoder_input_details` is not available when streaming")]
    PromptDetailsStreamed,
    #[error("`inputs` is empty")]
    EmptyInputs,
    #[error("`inputs` has no tokens")]
    NoTokens,
    #[error("`inputs` has {given} tokens, but this server allows at most {limit} (`--max-input-tokens`)")]
    PromptTooLong { given: usize, limit: TokenCount },
    #[error("`inputs` contains token {id}, but the model's vocabulary has {vocabulary} tokens")]
    PromptOutsideVocabulary { id: TokenId, vocabulary: u32 },
    #[error("`logit_bias` names token {id}, but the model's vocabulary has {vocabulary} tokens")]
    BiasOutsideVocabulary { id: TokenId, vocabulary: u32 },
    #[error("`{0}` is not supported")]
    Unsupported(&'static str),
    #[error("`{0}` is not supported by the model server")]
    UnsupportedByShards(&'static str),
    #[error("`inputs`: {0}")]
    Tokenizer(#[from] TokenizerError),
}

/// Turns raw requests into valid ones.
#[derive(Clone, Debug)]
pub(crate) struct Validator {
    tokenizer: Tokenizer,
    limits: Arc<RequestLimits>,
    adapters: Adapters,
}

impl Validator {
    pub(crate) fn new(tokenizer: Tokenizer, limits: RequestLimits, adapters: Adapters) -> Self {
        Self { tokenizer, limits: Arc::new(limits), adapters }
    }

    /// The rules that come before admission.
    pub(crate) fn check_sequences(&self, params: &Params, streamed: bool) -> Result<(), ValidationError> {
        if streamed {
            streamable(params)?;
        }
        best_of_limit(params, &self.limits)?;
        choices(params, &self.limits)
    }

    /// The adapter that a request names. On the native routes it has to be loaded; on OpenAI's the name may be anything,
    /// and what is no adapter's means the base model.
    pub(crate) fn adapter(&self, params: &Params) -> Result<Option<Arc<Adapter>>, UnknownAdapter> {
        let Some(name) = &params.adapter else { return Ok(None) };
        match (self.adapters.find(name), params.dialect) {
            (None, Dialect::Native) => Err(self.adapters.unknown("adapter_id", name)),
            (found, _) => Ok(found),
        }
    }

    /// All other rules. Without a seed, a random one is drawn.
    pub(crate) async fn validate(
        &self,
        inputs: String,
        params: Params,
        adapter: Option<Arc<Adapter>>,
    ) -> Result<ValidRequest, ValidationError> {
        check(&params, &self.limits)?;
        let priority = priority(&params)?;
        let truncate = truncation(&inputs, &params, &self.limits)?;
        let Encoded { text, ids } =
            self.tokenizer.encode(inputs, params.add_special_tokens, truncate).await?;
        let room = room(&ids, &self.limits)?;
        in_vocabulary(&ids, &self.limits)?;
        grammar(&params)?;
        Ok(ValidRequest {
            prompt: Prompt { text, ids, add_special_tokens: params.add_special_tokens },
            prompt_logprobs: params.prompt_logprobs,
            top_n_tokens: params.top_n_tokens.unwrap_or(0),
            stopping: Stopping {
                // More than the room is not an error: generation ends at the limit.
                max_new_tokens: params.max_new_tokens.map_or(room, |asked| room.min(TokenCount(asked))),
                stop_sequences: params.stop.clone(),
                ignore_eos_token: false,
            },
            sampling: sampling(params),
            adapter,
            priority,
            deadline: None,
        })
    }
}

/// The rules on parameters alone.
fn check(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    best_of_samples(params)?;
    temperature(params)?;
    repetition_penalty(params)?;
    frequency_penalty(params)?;
    presence_penalty(params)?;
    min_p(params)?;
    logit_bias(params, limits)?;
    top_p(params)?;
    typical_p(params)?;
    top_k(params)?;
    max_new_tokens(params)?;
    stop(params, limits)?;
    best_of_seed(params)?;
    top_n_tokens(params, limits)?;
    sampling_more(params, limits)
}

fn streamable(params: &Params) -> Result<(), ValidationError> {
    match params.best_of {
        Some(best_of) if best_of != 1 => Err(ValidationError::BestOfStreamed(best_of)),
        _ if params.prompt_logprobs => Err(ValidationError::PromptDetailsStreamed),
        _ => Ok(()),
    }
}

fn best_of_limit(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    at_most("best_of", params.best_of, limits.best_of_max.max(1), "--max-best-of")
}

fn choices(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    positive("n", params.choices.map(i64::from))?;
    at_most("n", params.choices, limits.choices_max, "--max-client-batch-size")
}

fn best_of_samples(params: &Params) -> Result<(), ValidationError> {
    let samples = params.do_sample
        || params.temperature.is_some()
        || params.top_k.is_some()
        || params.top_p.is_some()
        || params.typical_p.is_some();
    match params.best_of {
        Some(best_of) if best_of > 1 && !samples => Err(ValidationError::BestOfWithoutSampling(best_of)),
        _ => Ok(()),
    }
}

fn temperature(params: &Params) -> Result<(), ValidationError> {
    match params.dialect {
        Dialect::Native => within("temperature", params.temperature, |t| t > 0.0, "above 0"),
        Dialect::OpenAi => within("temperature", params.temperature, |t| t >= 0.0, "0 or above"),
    }
}

fn repetition_penalty(params: &Params) -> Result<(), ValidationError> {
    within("repetition_penalty", params.repetition_penalty, |p| p > 0.0, "above 0")
}

fn frequency_penalty(params: &Params) -> Result<(), ValidationError> {
    within("frequency_penalty", params.frequency_penalty, |p| (-2.0..=2.0).contains(&p), "between -2 and 2")
}

fn presence_penalty(params: &Params) -> Result<(), ValidationError> {
    within("presence_penalty", params.presence_penalty, |p| (-2.0..=2.0).contains(&p), "between -2 and 2")
}

fn min_p(params: &Params) -> Result<(), ValidationError> {
    within("min_p", params.min_p, |p| (0.0..=1.0).contains(&p), "between 0 and 1")
}

fn logit_bias(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    for &(id, bias) in &params.logit_bias {
        within("logit_bias", Some(bias), |b| (-100.0..=100.0).contains(&b), "between -100 and 100")?;
        if id.0 >= limits.vocabulary {
            return Err(ValidationError::BiasOutsideVocabulary { id, vocabulary: limits.vocabulary });
        }
    }
    Ok(())
}

fn top_p(params: &Params) -> Result<(), ValidationError> {
    within("top_p", params.top_p, |p| p > 0.0 && p <= 1.0, "above 0 and at most 1")
}

fn typical_p(params: &Params) -> Result<(), ValidationError> {
    within("typical_p", params.typical_p, |p| p > 0.0 && p < 1.0, "above 0 and below 1")
}

fn top_k(params: &Params) -> Result<(), ValidationError> {
    positive("top_k", params.top_k.map(i64::from))
}

fn max_new_tokens(params: &Params) -> Result<(), ValidationError> {
    positive(params.dialect.max_new_tokens(), params.max_new_tokens.map(i64::from))
}

fn stop(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    let given = params.stop.len() as u64;
    let limit = u64::from(limits.stop_sequences_max);
    if given > limit {
        return Err(ValidationError::Limit { name: "stop", given, limit, flag: "--max-stop-sequences" });
    }
    // It would occur in every text, and end every generation before its first character.
    if params.stop.iter().any(String::is_empty) {
        return Err(ValidationError::EmptyStop);
    }
    Ok(())
}

fn best_of_seed(params: &Params) -> Result<(), ValidationError> {
    match params.best_of {
        Some(best_of) if best_of > 1 && params.seed.is_some() => {
            Err(ValidationError::BestOfWithSeed(best_of))
        }
        _ => Ok(()),
    }
}

fn top_n_tokens(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    let name = params.dialect.top_n_tokens();
    at_most(name, params.top_n_tokens, limits.top_n_tokens_max, "--max-top-n-tokens")
}

fn priority(params: &Params) -> Result<Priority, ValidationError> {
    let Some(value) = params.priority else { return Ok(Priority::default()) };
    u8::try_from(value).ok().and_then(Priority::new).ok_or(ValidationError::Priority(value))
}

/// Refuses what the shards would ignore.
fn sampling_more(params: &Params, limits: &RequestLimits) -> Result<(), ValidationError> {
    let needed = [
        ("min_p", params.min_p.is_some_and(|p| p != 0.0)),
        ("presence_penalty", params.presence_penalty.is_some_and(|p| p != 0.0)),
        (
            "frequency_penalty",
            params.dialect == Dialect::OpenAi && params.frequency_penalty.is_some_and(|p| p != 0.0),
        ),
        ("logit_bias", !params.logit_bias.is_empty()),
    ];
    match needed.iter().find(|(_, needed)| *needed) {
        Some((name, _)) if !limits.sampling_more => Err(ValidationError::UnsupportedByShards(name)),
        _ => Ok(()),
    }
}

/// The longest prompt the client wants, if it says so.
fn truncation(
    inputs: &str,
    params: &Params,
    limits: &RequestLimits,
) -> Result<Option<TokenCount>, ValidationError> {
    if inputs.is_empty() {
        return Err(ValidationError::EmptyInputs);
    }
    positive("truncate", params.truncate.map(i64::from))?;
    at_most("truncate", params.truncate, limits.input_tokens_max.0, "--max-input-tokens")?;
    Ok(params.truncate.map(TokenCount))
}

/// Tokens left for the output.
fn room(ids: &[TokenId], limits: &RequestLimits) -> Result<TokenCount, ValidationError> {
    if ids.is_empty() {
        return Err(ValidationError::NoTokens);
    }
    if ids.len() > limits.input_tokens_max.0 as usize {
        return Err(ValidationError::PromptTooLong { given: ids.len(), limit: limits.input_tokens_max });
    }
    Ok(TokenCount(limits.total_tokens_max.0 - ids.len() as u32))
}

/// A shard that is given a token its model does not have refuses the whole step, and with it the requests of others.
fn in_vocabulary(ids: &[TokenId], limits: &RequestLimits) -> Result<(), ValidationError> {
    let vocabulary = limits.vocabulary;
    match ids.iter().find(|id| id.0 >= vocabulary) {
        Some(&id) => Err(ValidationError::PromptOutsideVocabulary { id, vocabulary }),
        None => Ok(()),
    }
}

fn grammar(params: &Params) -> Result<(), ValidationError> {
    match params.grammar {
        Some(_) if params.dialect == Dialect::Native => Err(ValidationError::Unsupported("grammar")),
        Some(_) => Err(ValidationError::Unsupported("response_format")),
        None => Ok(()),
    }
}

fn sampling(params: Params) -> Sampling {
    let greedy = params.is_greedy();
    let unless_greedy = |value: Option<f32>| value.filter(|_| !greedy);
    let (frequency_penalty, count_penalty) = match params.dialect {
        Dialect::Native => (params.frequency_penalty, None),
        Dialect::OpenAi => (None, params.frequency_penalty),
    };
    Sampling {
        do_sample: params.do_sample && !greedy,
        temperature: unless_greedy(params.temperature).unwrap_or(1.0),
        top_k: params.top_k.filter(|_| !greedy).map_or(0, i32::unsigned_abs),
        top_p: unless_greedy(params.top_p).unwrap_or(1.0),
        typical_p: unless_greedy(params.typical_p).unwrap_or(1.0),
        min_p: unless_greedy(params.min_p).unwrap_or(0.0),
        repetition_penalty: params.repetition_penalty.unwrap_or(1.0),
        frequency_penalty: frequency_penalty.unwrap_or(0.0),
        presence_penalty: params.presence_penalty.unwrap_or(0.0),
        count_penalty: count_penalty.unwrap_or(0.0),
        logit_bias: params.logit_bias,
        watermark: params.watermark,
        seed: params.seed.unwrap_or_else(rand::random),
    }
}

/// Holds a number against a range. What is not finite is in none.
fn within(
    name: &'static str,
    value: Option<f32>,
    accepts: impl Fn(f32) -> bool,
    range: &'static str,
) -> Result<(), ValidationError> {
    match value {
        Some(value) if !value.is_finite() || !accepts(value) => {
            Err(ValidationError::Range { name, value, range })
        }
        _ => Ok(()),
    }
}

fn positive(name: &'static str, value: Option<i64>) -> Result<(), ValidationError> {
    match value {
        Some(value) if value < 1 => Err(ValidationError::NotPositive { name, value }),
        _ => Ok(()),
    }
}

/// Holds a number against a limit of this server.
fn at_most(
    name: &'static str,
    given: Option<u32>,
    limit: u32,
    flag: &'static str,
) -> Result<(), ValidationError> {
    match given {
        Some(given) if given > limit => {
            Err(ValidationError::Limit { name, given: given.into(), limit: limit.into(), flag })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::testing;

    fn limits() -> RequestLimits {
        RequestLimits {
            best_of_max: 2,
            choices_max: 4,
            stop_sequences_max: 2,
            top_n_tokens_max: 5,
            input_tokens_max: TokenCount(6),
            total_tokens_max: TokenCount(10),
            vocabulary: 10,
            sampling_more: true,
        }
    }

    fn native() -> Params {
        Params::new(Dialect::Native)
    }

    fn openai() -> Params {
        Params::new(Dialect::OpenAi)
    }

    fn validator(limits: RequestLimits) -> Validator {
        Validator::new(testing::words(), limits, Adapters::fixed(&[]))
    }

    /// Holds the rules on parameters against an expected complaint; empty is none.
    #[track_caller]
    fn check(params: Params, expected: &str) {
        let result = validator(limits())
            .check_sequences(&params, false)
            .and_then(|()| super::check(&params, &limits()))
            .and_then(|()| priority(&params).map(drop))
            .and_then(|()| grammar(&params));
        let complaint = result.err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(complaint, expected);
    }

    #[test]
    fn every_parameter_is_held_against_its_range() {
        let range =
            |name: &str, value: &str, range: &str| format!("`{name}` is {value}, but must be {range}");
        check(native(), "");
        check(Params { temperature: Some(0.0), ..native() }, &range("temperature", "0", "above 0"));
        check(
            Params { temperature: Some(f32::INFINITY), ..native() },
            &range("temperature", "inf", "above 0"),
        );
        check(Params { temperature: Some(0.0), ..openai() }, "");
        check(Params { temperature: Some(-0.5), ..openai() }, &range("temperature", "-0.5", "0 or above"));
        check(
            Params { repetition_penalty: Some(0.0), ..native() },
            &range("repetition_penalty", "0", "above 0"),
        );
        check(
            Params { frequency_penalty: Some(-2.1), ..native() },
            &range("frequency_penalty", "-2.1", "between -2 and 2"),
        );
        check(
            Params { presence_penalty: Some(2.5), ..openai() },
            &range("presence_penalty", "2.5", "between -2 and 2"),
        );
        check(Params { min_p: Some(1.1), ..openai() }, &range("min_p", "1.1", "between 0 and 1"));
        check(Params { top_p: Some(1.0), ..native() }, "");
        check(Params { top_p: Some(0.0), ..native() }, &range("top_p", "0", "above 0 and at most 1"));
        check(Params { top_p: Some(1.5), ..native() }, &range("top_p", "1.5", "above 0 and at most 1"));
        check(Params { typical_p: Some(1.0), ..native() }, &range("typical_p", "1", "above 0 and below 1"));
        check(Params { top_k: Some(-1), ..native() }, &range("top_k", "-1", "at least 1"));
        check(Params { max_new_tokens: Some(0), ..native() }, &range("max_new_tokens", "0", "at least 1"));
        check(Params { max_new_tokens: Some(0), ..openai() }, &range("max_tokens", "0", "at least 1"));
        check(Params { choices: Some(0), ..openai() }, &range("n", "0", "at least 1"));
        for priority in [-1, 10, 256] {
            let complaint = range("priority", &priority.to_string(), "a whole number from 0 to 9");
            check(Params { priority: Some(priority), ..native() }, &complaint);
        }
    }

    #[test]
    fn every_count_is_held_against_its_limit() {
        let limit = |name: &str, given: u32, limit: u32, flag: &str| {
            format!("`{name}` asks for {given}, but this server allows at most {limit} (`{flag}`)")
        };
        let three = vec!["a".to_owned(); 3];
        check(Params { stop: three, ..native() }, &limit("stop", 3, 2, "--max-stop-sequences"));
        check(Params { stop: vec![String::new()], ..native() }, "`stop` contains an empty string");
        check(Params { best_of: Some(3), ..native() }, &limit("best_of", 3, 2, "--max-best-of"));
        check(Params { choices: Some(5), ..openai() }, &limit("n", 5, 4, "--max-client-batch-size"));
        check(
            Params { top_n_tokens: Some(6), ..native() },
            &limit("top_n_tokens", 6, 5, "--max-top-n-tokens"),
        );
        check(
            Params { top_n_tokens: Some(6), ..openai() },
            &limit("top_logprobs", 6, 5, "--max-top-n-tokens"),
        );
    }

    #[test]
    fn best_of_needs_sampling_and_no_seed() {
        let twice = Params { best_of: Some(2), ..native() };
        check(
            twice.clone(),
            "`best_of` is 2, which needs sampling: set `do_sample`, `temperature`, `top_k`, `top_p` or `typical_p`",
        );
        check(Params { do_sample: true, ..twice.clone() }, "");
        check(Params { top_k: Some(3), ..twice.clone() }, "");
        check(
            Params { do_sample: true, seed: Some(1), ..twice },
            "`best_of` is 2, which excludes `seed`: the sequences would be the same",
        );
        check(Params { best_of: Some(0), seed: Some(1), ..native() }, "");
    }

    #[test]
    fn the_first_broken_rule_is_reported() {
        let params = Params { temperature: Some(0.0), top_p: Some(0.0), top_k: Some(0), ..native() };
        check(params, "`temperature` is 0, but must be above 0");
    }

    #[test]
    fn what_is_not_there_yet_is_refused_by_name() {
        let grammar = Some(serde_json::json!({"type": "regex", "value": "a"}));
        check(Params { grammar: grammar.clone(), ..native() }, "`grammar` is not supported");
        check(Params { grammar, ..openai() }, "`response_format` is not supported");
    }

    #[test]
    fn logit_bias_stays_in_the_vocabulary() {
        check(Params { logit_bias: vec![(TokenId(9), 100.0)], ..openai() }, "");
        check(
            Params { logit_bias: vec![(TokenId(10), 1.0)], ..openai() },
            "`logit_bias` names token 10, but the model's vocabulary has 10 tokens",
        );
        check(
            Params { logit_bias: vec![(TokenId(1), -101.0)], ..openai() },
            "`logit_bias` is -101, but must be between -100 and 100",
        );
    }

    #[test]
    fn shards_that_would_ignore_a_parameter_are_not_sent_it() {
        let plain = RequestLimits { sampling_more: false, ..limits() };
        let refused = |params: Params| super::check(&params, &plain).is_err();
        assert!(refused(Params { min_p: Some(0.1), ..openai() }));
        assert!(refused(Params { frequency_penalty: Some(0.1), ..openai() }));
        assert!(!refused(Params { frequency_penalty: Some(0.1), ..native() }));
        assert!(!refused(Params { presence_penalty: Some(0.0), ..openai() }));
    }

    #[test]
    fn streams_have_one_sequence_and_no_prompt_details() {
        let streamable = |params: Params| super::streamable(&params).is_ok();
        assert!(streamable(native()));
        assert!(streamable(Params { best_of: Some(1), ..native() }));
        assert!(!streamable(Params { best_of: Some(0), ..native() }));
        assert!(!streamable(Params { prompt_logprobs: true, ..native() }));
    }

    async fn validate(inputs: &str, params: Params) -> Result<ValidRequest, ValidationError> {
        validator(limits()).validate(inputs.to_owned(), params, None).await
    }

    #[tokio::test]
    async fn output_is_cut_to_the_room_the_prompt_leaves() {
        let unlimited = validate("a b c", native()).await.unwrap();
        assert_eq!(unlimited.prompt.length(), TokenCount(4), "three words and the leading special token");
        assert_eq!(unlimited.stopping.max_new_tokens, TokenCount(6));
        let huge = validate("a b c", Params { max_new_tokens: Some(100_000), ..native() }).await.unwrap();
        assert_eq!(huge.stopping.max_new_tokens, TokenCount(6));
        let small = validate("a b c", Params { max_new_tokens: Some(2), ..native() }).await.unwrap();
        assert_eq!(small.stopping.max_new_tokens, TokenCount(2));
    }

    #[tokio::test]
    async fn a_prompt_that_is_too_long_is_an_error_unless_truncated() {
        let long = "a b c d e f";
        let error = validate(long, native()).await.unwrap_err();
        assert_eq!(error, ValidationError::PromptTooLong { given: 7, limit: TokenCount(6) });
        let cut = validate(long, Params { truncate: Some(3), ..native() }).await.unwrap();
        assert_eq!(cut.prompt.ids.as_ref(), testing::ids("<s> e f"));
        assert_eq!(cut.prompt.text, long);
        let error = validate(long, Params { truncate: Some(7), ..native() }).await.unwrap_err();
        assert!(matches!(error, ValidationError::Limit { name: "truncate", given: 7, limit: 6, .. }));
        let error = validate(long, Params { truncate: Some(0), ..native() }).await.unwrap_err();
        assert_eq!(error, ValidationError::NotPositive { name: "truncate", value: 0 });
    }

    #[tokio::test]
    async fn a_token_that_only_the_tokenizer_knows_is_refused() {
        let small = validator(RequestLimits { vocabulary: 3, ..limits() });
        assert!(small.validate("a b".to_owned(), native(), None).await.is_ok());
        let error = small.validate("a c".to_owned(), native(), None).await.unwrap_err().to_string();
        assert_eq!(error, "`inputs` contains token 3, but the model's vocabulary has 3 tokens");
    }

    #[tokio::test]
    async fn an_empty_prompt_is_refused() {
        assert_eq!(validate("", native()).await.unwrap_err(), ValidationError::EmptyInputs);
        let bare = Params { add_special_tokens: false, ..native() };
        assert_eq!(validate(" ", bare).await.unwrap_err(), ValidationError::NoTokens);
    }

    #[tokio::test]
    async fn the_frequency_penalty_means_what_its_api_says() {
        let native =
            validate("a", Params { frequency_penalty: Some(0.5), ..native() }).await.unwrap().sampling;
        assert_eq!((native.frequency_penalty, native.count_penalty), (0.5, 0.0));
        let openai =
            validate("a", Params { frequency_penalty: Some(0.5), ..openai() }).await.unwrap().sampling;
        assert_eq!((openai.frequency_penalty, openai.count_penalty), (0.0, 0.5));
    }

    #[tokio::test]
    async fn temperature_zero_switches_every_warper_off() {
        let params =
            Params { temperature: Some(0.0), top_p: Some(0.5), do_sample: true, seed: Some(7), ..openai() };
        let sampling = validate("a", params).await.unwrap().sampling;
        assert_eq!((sampling.do_sample, sampling.temperature, sampling.top_p), (false, 1.0, 1.0));
        assert_eq!(sampling.seed, 7);
    }
}
