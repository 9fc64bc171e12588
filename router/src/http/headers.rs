//! The `x-*` headers of generation routes. Errors carry none of them.

use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::metrics::RequestTimings;

/// What a finished request is described by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    /// Unicode characters of the prompt.
    pub(super) characters: usize,
    pub(super) prompt_tokens: u32,
    /// Of them those that were found in the cache.
    pub(super) cached_tokens: u32,
    pub(super) generated_tokens: u32,
    pub(super) timings: RequestTimings,
}

/// For an answer in one piece.
pub(super) fn whole(compute_type: &HeaderValue, summary: &Summary) -> HeaderMap {
    let Summary { characters, prompt_tokens, cached_tokens, generated_tokens, timings } = *summary;
    let per_token = timings.inference / generated_tokens.max(1);
    let mut headers = base(compute_type, characters);
    let seconds = timings.total.as_secs_f64().to_string();
    headers.insert("x-compute-time", HeaderValue::try_from(seconds).expect("a number is a header value"));
    let numbers: [(&'static str, u64); 8] = [
        ("x-total-time", timings.total.as_millis() as u64),
        ("x-validation-time", timings.validation.as_millis() as u64),
        ("x-queue-time", timings.queue.as_millis() as u64),
        ("x-inference-time", timings.inference.as_millis() as u64),
        ("x-time-per-token", per_token.as_millis() as u64),
        ("x-prompt-tokens", prompt_tokens.into()),
        ("x-cached-tokens", cached_tokens.into()),
        ("x-generated-tokens", generated_tokens.into()),
    ];
    headers.extend(numbers.map(|(name, number)| (HeaderName::from_static(name), HeaderValue::from(number))));
    headers
}

/// For a stream: how long things take is not known when its headers leave.
pub(super) fn streamed(compute_type: &HeaderValue, characters: usize) -> HeaderMap {
    let mut headers = base(compute_type, characters);
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers
}

fn base(compute_type: &HeaderValue, characters: usize) -> HeaderMap {
    HeaderMap::from_iter([
        (HeaderName::from_static("x-compute-type"), compute_type.clone()),
        (HeaderName::from_static("x-compute-characters"), HeaderValue::from(characters)),
    ])
}
