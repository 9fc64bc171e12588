//! One step of a batch: inputs, forward pass, choice, text, answer.

use std::time::Instant;

use kernels::OpError;

use super::answer::{Failure, StepReport, Timings};
use super::batch::Batch;
use super::commands::BLOCK_SIZE;
use super::error::EngineError;
use super::inputs::{Inputs, Span};
use super::row::Row;
use crate::backend::{Device, SamplingState, Tensor};
use crate::cache::PagedKv;
use crate::collective::Ranks;
use crate::model::{Model, StepInput};
use crate::sampling::{Choice, NotNumbers};
use crate::text::tokenizer::Tokenizer;

/// Most memory for the logits of prompts whose log-probabilities are wanted. A longer chunk takes several passes.
const PROMPT_LOGITS_BYTES: usize = 64 << 20;

/// What was chosen for a row, or why nothing could be.
type Chosen = Result<Choice, NotNumbers>;

/// Runs steps. Holds the buffers that steps share.
#[derive(Debug)]
pub struct Stepper {
    inputs: Inputs,
    sampling: SamplingState,
    prompt_logits_bytes: usize,
}

/// What a step runs on.
pub struct Machine<'a> {
    /// The device.
    pub device: &'a Device,
    /// The model.
    pub model: &'a mut dyn Model,
    /// Its cache.
    pub cache: &'a mut PagedKv,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The processes that run this step.
    pub ranks: &'a Ranks,
}

impl Stepper {
    /// For steps on this device.
    pub fn new(device: &Device) -> Self {
        Self {
            inputs: Inputs::default(),
            sampling: device.sampling_state(),
            prompt_logits_bytes: PROMPT_LOGITS_BYTES,
        }
    }

    /// Feeds the next tokens of every running row but those that sit this step out. The report has no batch yet: that is known when the next step is planned;
    /// and generations and failures only of the rows that this rank owns.
    pub fn step(&mut self, machine: &mut Machine<'_>, batch: &mut Batch) -> Result<StepReport, EngineError> {
        let begin = Instant::now();
        machine.ranks.begin_step(batch.fingerprint());
        self.lead_in(machine, batch.rows_mut())?;
        let rows = batch.rows_mut();
        self.inputs.clear();
        let feeds = |row: &Row| !row.is_stopped() && row.progress().next > 0;
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| feeds(row)) {
            self.inputs.push(index, row, row.progress().next);
        }
        let choices = self.pass(machine, rows)?;
        let chosen = Instant::now();
        let mut generations = Vec::with_capacity(choices.len());
        let mut failures = Vec::new();
        for (index, choice) in choices {
            let row = &mut rows[index];
            let owned = machine.ranks.owns(row.id());
            match choice {
                Ok(choice) if owned => generations.push(row.accept(choice, machine.tokenizer)),
                Ok(choice) => row.follow(choice.token.id, machine.tokenizer),
                Err(reason) => {
                    row.fail();
                    failures.extend(owned.then_some(Failure { request: row.id(), reason }));
                }
            }
        }
        let timings = Timings { forward: chosen - begin, decode: chosen.elapsed(), ..Timings::default() };
        Ok(StepReport { generations, failures, batch: None, timings })
    }

    /// Most rows of prompt logits that one pass makes.
    pub(super) fn prompt_logits_max(&self, vocabulary: usize) -> usize {
        self.prompt_logits_bytes / (vocabulary * size_of::<f32>()).max(1)
    }

    /// Computes the beginning of chunks whose logits would take too much memory at once.
    fn lead_in(&mut self, machine: &mut Machine<'_>, rows: &mut [Row]) -> Result<(), EngineError> {
        let wanting = rows.iter().filter(|row| !row.is_stopped() && row.wants_prompt_logprobs()).count();
        let piece = (self.prompt_logits_max(machine.model.shape().vocabulary) / wanting.max(1)).max(1);
        for index in 0..rows.len() {
            while !rows[index].is_stopped()
                && rows[index].wants_prompt_logprobs()
                && rows[index].progress().next > piece
            {
                self.inputs.clear();
                self.inputs.push(index, &rows[index], piece);
                self.pass(machine, rows)?;
            }
        }
        Ok(())
    }

    /// One forward pass over the inputs; the tokens chosen, with the index of their rows.
    fn pass(
        &mut self,
        machine: &mut Machine<'_>,
        rows: &mut [Row],
    ) -> Result<Vec<(usize, Chosen)>, EngineError> {
        let Self { inputs, sampling, .. } = self;
        if inputs.ids.is_empty() {
            return Ok(Vec::new());
        }
        let vocabulary = machine.model.shape().vocabulary;
        let sequences = inputs.sequences(rows);
        let adapters = inputs.adapters(rows);
        let input = StepInput {
            ids: &inputs.ids,
            positions: &inputs.positions,
            lengths: &inputs.lengths,
            slots: &inputs.slots,
            sequences: &sequences,
            block_size: BLOCK_SIZE.get() as usize,
            logits_at: &inputs.logits_at,
            adapters: &adapters,
        };
        let logits = machine.model.forward(&input, machine.cache)?;
        let expected = inputs.logits_at.len() * vocabulary;
        if logits.len() != expected {
            let found = logits.len();
            return Err(OpError::Length { op: "forward", what: "logits", expected, found }.into());
        }
        // Before tokens are chosen: that changes the rows.
        note_prompt_logprobs(machine.device, machine.ranks, inputs, sampling, logits, rows)?;
        for span in &inputs.spans {
            rows[span.row].advance(span.tokens.len());
        }
        let choices = choose(machine.device, inputs, sampling, logits, rows)?;
        machine.ranks.check()?;
        Ok(choices)
    }
}

/// Log-probabilities of prompts, for the rows that want them and that this rank answers.
fn note_prompt_logprobs(
    device: &Device,
    ranks: &Ranks,
    inputs: &Inputs,
    sampling: &mut SamplingState,
    logits: &Tensor,
    rows: &mut [Row],
) -> Result<(), EngineError> {
    let (mut at, mut ids) = (Vec::new(), Vec::new());
    let targets = |span: &Span, row: &Row| match ranks.owns(row.id()) {
        true => row.prompt_tokens_behind(span.start, span.logits.len()).to_vec(),
        false => Vec::new(),
    };
    for span in &inputs.spans {
        let targets = targets(span, &rows[span.row]);
        at.extend(span.logits.clone().take(targets.len()).map(|row| row as u32));
        ids.extend(targets);
    }
    if ids.is_empty() {
        return Ok(());
    }
    let logprobs = device.row_logprobs(sampling, logits, &at, &ids)?;
    let mut rest = &logprobs[..];
    for span in &inputs.spans {
        let (own, others) = rest.split_at(targets(span, &rows[span.row]).len());
        rows[span.row].note_prompt_logprobs(own);
        rest = others;
    }
    Ok(())
}

/// The tokens of the rows that have come to their end, with the index of the rows. Errors when none can be chosen for a row
/// that does not fail alone.
fn choose(
    device: &Device,
    inputs: &Inputs,
    sampling: &mut SamplingState,
    logits: &mut Tensor,
    rows: &mut [Row],
) -> Result<Vec<(usize, Chosen)>, EngineError> {
    let mut yielding = inputs.spans.iter().filter(|span| span.yields).peekable();
    let mut picks = Vec::new();
    let mut chosen = Vec::new();
    // Spans are in the order of their rows.
    for (index, row) in rows.iter_mut().enumerate() {
        if let Some(span) = yielding.next_if(|span| span.row == index) {
            chosen.push((index, row.id(), row.fails_alone()));
            picks.push(row.pick(span.logits.end - 1));
        }
    }
    let choices = device.choose(sampling, logits, &mut picks)?;
    let named = chosen.into_iter().zip(choices).map(|((index, request, fails_alone), choice)| match choice {
        None if !fails_alone => Err(EngineError::Logits { request, source: NotNumbers }),
        choice => Ok((index, choice.ok_or(NotNumbers))),
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use proto::units::{BatchId, BlockCount};

    use super::*;
    use crate::engine::adapters::Adapters;
    use crate::engine::answer::Generation;
    use crate::engine::commands::BLOCK_SIZE;
    use crate::engine::request::{Admission, NewBatch};
    use crate::engine::tests::{VOCABULARY, parts, request};

    /// The first step of two requests that want log-probabilities of their prompts, and one that does not.
    fn first_step(prompt_logits_rows: usize) -> Vec<Generation> {
        let mut parts = parts();
        let shape = parts.model.shape().clone();
        let mut cache = PagedKv::new(&parts.device, shape.kv, BlockCount(64), BLOCK_SIZE).unwrap();
        let slots = cache.slots();
        let admission = Admission {
            tokenizer: &parts.tokenizer,
            shape: &shape,
            slots,
            block_size: BLOCK_SIZE,
            adapters: &Adapters::default(),
        };
        let mut requests = [(1, "one prompt"), (2, "another"), (3, "a third one")]
            .map(|(id, prompt)| request(id, prompt, 4));
        requests[0].prompt_logprobs = true;
        requests[2].prompt_logprobs = true;
        let mut batch = admission.batch(NewBatch { id: BatchId(0), requests: requests.to_vec() }).unwrap();
        let mut machine = Machine {
            device: &parts.device,
            model: parts.model.as_mut(),
            cache: &mut cache,
            tokenizer: &parts.tokenizer,
            ranks: &parts.ranks,
        };
        let prompt_logits_bytes = prompt_logits_rows * VOCABULARY * size_of::<f32>();
        let mut stepper = Stepper { prompt_logits_bytes, ..Stepper::new(&parts.device) };
        stepper.step(&mut machine, &mut batch).unwrap().generations
    }

    #[test]
    fn a_limit_on_the_memory_of_prompt_logits_changes_nothing_but_the_memory() {
        let shown = |generations: Vec<Generation>| format!("{generations:?}");
        let unlimited = shown(first_step(1000));
        for rows in [0, 1, 2, 6, 7, 20] {
            assert_eq!(shown(first_step(rows)), unlimited, "{rows} rows");
        }
    }
}
