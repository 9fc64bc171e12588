//! Shards for tests: a small correct shard without a model, and a strict one. It holds every plan to the contract and
//! panics with a sentence when one breaks it.

use std::collections::HashSet;
use std::time::Duration;

use proto::units::{RequestId, SlotIndex, TokenCount, TokenId};

use super::{End, Generation, ShardError, Shards, StepOutput};
use crate::batching::{Admission, FinishReason, Limits, NewBatch, PromptPolicy, Step, StepPlan, Token};
use crate::request::{Priority, Prompt, Sampling, Stopping, ValidRequest};

/// Answers every request with the tokens of [`token`], until its limit or the end that its prompt asks for.
#[derive(Debug)]
pub(crate) struct ScriptedShards {
    limits: Limits,
    /// Oldest first, as the contract holds them.
    batches: Vec<Vec<Row>>,
    /// Rows of the batch that was forgotten last, because all of them had stopped.
    stopped: HashSet<RequestId>,
    batches_seen: u64,
    /// The next step fails with this.
    pub(crate) failure: Option<ShardError>,
    /// How long each step takes.
    pub(crate) pause: Duration,
}

#[derive(Debug)]
struct Row {
    id: RequestId,
    prompt: Vec<TokenId>,
    slots: Vec<SlotIndex>,
    computed: usize,
    chunk: usize,
    generated: u32,
    max_new_tokens: u32,
}

/// A request of `prompt` tokens. The model ends it after `ends_after` tokens, unless that is 0.
pub(crate) fn request(prompt: u32, max_new_tokens: u32, ends_after: u32) -> ValidRequest {
    let ids = std::iter::once(ends_after).chain(1..prompt).map(TokenId).collect();
    ValidRequest {
        prompt: Prompt { text: "a b c".to_owned(), ids, add_special_tokens: true },
        sampling: Sampling {
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            count_penalty: 0.0,
            min_p: 0.0,
            logit_bias: Vec::new(),
            watermark: false,
            seed: 7,
        },
        stopping: Stopping {
            max_new_tokens: TokenCount(max_new_tokens),
            stop_sequences: Vec::new(),
            ignore_eos_token: false,
        },
        prompt_logprobs: false,
        top_n_tokens: 0,
        adapter: None,
        priority: Priority::default(),
        deadline: None,
    }
}

/// The `index`th token, from 0, that is generated after a prompt.
pub(crate) fn token(prompt: &[TokenId], index: u32) -> TokenId {
    TokenId(prompt.len() as u32 * 1000 + prompt[0].0 * 100 + index)
}

/// Tokens that are generated after a prompt.
pub(crate) fn length(prompt: &[TokenId], max_new_tokens: TokenCount) -> u32 {
    match prompt[0].0 {
        0 => max_new_tokens.0,
        ends_after => ends_after.min(max_new_tokens.0),
    }
}

impl ScriptedShards {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            batches: Vec::new(),
            stopped: HashSet::new(),
            batches_seen: 0,
            failure: None,
            pause: Duration::ZERO,
        }
    }

    /// The rows that are held, in order.
    pub(crate) fn rows(&self) -> Vec<RequestId> {
        self.batches.iter().flatten().map(|row| row.id).collect()
    }

    /// One step, at once.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        if let Some(error) = self.failure.take() {
            if plan.touches_running() {
                self.batches.clear();
            }
            self.batches_seen += u64::from(plan.batch.is_some());
            return Err(error);
        }
        self.drop_rows(&plan.drops);
        let mut rows = Vec::new();
        if plan.continues {
            assert!(!self.batches.is_empty(), "rows are to continue, but none is held");
            rows.extend(self.batches.drain(..).flatten());
        }
        if let Some(batch) = &plan.batch {
            rows.extend(self.build(batch));
        }
        if rows.is_empty() {
            return Ok(StepOutput::default());
        }
        self.check_pass(&rows, plan);
        let generations = rows.iter_mut().filter_map(Row::advance).collect();
        self.hold(rows);
        Ok(StepOutput { generations, ..StepOutput::default() })
    }

    fn drop_rows(&mut self, drops: &[RequestId]) {
        for id in drops {
            let held = self.batches.iter().flatten().any(|row| row.id == *id);
            assert!(held || self.stopped.contains(id), "request {id} is to be dropped, but is not held");
        }
        self.stopped.clear();
        for batch in &mut self.batches {
            batch.retain(|row| !drops.contains(&row.id));
        }
        self.batches.retain(|batch| !batch.is_empty());
    }

    fn build(&mut self, batch: &NewBatch) -> Vec<Row> {
        assert_eq!(batch.id.0, self.batches_seen, "batch ids count from 0");
        self.batches_seen += 1;
        assert!(!batch.admissions.is_empty(), "a batch of no rows");
        batch.admissions.iter().map(|admission| self.row(admission)).collect()
    }

    fn row(&self, admission: &Admission) -> Row {
        let request = &admission.request;
        let prompt = request.prompt.ids.to_vec();
        let slots: Vec<SlotIndex> = admission.slots(self.limits.capacity.block_size).collect();
        let max_new_tokens = request.stopping.max_new_tokens;
        let (computed, chunk) = (admission.cached.0 as usize, admission.chunk.0 as usize);
        let reach = self.limits.capacity.need(request.prompt.length(), max_new_tokens);
        assert_eq!(
            slots.len(),
            reach.0 as usize,
            "one slot for each position that request {} may reach",
            admission.id
        );
        assert!(
            chunk > 0 && computed + chunk <= prompt.len(),
            "chunk of {chunk} at {computed} of {}",
            prompt.len()
        );
        let whole = computed + chunk == prompt.len();
        assert!(whole || self.limits.prompts == PromptPolicy::Chunked, "a prompt is cut, but cannot be");
        Row {
            id: admission.id,
            prompt,
            slots,
            computed,
            chunk,
            generated: 0,
            max_new_tokens: max_new_tokens.0,
        }
    }

    fn check_pass(&self, rows: &[Row], plan: &StepPlan) {
        let block_size = self.limits.capacity.block_size.get();
        let mut taken = HashSet::new();
        for row in rows.iter().chain(self.batches.iter().flatten()) {
            assert!(!row.stopped(), "request {} has stopped, but was not dropped", row.id);
            for slot in &row.slots {
                assert!(slot.0 >= block_size, "slot {slot} of request {} is in block 0", row.id);
                assert!(taken.insert(*slot), "slot {slot} of request {} is held by another one", row.id);
            }
        }
        let held = rows.len() + self.batches.iter().map(Vec::len).sum::<usize>();
        assert!(held <= self.limits.rows_max(), "{held} rows are too many");
        if plan.batch.is_some() {
            let tokens: usize = rows.iter().map(|row| row.chunk).sum();
            let most = self.limits.max_batch_prefill_tokens.0 as usize;
            assert!(tokens <= most, "{tokens} tokens in a pass of {most}");
            let alone = self.limits.prompts != PromptPolicy::Chunked;
            assert!(!(alone && plan.continues), "whole prompts are computed alone");
        }
    }

    /// Sets the next pieces of unfinished prompts, and forgets a batch that has stopped as a whole.
    fn hold(&mut self, mut rows: Vec<Row>) {
        let mut left = (self.limits.max_batch_prefill_tokens.0 as usize).saturating_sub(rows.len() - 1);
        for row in rows.iter_mut().rev() {
            let remaining = row.prompt.len() - row.computed.min(row.prompt.len());
            row.chunk = remaining.min(left).max(1);
            if remaining > 0 {
                left -= row.chunk.min(left);
            }
        }
        if rows.iter().all(Row::stopped) {
            self.stopped = rows.iter().map(|row| row.id).collect();
        } else {
            self.batches.push(rows);
        }
    }
}

impl Row {
    fn stopped(&self) -> bool {
        self.generated == length(&self.prompt, TokenCount(self.max_new_tokens))
    }

    /// One pass: the next piece of the prompt, or the next token.
    fn advance(&mut self) -> Option<Generation> {
        self.computed += self.chunk;
        assert!(self.computed <= self.slots.len(), "request {} runs out of slots", self.id);
        if self.computed < self.prompt.len() {
            return None;
        }
        let id = token(&self.prompt, self.generated);
        self.generated += 1;
        let reason = if self.generated == self.max_new_tokens {
            FinishReason::Length
        } else {
            FinishReason::EndOfSequence
        };
        let end = self.stopped().then(|| End {
            text: format!("{} tokens", self.generated),
            tokens: TokenCount(self.generated),
            reason,
            seed: None,
        });
        let token = Token { id, text: format!("<{id}>"), logprob: -1.0, special: false };
        let newest = Step { token, alternatives: Vec::new() };
        Some(Generation { request: self.id, prompt: None, earlier: Vec::new(), newest, end })
    }
}

impl Shards for ScriptedShards {
    async fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        if plan.kind().is_some() {
            tokio::time::sleep(self.pause).await;
        }
        self.run(plan)
    }
}
