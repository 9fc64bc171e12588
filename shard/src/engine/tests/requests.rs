//! One request: its chunks, its text, its log-probabilities, its end.

use proto::units::{TokenCount, TokenId};

use super::{Shard, at_blocks, cells_of, expected, ids_of, request, row_of, tokens, tokens_of};
use crate::engine::answer::FinishReason;
use crate::engine::request::Stopping;
use crate::text::tokenizer::tests::{DOLOR, END};

#[test]
fn a_request_runs_to_exactly_its_number_of_tokens() {
    let shard = Shard::start(100);
    let generations = shard.alone(request(1, "hello", 6));
    assert_eq!(tokens(&generations), expected(&ids_of("hello"), 6));
    let end = generations[5].end.as_ref().unwrap();
    assert_eq!((end.reason, end.tokens, end.seed), (FinishReason::Length, TokenCount(6), None));
    let texts: String = generations.iter().map(|generation| generation.token.text.as_str()).collect();
    assert_eq!(end.text, texts);
    assert!(generations[..5].iter().all(|generation| generation.end.is_none()));
}

#[test]
fn chunks_change_nothing_and_emit_nothing_before_the_prompt_is_done() {
    let shard = Shard::start(3);
    let whole = tokens(&shard.alone(request(1, "a long prompt", 5)));
    let mut chunked = request(1, "a long prompt", 5);
    chunked.chunk = Some(TokenCount(4));
    let mut reports = vec![shard.prefill(7, vec![chunked], None).unwrap()];
    assert_eq!(reports[0].batch.as_ref().unwrap().tokens_next, TokenCount(3));
    while reports.last().unwrap().batch.is_some() {
        reports.push(shard.decode(&[7]).unwrap());
    }
    // 4 + 3 + 3 + 3 prompt tokens, the last three chunks by the shard's own budget.
    let counts: Vec<usize> = reports.iter().map(|report| report.generations.len()).collect();
    assert_eq!(counts, [0, 0, 0, 1, 1, 1, 1, 1]);
    assert_eq!(tokens_of(1, &reports), whole);
}

#[test]
fn a_cached_prefix_changes_nothing() {
    let shard = Shard::start(100);
    let whole = tokens(&shard.alone(request(1, "a shared prefix and more", 4)));
    let mut again = request(2, "a shared prefix and more", 4);
    // Block 11 holds the first sixteen tokens, computed above for request 1.
    again.placement = at_blocks(&[11, 40, 41]);
    again.cached = TokenCount(16);
    assert_eq!(tokens(&shard.alone(again)), whole);
}

#[test]
fn prompt_logprobs_gather_across_chunks_and_come_once() {
    let shard = Shard::start(3);
    let mut wanted = request(1, "logprobs!", 2);
    wanted.prompt_logprobs = true;
    let whole = shard.alone(wanted.clone());
    let prompt = whole[0].prompt.clone().unwrap();
    assert_eq!(whole[1].prompt, None);
    assert_eq!(
        (prompt.ids.len(), prompt.logprobs.len(), prompt.texts.concat().as_str()),
        (9, 9, "logprobs!")
    );
    assert!(prompt.logprobs[0].is_nan() && prompt.logprobs[1..].iter().all(|logprob| *logprob < 0.0));
    let row = row_of(cells_of(&ids_of("logp"), 9));
    let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    assert!((f64::from(prompt.logprobs[4]) - (f64::from(row[usize::from(b'r')]) - total.ln())).abs() < 1e-4);
    let mut chunked = wanted.clone();
    chunked.chunk = Some(TokenCount(2));
    assert_eq!(shard.alone(chunked)[0].prompt.as_ref().unwrap().logprobs[1..], prompt.logprobs[1..]);
    let mut cached = wanted;
    cached.cached = TokenCount(3);
    let logprobs = shard.alone(cached)[0].prompt.clone().unwrap().logprobs;
    assert!(logprobs[..4].iter().all(|logprob| logprob.is_nan()));
    assert_eq!(logprobs[4..], prompt.logprobs[4..]);
}

#[test]
fn alternatives_come_best_first_with_the_chosen_one_in_front() {
    let shard = Shard::start(100);
    let mut request = request(1, "top", 1);
    request.top = 4;
    let generation = shard.alone(request).remove(0);
    assert_eq!(generation.top.len(), 4);
    assert_eq!(generation.top[0].id, generation.token.id);
    assert!(generation.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
}

#[test]
fn a_stop_string_ends_the_text_also_inside_a_token() {
    let shard = Shard::start(100);
    let text: String = expected(&ids_of("stop"), 6).iter().map(|id| char::from(*id as u8)).collect();
    let mut across = request(1, "stop", 20);
    across.stopping.strings = vec!["unlikely".to_owned(), text[2..5].to_owned()];
    let generations = shard.alone(across);
    assert_eq!(generations.len(), 5);
    let end = generations[4].end.as_ref().unwrap();
    assert_eq!((end.reason, end.text.as_str()), (FinishReason::StopString, &text[..5]));
    let mut inside = request(1, "stop", 20);
    inside.stopping.strings = vec!["ol".to_owned()];
    inside.sampling.logit_bias = vec![(TokenId(DOLOR), 100.0)];
    let generation = shard.alone(inside).remove(0);
    assert_eq!((generation.token.id, generation.token.text.as_str()), (TokenId(DOLOR), " dol"));
    assert_eq!(generation.end.unwrap().text, " dol");
}

#[test]
fn the_end_token_stops_unless_it_is_ignored_and_its_text_is_left_out() {
    let shard = Shard::start(100);
    let mut ends = request(1, "end", 3);
    ends.sampling.logit_bias = vec![(TokenId(END), 100.0)];
    let generations = shard.alone(ends.clone());
    assert_eq!((generations.len(), generations[0].token.text.as_str()), (1, "<end>"));
    assert!(generations[0].token.special);
    let end = generations[0].end.as_ref().unwrap();
    assert_eq!((end.reason, end.text.as_str()), (FinishReason::EndOfSequence, ""));
    ends.stopping.ignore_end_of_sequence = true;
    assert_eq!(shard.alone(ends.clone()).len(), 3);
    ends.stopping = Stopping { tokens_max: TokenCount(1), ignore_end_of_sequence: false, strings: vec![] };
    assert_eq!(shard.alone(ends)[0].end.as_ref().unwrap().reason, FinishReason::Length);
}
