//! Shards for tests: a small correct shard without a model, and a strict one. It holds every plan to the contract and
//! panics with a sentence when one breaks it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use proto::units::{RequestId, SlotIndex, TokenCount, TokenId};

use super::{End, Generation, ShardError, Shards, StepOutput};
use crate::batching::{
    Admission, Capacity, FinishReason, Grant, Limits, NewBatch, PromptPolicy, Step, StepPlan, Token,
};
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
    /// What was computed for each slot: a digest of the token and all before it.
    memory: HashMap<SlotIndex, u64>,
    /// The next step fails with this.
    pub(crate) failure: Option<ShardError>,
    /// Steps in which a request of such a prompt takes part fail.
    pub(crate) poison: Option<TokenId>,
    /// How often the shards were restored.
    pub(crate) restored: u32,
    /// How long each step takes.
    pub(crate) pause: Duration,
}

#[derive(Debug)]
struct Row {
    id: RequestId,
    namespace: Option<String>,
    prompt: Vec<TokenId>,
    /// Prompt and generated tokens.
    tokens: Vec<TokenId>,
    /// Tokens it came with.
    input: usize,
    slots: Vec<SlotIndex>,
    computed: usize,
    chunk: usize,
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

/// The same, with a prompt whose second token is `mark`.
pub(crate) fn marked(prompt: u32, max_new_tokens: u32, mark: u32) -> ValidRequest {
    let mut request = request(prompt, max_new_tokens, 0);
    request.prompt.ids = [0, mark].into_iter().chain(2..prompt).map(TokenId).collect();
    request
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
            memory: HashMap::new(),
            failure: None,
            poison: None,
            restored: 0,
            pause: Duration::ZERO,
        }
    }

    /// The rows that are held, in order.
    pub(crate) fn rows(&self) -> Vec<RequestId> {
        self.batches.iter().flatten().map(|row| row.id).collect()
    }

    /// All is forgotten, as if the shards were new.
    pub(crate) fn reset(&mut self) {
        self.batches.clear();
        self.stopped.clear();
        self.memory.clear();
        self.restored += 1;
    }

    /// One step, at once.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> Result<StepOutput, ShardError> {
        // Only a step with new rows is refused.
        if let Some(error) = self.failure.take_if(|error| !error.is_refusal() || plan.batch.is_some()) {
            if plan.touches_running() && !error.is_refusal() {
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
        self.grant(&mut rows, &plan.grants);
        if let Some(batch) = &plan.batch {
            rows.extend(self.build(batch));
        }
        if rows.is_empty() {
            return Ok(StepOutput::default());
        }
        self.check_pass(&rows, plan);
        let poisoned = |row: &Row| row.chunk > 0 && row.prompt.get(1).copied() == self.poison;
        if self.poison.is_some() && rows.iter().any(poisoned) {
            return Err(ShardError::Connection("poisoned".to_owned()));
        }
        let memory = &mut self.memory;
        let generations = rows.iter_mut().filter_map(|row| row.advance(memory)).collect();
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

    fn grant(&self, rows: &mut [Row], grants: &[Grant]) {
        assert!(grants.is_empty() || self.limits.on_demand(), "grants to shards that know of none");
        for Grant { id, blocks, tokens } in grants {
            let row = rows.iter_mut().find(|row| row.id == *id);
            let row = row.unwrap_or_else(|| panic!("a grant for request {id}, which is not held"));
            let size = self.limits.capacity.block_size;
            row.slots.extend(blocks.iter().flat_map(|block| block.slots(size)));
            if let Some(tokens) = tokens {
                let left = row.tokens.len() - row.computed;
                assert!(tokens.0 as usize <= left, "{tokens} of {left} tokens of request {id}");
                row.chunk = tokens.0 as usize;
            }
        }
    }

    fn build(&mut self, batch: &NewBatch) -> Vec<Row> {
        assert_eq!(batch.id.0, self.batches_seen, "batch ids count from 0");
        self.batches_seen += 1;
        assert!(!batch.admissions.is_empty(), "a batch of no rows");
        batch.admissions.iter().map(|admission| self.row(admission)).collect()
    }

    fn row(&self, admission: &Admission) -> Row {
        let Admission { id, request, generated, cached, chunk, .. } = admission;
        let prompt = request.prompt.ids.to_vec();
        let expected: Vec<TokenId> = (0..generated.len() as u32).map(|index| token(&prompt, index)).collect();
        assert_eq!(*generated, expected, "request {id} goes on with what it was told");
        let slots: Vec<SlotIndex> = admission.slots(self.limits.capacity.block_size).collect();
        let max_new_tokens = request.stopping.max_new_tokens;
        if !self.limits.on_demand() {
            let reach = self.limits.capacity.need(request.prompt.length(), max_new_tokens).0 as usize;
            assert_eq!(slots.len(), reach, "one slot for each position that request {id} may reach");
        }
        let tokens: Vec<TokenId> = prompt.iter().chain(generated).copied().collect();
        let (computed, chunk) = (cached.0 as usize, chunk.0 as usize);
        assert!(
            chunk > 0 && computed + chunk <= tokens.len(),
            "chunk of {chunk} at {computed} of {}",
            tokens.len()
        );
        let whole = computed + chunk == tokens.len();
        assert!(whole || self.limits.prompts == PromptPolicy::Chunked, "a prompt is cut, but cannot be");
        let row = Row {
            id: *id,
            namespace: request.adapter_key().map(str::to_owned),
            prompt,
            input: tokens.len(),
            tokens,
            slots,
            computed,
            chunk,
            max_new_tokens: max_new_tokens.0,
        };
        row.check_memory(&self.memory);
        row
    }

    fn check_pass(&self, rows: &[Row], plan: &StepPlan) {
        let block_size = self.limits.capacity.block_size.get();
        let mut written = HashSet::new();
        let mut read = HashSet::new();
        for row in rows.iter().chain(self.batches.iter().flatten()) {
            assert!(!row.stopped(), "request {} has stopped, but was not dropped", row.id);
            for (position, slot) in row.slots.iter().enumerate() {
                assert!(slot.0 >= block_size, "slot {slot} of request {} is in block 0", row.id);
                if position < row.computed {
                    read.insert(*slot);
                } else {
                    assert!(
                        written.insert(*slot),
                        "slot {slot} of request {} is written by another one",
                        row.id
                    );
                }
            }
        }
        assert!(read.is_disjoint(&written), "nobody writes where others read");
        let held = rows.len() + self.batches.iter().map(Vec::len).sum::<usize>();
        assert!(held <= self.limits.rows_max(), "{held} rows are too many");
        if plan.batch.is_some() || self.limits.on_demand() {
            let tokens: usize = rows.iter().map(|row| row.chunk).sum();
            let most = self.limits.max_batch_prefill_tokens.0 as usize;
            let only_generates = rows.iter().all(|row| row.chunk <= 1);
            assert!(tokens <= most || only_generates, "{tokens} tokens in a pass of {most}");
            let alone = self.limits.prompts != PromptPolicy::Chunked;
            assert!(!(alone && plan.continues), "whole prompts are computed alone");
        }
    }

    /// Sets the next pieces of unfinished prompts, and forgets a batch that has stopped as a whole.
    fn hold(&mut self, mut rows: Vec<Row>) {
        let mut left = (self.limits.max_batch_prefill_tokens.0 as usize).saturating_sub(rows.len() - 1);
        for row in rows.iter_mut().rev() {
            let remaining = row.input - row.computed.min(row.input);
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
    fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt.len()) as u32
    }

    fn stopped(&self) -> bool {
        self.generated() == length(&self.prompt, TokenCount(self.max_new_tokens))
    }

    /// What the memory has to hold for the first `count` tokens.
    fn digests(&self, count: usize) -> impl Iterator<Item = u64> {
        let begin = self.namespace.as_deref().map_or(0, |name| name.len() as u64 + 1);
        self.tokens[..count].iter().scan(begin, |digest, token| {
            *digest = (*digest ^ u64::from(token.0)).wrapping_mul(0x0100_0000_01b3).rotate_left(7) + 1;
            Some(*digest)
        })
    }

    /// Whether all keys and values that the row relies on are its own history's.
    fn check_memory(&self, memory: &HashMap<SlotIndex, u64>) {
        for (slot, digest) in self.slots.iter().zip(self.digests(self.computed)) {
            assert_eq!(
                memory.get(slot),
                Some(&digest),
                "slot {slot} of request {} holds something else",
                self.id
            );
        }
    }

    /// One pass: the next piece of what it came with, or the next token.
    fn advance(&mut self, memory: &mut HashMap<SlotIndex, u64>) -> Option<Generation> {
        if self.chunk == 0 {
            return None;
        }
        let end = self.computed + self.chunk;
        assert!(end <= self.slots.len(), "request {} runs out of slots", self.id);
        let digests: Vec<u64> = self.digests(end).skip(self.computed).collect();
        memory.extend(self.slots[self.computed..end].iter().copied().zip(digests));
        self.computed = end;
        if self.computed < self.tokens.len() {
            return None;
        }
        let id = token(&self.prompt, self.generated());
        self.tokens.push(id);
        let generated = self.generated();
        let reason = match generated == self.max_new_tokens {
            true => FinishReason::Length,
            false => FinishReason::EndOfSequence,
        };
        if self.stopped() {
            self.check_memory(memory);
        }
        let end = self.stopped().then(|| End {
            text: format!("{generated} tokens"),
            tokens: TokenCount(generated),
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

    async fn restore(&mut self, _: &ShardError) -> Result<Capacity, ShardError> {
        tokio::time::sleep(self.pause).await;
        self.reset();
        Ok(self.limits.capacity)
    }
}
