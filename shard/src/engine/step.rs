//! One step of a batch: inputs, forward pass, choice, text, answer.

use std::time::Instant;

use kernels::OpError;

use super::answer::{Generation, StepReport, Timings};
use super::batch::Batch;
use super::error::EngineError;
use super::inputs::Inputs;
use super::row::Row;
use crate::cache::PagedKv;
use crate::model::{Model, StepInput};
use crate::sampling::{Choice, Scratch};
use crate::text::tokenizer::Tokenizer;

/// Most memory for the logits of prompts whose log-probabilities are wanted. A longer chunk takes several passes.
const PROMPT_LOGITS_BYTES: usize = 64 << 20;

/// Runs steps. Holds the buffers that steps share.
#[derive(Debug, Default)]
pub struct Stepper {
    inputs: Inputs,
    scratch: Scratch,
}

/// What a step runs on.
pub struct Machine<'a> {
    /// The model.
    pub model: &'a mut dyn Model,
    /// Its cache.
    pub cache: &'a mut PagedKv,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
}

impl Stepper {
    /// Feeds the next tokens of every running row. The report has no batch yet: that is known when the next step is planned.
    pub fn step(&mut self, machine: &mut Machine<'_>, batch: &mut Batch) -> Result<StepReport, EngineError> {
        let begin = Instant::now();
        self.lead_in(machine, batch.rows_mut())?;
        let rows = batch.rows_mut();
        self.inputs.clear();
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_stopped()) {
            self.inputs.push(index, row, row.progress().next);
        }
        let choices = self.pass(machine, rows)?;
        let chosen = Instant::now();
        let generations: Vec<Generation> = choices
            .into_iter()
            .map(|(index, choice)| rows[index].accept(choice, machine.tokenizer))
            .collect();
        let timings = Timings { forward: chosen - begin, decode: chosen.elapsed(), ..Timings::default() };
        Ok(StepReport { generations, batch: None, timings })
    }

    /// Computes the beginning of chunks whose logits would take too much memory at once.
    fn lead_in(&mut self, machine: &mut Machine<'_>, rows: &mut [Row]) -> Result<(), EngineError> {
        let wanting = rows.iter().filter(|row| !row.is_stopped() && row.wants_prompt_logprobs()).count();
        let row_bytes = machine.model.shape().vocabulary * size_of::<f32>();
        let piece = (PROMPT_LOGITS_BYTES / row_bytes.max(1) / wanting.max(1)).max(1);
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
    ) -> Result<Vec<(usize, Choice)>, EngineError> {
        let Self { inputs, scratch } = self;
        if inputs.ids.is_empty() {
            return Ok(Vec::new());
        }
        let vocabulary = machine.model.shape().vocabulary;
        let sequences = inputs.sequences(rows);
        let input = StepInput {
            ids: &inputs.ids,
            positions: &inputs.positions,
            slots: &inputs.slots,
            sequences: &sequences,
            logits_at: &inputs.logits_at,
        };
        let logits = machine.model.forward(&input, machine.cache)?.host();
        let expected = inputs.logits_at.len() * vocabulary;
        if logits.len() != expected {
            return Err(
                OpError::Length { op: "forward", what: "logits", expected, found: logits.len() }.into()
            );
        }
        let mut choices = Vec::new();
        for span in &inputs.spans {
            let row = &mut rows[span.row];
            let own = &logits[span.logits.start * vocabulary..span.logits.end * vocabulary];
            row.note_prompt_logits(span.start, own.chunks_exact(vocabulary));
            row.advance(span.tokens.len());
            if span.yields {
                let last = &own[own.len() - vocabulary..];
                let choice = row
                    .choose(last, scratch)
                    .map_err(|source| EngineError::Logits { request: row.id(), source })?;
                choices.push((span.row, choice));
            }
        }
        Ok(choices)
    }
}
