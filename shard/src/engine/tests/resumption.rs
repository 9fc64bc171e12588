//! Requests that go on where they were: whatever was generated before, the rest is the same to the last bit.

use proto::units::{TokenCount, TokenId};

use super::{Shard, at_blocks, ids_of, request, tokens};
use crate::engine::adapters::AdapterId;
use crate::engine::answer::{FinishReason, Generation};
use crate::engine::request::{NewRequest, Prompt};
use crate::layers::Adapter;
use crate::sampling::SamplingParams;
use crate::sampling::penalties::{Penalties, Watermark};
use crate::sampling::tests::greedy;
use crate::text::tokenizer::tests::{DOLOR, END};

/// The request as a router sends it after it has received `known` tokens: to other blocks than before.
pub(super) fn resumed(request: &NewRequest, generated: &[u32]) -> NewRequest {
    let Prompt::Ids(prompt) = &request.prompt else { panic!("{request:?}") };
    NewRequest {
        prompt: Prompt::Ids([prompt, generated].concat()),
        generated: TokenCount(generated.len() as u32),
        placement: at_blocks(&[70, 75, 73, 71, 79, 72]),
        ..request.clone()
    }
}

fn adapter() -> AdapterId {
    AdapterId("poet".to_owned())
}

pub(super) fn shard_with_adapter(prefill_max: u32) -> Shard {
    let shard = Shard::start(prefill_max);
    shard.runtime.block_on(shard.engine.add_adapter(adapter(), Adapter::default())).unwrap();
    shard
}

/// Requests that differ in all that a row remembers of its tokens. All have the id 1.
pub(super) fn requests() -> Vec<(&'static str, NewRequest)> {
    let with = |change: &dyn Fn(&mut NewRequest)| {
        let mut request = request(1, "a prompt of more than a block", 16);
        request.placement = at_blocks(&[4, 9, 2, 7, 3, 8]);
        change(&mut request);
        request
    };
    let penalties = Penalties { repetition: 1.3, frequency: 0.7, presence: 0.4, count: 0.2 };
    // Some bytes of characters as likely as letters: with this seed whole characters come of them, and torn ones.
    let bytes = |request: &mut NewRequest| {
        request.sampling = SamplingParams { temperature: 1.4, seed: 22, ..greedy() };
        request.sampling.logit_bias = [0xe2, 0x82, 0xac].map(|byte| (TokenId(byte), 22.0)).to_vec();
        request.stopping.tokens_max = TokenCount(60);
    };
    let sampled = |seed| SamplingParams { temperature: 1.4, top_p: 0.95, seed, ..greedy() };
    vec![
        ("greedy", with(&|_| {})),
        ("alternatives", with(&|request| request.top = 3)),
        ("sampled", with(&|request| request.sampling = sampled(7))),
        (
            "filtered",
            with(&|request| {
                request.sampling = SamplingParams { top_k: 40, typical_p: 0.9, min_p: 0.01, ..sampled(8) };
            }),
        ),
        ("penalties", with(&|request| request.sampling = SamplingParams { penalties, ..sampled(9) })),
        ("greedy penalties", with(&|request| request.sampling.penalties = penalties)),
        (
            "watermark",
            with(&|request| request.sampling.watermark = Some(Watermark { gamma: 0.5, delta: 4.0 })),
        ),
        ("torn characters", with(&bytes)),
        (
            "torn characters and a stop string that never comes",
            with(&|request| {
                bytes(request);
                request.stopping.strings = vec!["⬬⬬⬬".to_owned(), "never".to_owned()];
            }),
        ),
        (
            "words and control tokens",
            with(&|request| {
                request.sampling.logit_bias = [DOLOR, END].map(|id| (TokenId(id), 21.0)).to_vec();
                request.stopping.ignore_end_of_sequence = true;
            }),
        ),
        (
            "an end of sequence",
            with(&|request| {
                request.sampling.logit_bias = vec![(TokenId(END), 21.0)];
                request.stopping.tokens_max = TokenCount(60);
            }),
        ),
        ("an adapter", with(&|request| request.adapter = Some(adapter()))),
    ]
}

fn check(shard: &Shard, name: &str, request: &NewRequest, whole: &[Generation]) {
    let ids = tokens(whole);
    for known in 0..whole.len() {
        let mut again = resumed(request, &ids[..known]);
        assert_eq!(shard.alone(again.clone()), whole[known..], "{name}: after {known} tokens");
        let Prompt::Ids(all) = &again.prompt else { unreachable!() };
        let all = all.len() as u32;
        again.chunk = Some(TokenCount(5));
        assert_eq!(shard.alone(again.clone()), whole[known..], "{name}: after {known} tokens, in chunks");
        // The blocks of the run before are still what they were: a part of them may be used again.
        for cached in [1, 16, 28, all - 1].into_iter().filter(|cached| *cached < all) {
            again.chunk = None;
            again.cached = TokenCount(cached);
            assert_eq!(
                shard.alone(again.clone()),
                whole[known..],
                "{name}: after {known} tokens, {cached} of them cached"
            );
        }
    }
}

#[test]
fn a_request_goes_on_after_any_of_its_tokens_as_if_nothing_had_been() {
    // Chunks behind the first are of four tokens.
    let shard = shard_with_adapter(4);
    let mut texts = Vec::new();
    for (name, request) in requests() {
        let whole = shard.alone(request.clone());
        check(&shard, name, &request, &whole);
        texts.push((name, whole.last().unwrap().end.clone().unwrap()));
    }
    // The cases are what their names say.
    let text = |name: &str| &texts.iter().find(|case| case.0 == name).unwrap().1.text;
    assert!(text("torn characters").contains('⬬') && text("torn characters").contains('\u{fffd}'));
    assert!(text("words and control tokens").contains(" dolor"));
    assert_ne!(text("greedy"), text("an adapter"));
    assert_ne!(text("greedy"), text("watermark"));
    assert_ne!(text("greedy"), text("greedy penalties"));
    let (_, end) = texts.iter().find(|case| case.0 == "an end of sequence").unwrap();
    assert!(end.reason == FinishReason::EndOfSequence && end.tokens > TokenCount(3), "{end:?}");
}

#[test]
fn a_stop_string_is_found_wherever_the_request_was_cut() {
    let shard = shard_with_adapter(4);
    for (name, request) in requests() {
        let texts: Vec<String> =
            shard.alone(request.clone()).into_iter().map(|generation| generation.token.text).collect();
        let text = texts.concat();
        let characters: Vec<usize> = text.char_indices().map(|(offset, _)| offset).collect();
        for (first, length) in [(1, 1), (2, 3), (3, 6)] {
            let (Some(&start), Some(&end)) = (characters.get(first), characters.get(first + length)) else {
                continue;
            };
            let mut stopped = request.clone();
            stopped.stopping.strings = vec!["never".to_owned(), text[start..end].to_owned()];
            let whole = shard.alone(stopped.clone());
            assert_eq!(
                whole.last().unwrap().end.as_ref().unwrap().reason,
                FinishReason::StopString,
                "{name}: {text}"
            );
            let ids = tokens(&whole);
            for known in 0..whole.len() {
                let again = shard.alone(resumed(&stopped, &ids[..known]));
                assert_eq!(again, whole[known..], "{name}: {text}, after {known} tokens");
            }
        }
    }
}

#[test]
fn a_request_that_goes_on_does_so_in_any_company() {
    let shard = shard_with_adapter(20);
    let cases = requests();
    let whole: Vec<_> = cases.iter().map(|(_, request)| shard.alone(request.clone())).collect();
    let again = cases.iter().zip(&whole).zip(1..).map(|(((_, request), whole), id)| {
        let mut again = resumed(request, &tokens(whole)[..3]);
        again.id.0 = id;
        again.placement = at_blocks(&[4, 1, 3, 0, 5, 2].map(|block| 6 * id as u32 + block));
        again
    });
    let mut report = shard.prefill(0, again.collect(), None).unwrap();
    let mut found = report.generations;
    while report.batch.is_some() {
        report = shard.decode(&[0]).unwrap();
        found.append(&mut report.generations);
    }
    for ((name, request), (whole, id)) in cases.iter().zip(whole.iter().zip(1..)) {
        let mut own: Vec<_> = found.iter().filter(|generation| generation.request.0 == id).cloned().collect();
        own.iter_mut().for_each(|generation| generation.request = request.id);
        assert_eq!(own, whole[3..], "{name}");
    }
}

#[test]
fn what_cannot_go_on_is_refused_by_name() {
    let shard = shard_with_adapter(100);
    let error = |change: &dyn Fn(&mut NewRequest)| {
        let mut bad = resumed(&request(8, "prompt", 4), &ids_of("ab"));
        change(&mut bad);
        shard.prefill(1, vec![bad], None).unwrap_err().to_string()
    };
    assert_eq!(
        error(&|bad| bad.generated = TokenCount(8)),
        "request 8: generated is 8, but must be below the number of input_ids, which is 8"
    );
    assert_eq!(
        error(&|bad| bad.stopping.tokens_max = TokenCount(2)),
        "request 8: generated is 2, but must be below max_new_tokens, which is 2"
    );
    let text = |bad: &mut NewRequest| {
        bad.prompt = Prompt::Text {
            text: "prompt".to_owned(),
            special: crate::text::tokenizer::SpecialTokens::Omit,
            truncate: TokenCount(10),
        };
    };
    assert_eq!(
        error(&text),
        "request 8: generated is 2, but must be below the number of input_ids, which is 0"
    );
    assert!(error(&|bad| bad.prompt_logprobs = true).contains("prefill_logprobs cannot be had"));
    assert_eq!(
        error(&|bad| bad.stopping.strings = vec!["a".to_owned()]),
        "request 8: token 1 of the 2 that were generated before ends the request"
    );
    let ended = |bad: &mut NewRequest| bad.prompt = Prompt::Ids(vec![97, 98, END]);
    assert_eq!(error(&ended), "request 8: token 2 of the 2 that were generated before ends the request");
    assert!(error(&|bad| bad.cached = TokenCount(8)).contains("cache_len 8 must be below the request's 8"));
    assert!(shard.decode(&[1]).is_err(), "nothing was added");
    shard.alone(resumed(&request(8, "prompt", 4), &ids_of("ab")));
}

#[test]
fn max_new_tokens_counts_what_was_generated_before_and_so_do_positions() {
    let shard = shard_with_adapter(300);
    let mut long = resumed(&request(1, "x", 255), &ids_of(&"b".repeat(254)));
    long.placement = at_blocks(&(20..36).collect::<Vec<_>>());
    let generations = shard.alone(long.clone());
    assert_eq!(generations.len(), 1);
    assert_eq!(generations[0].end.as_ref().unwrap().tokens, TokenCount(255));
    long.stopping.tokens_max = TokenCount(257);
    let error = shard.prefill(1, vec![long], None).unwrap_err().to_string();
    assert!(
        error.contains("a prompt of 1 tokens and 257 new ones exceed the model's 256 positions"),
        "{error}"
    );
}
