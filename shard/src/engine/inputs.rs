//! Rows to flat inputs: ids, positions, slots, and where each request's tokens and logits lie.

use std::ops::Range;

use kernels::Sequence;

use super::row::Row;
use crate::layers::AdapterRows;

/// The inputs of one forward pass. Buffers are kept from pass to pass.
#[derive(Debug, Default)]
pub struct Inputs {
    /// `[T]`
    pub ids: Vec<u32>,
    /// `[T]`
    pub positions: Vec<u32>,
    /// `[T]`
    pub lengths: Vec<u32>,
    /// `[T]`
    pub slots: Vec<u32>,
    /// `[R]`, ascending.
    pub logits_at: Vec<u32>,
    /// One per request of the pass.
    pub spans: Vec<Span>,
}

/// One request's part of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of its row in the batch.
    pub row: usize,
    /// Its tokens among `0 .. T`.
    pub tokens: Range<usize>,
    /// Position of the first of them in its own sequence.
    pub start: usize,
    /// Its rows of logits among `0 .. R`.
    pub logits: Range<usize>,
    /// Whether the pass reaches the end of its history, so that a new token follows.
    pub yields: bool,
}

impl Inputs {
    /// Starts a new pass.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.lengths.clear();
        self.slots.clear();
        self.logits_at.clear();
        self.spans.clear();
    }

    /// Adds the next `count` tokens of a row. Logits are wanted for all of them if the row collects log-probabilities of its
    /// prompt, else for the last one if it yields a token.
    pub fn push(&mut self, index: usize, row: &Row, count: usize) {
        let start = row.progress().cached;
        let (first, positions) = (self.ids.len(), start..start + count);
        let tokens = first..first + count;
        let yields = positions.end == row.ids().len();
        self.ids.extend(&row.ids()[positions.clone()]);
        self.slots.extend(&row.slots().raw()[positions.clone()]);
        self.lengths.extend(positions.clone().map(|position| row.length_at(position) as u32));
        self.positions.extend(positions.map(|position| position as u32));
        let wanted = match (row.wants_prompt_logprobs(), yields) {
            (true, _) => tokens.clone(),
            (false, true) => tokens.end - 1..tokens.end,
            (false, false) => tokens.end..tokens.end,
        };
        let logits = self.logits_at.len()..self.logits_at.len() + wanted.len();
        self.logits_at.extend(wanted.map(|token| token as u32));
        self.spans.push(Span { row: index, tokens, start, logits, yields });
    }

    /// The rows of the pass that adapters change; neighbours with the same adapter together.
    pub fn adapters<'a>(&self, rows: &'a [Row]) -> Vec<AdapterRows<'a>> {
        let mut changed: Vec<AdapterRows<'a>> = Vec::new();
        for span in &self.spans {
            let Some(adapter) = rows[span.row].adapter() else { continue };
            match changed.last_mut() {
                Some(last)
                    if last.rows.end == span.tokens.start && std::ptr::eq(last.adapter, &**adapter) =>
                {
                    last.rows.end = span.tokens.end;
                }
                _ => changed.push(AdapterRows { rows: span.tokens.clone(), adapter }),
            }
        }
        changed
    }

    /// The requests of the pass, over the slots of `rows`, which are those that were pushed.
    pub fn sequences<'a>(&self, rows: &'a [Row]) -> Vec<Sequence<'a>> {
        self.spans
            .iter()
            .map(|span| Sequence {
                rows: span.tokens.clone(),
                start: span.start,
                slots: rows[span.row].slots().raw(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proto::units::{BlockCount, RequestId, TokenCount};

    use super::*;
    use crate::engine::request::Stopping;
    use crate::engine::row::{Parts, Progress};
    use crate::engine::slots::SlotTable;
    use crate::sampling::tests::greedy;

    fn row(ids: &[u32], cached: u32, prompt_logprobs: bool) -> Row {
        Row::new(Parts {
            id: RequestId(0),
            ids: ids.to_vec(),
            progress: Progress::new(ids.len(), TokenCount(cached), None).unwrap(),
            blocks: BlockCount(1),
            slots: SlotTable::from_wire((0..16).rev().collect()),
            granted: false,
            sampling: greedy(),
            stopping: Stopping { tokens_max: TokenCount(4), strings: vec![], ignore_end_of_sequence: false },
            prompt_logprobs,
            top: 0,
            adapter: None,
        })
    }

    #[test]
    fn prompts_chunks_and_cached_prefixes_lie_side_by_side() {
        let rows = [row(&[10, 11, 12], 0, false), row(&[20, 21, 22, 23], 1, false), row(&[30, 31], 0, true)];
        let mut inputs = Inputs::default();
        for (index, (row, count)) in rows.iter().zip([3, 2, 2]).enumerate() {
            inputs.push(index, row, count);
        }
        assert_eq!(inputs.ids, [10, 11, 12, 21, 22, 30, 31]);
        assert_eq!(inputs.positions, [0, 1, 2, 1, 2, 0, 1]);
        assert_eq!(inputs.lengths, [3, 3, 3, 4, 4, 2, 2]);
        assert_eq!(inputs.slots, [15, 14, 13, 14, 13, 15, 14]);
        assert_eq!(inputs.logits_at, [2, 5, 6]);
        let spans: Vec<_> = inputs.spans.iter().map(|span| (span.logits.clone(), span.yields)).collect();
        assert_eq!(spans, [(0..1, true), (1..1, false), (1..3, true)]);
        let sequences = inputs.sequences(&rows);
        assert_eq!((sequences[1].rows.clone(), sequences[1].start), (3..5, 1));
    }
}
