//! The sequences of a pass, on the device: what attention needs to know of each, where its pages are, and the lists of work
//! that kernels take their blocks from.
//!
//! Everything is one buffer of u32, and one copy to it per pass: a record per sequence, the splits of the sequences with
//! few rows, the indices of the others, and last the page tables, which grow with every token.

use std::sync::Arc;

use super::driver::DevicePtr;
use super::params::fit;
use super::{Buffer, Element, Gpu};
use crate::error::check_length;
use crate::{OpError, Sequence};

const OP: &str = "sequences";

/// Rows up to which a sequence is decoded: a step of generation, also one that verifies guesses. The keys of such a
/// sequence are split, so that several blocks share a long one.
const DECODE_ROWS_MAX: usize = 8;
/// Keys of a split are a power of two, at least this one: a sequence's own length decides, see [`split_shift`].
const SPLIT_SHIFT_MIN: u32 = 8;
/// Splits of a sequence; a list of work has five bits for them.
const SPLITS_MAX_SHIFT: u32 = 5;
/// Words of a sequence's record.
const RECORD: usize = 8;

/// The sequences of a pass on the device, for all of its attention layers. Kept from pass to pass.
#[derive(Debug)]
pub struct Sequences {
    gpu: Arc<Gpu>,
    buffer: Buffer,
    staging: Vec<u32>,
    pass: Pass,
}

/// What the host knows of the sequences on the device.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Sequences with rows.
    pub(super) count: usize,
    /// Their rows.
    pub(super) tokens: usize,
    /// The slot behind the last that is read.
    pub(super) slots_end: usize,
    /// Slots of a page, as a power of two.
    pub(super) page_shift: u32,
    /// Splits of the sequences that are decoded.
    pub(super) splits: usize,
    /// The most rows of those.
    pub(super) decode_rows: usize,
    /// Rows of their splits, where there is more than one.
    pub(super) partial_rows: usize,
    /// The rows of each other sequence.
    pub(super) prefill_rows: Vec<usize>,
}

/// Addresses of the parts of the buffer.
#[expect(dead_code, reason = "lists for kernels that take their work from them")]
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    /// All of it, which the tables' offsets count from.
    pub(super) all: DevicePtr,
    /// Records of the sequences, by their rows.
    pub(super) records: DevicePtr,
    /// `sequence * 32 + split`, sequence by sequence.
    pub(super) splits: DevicePtr,
    /// Sequences that are not decoded.
    pub(super) prefill: DevicePtr,
}

impl Sequences {
    /// No sequences yet.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        let buffer = gpu.buffer(Element::U32, 0)?;
        Ok(Self { gpu: gpu.clone(), buffer, staging: Vec::new(), pass: Pass::default() })
    }

    /// The sequences of the next pass, in any order, in a cache of pages of `page` slots.
    ///
    /// Errors when their rows do not cover those of the pass without overlap, `page` is not a power of two, or slots do not
    /// form pages: then the sequences of the pass before are still there. Slots of a pass's own rows are looked at one by
    /// one, those before them at the ends of each page.
    pub fn set(&mut self, sequences: &[Sequence<'_>], page: usize) -> Result<(), OpError> {
        if !page.is_power_of_two() {
            return Err(OpError::unsupported(OP, format!("pages of {page} slots")));
        }
        let mut ordered: Vec<&Sequence<'_>> = sequences.iter().collect();
        ordered.sort_unstable_by_key(|sequence| (sequence.rows.start, sequence.rows.end));
        let mut pass = Pass { page_shift: fit(OP, "page", page)?.trailing_zeros(), ..Pass::default() };
        for sequence in &ordered {
            cover(sequence, &mut pass.tokens)?;
        }
        ordered.retain(|sequence| !sequence.rows.is_empty());
        pass.count = ordered.len();
        self.staging.clear();
        self.staging.resize(RECORD * pass.count, 0);
        self.list_splits(&ordered, &mut pass)?;
        self.list_prefill(&ordered, &mut pass);
        for (index, sequence) in ordered.iter().enumerate() {
            self.record(index, sequence, &mut pass)?;
        }
        fit(OP, "pages", self.staging.len())?;
        if self.staging.len() > self.buffer.len() {
            self.buffer = self.gpu.buffer(Element::U32, self.staging.len().next_power_of_two())?;
        }
        self.buffer.write(0, &self.staging)?;
        self.pass = pass;
        Ok(())
    }

    pub(super) fn pass(&self) -> &Pass {
        &self.pass
    }

    pub(super) fn parts(&self) -> Parts {
        let all = self.buffer.all().ptr;
        let at = |words: usize| DevicePtr(all.0 + (words * Element::U32.size()) as u64);
        let splits = RECORD * self.pass.count;
        Parts { all, records: all, splits: at(splits), prefill: at(splits + self.pass.splits) }
    }

    fn list_splits(&mut self, ordered: &[&Sequence<'_>], pass: &mut Pass) -> Result<(), OpError> {
        for (index, sequence) in ordered.iter().enumerate().filter(|(_, sequence)| is_decoded(sequence)) {
            let context = sequence.start + sequence.rows.len();
            let splits = context.div_ceil(1 << split_shift(context));
            let index = fit(OP, "sequences", index << SPLITS_MAX_SHIFT)?;
            self.staging.extend((0..splits as u32).map(|split| index | split));
            pass.splits += splits;
            pass.decode_rows = pass.decode_rows.max(sequence.rows.len());
        }
        Ok(())
    }

    fn list_prefill(&mut self, ordered: &[&Sequence<'_>], pass: &mut Pass) {
        for (index, sequence) in ordered.iter().enumerate().filter(|(_, sequence)| !is_decoded(sequence)) {
            self.staging.push(index as u32);
            pass.prefill_rows.push(sequence.rows.len());
        }
    }

    /// Fills a sequence's record in, and appends its page table.
    fn record(&mut self, index: usize, sequence: &Sequence<'_>, pass: &mut Pass) -> Result<(), OpError> {
        let Sequence { rows, start, slots } = sequence;
        let context = start + rows.len();
        let table = fit(OP, "pages", self.staging.len())?;
        let partials = fit(OP, "partial results", pass.partial_rows)?;
        let words = [fit(OP, "rows", rows.start)?, rows.len() as u32, *start as u32, table, partials];
        self.staging[RECORD * index..][..words.len()].copy_from_slice(&words);

        let page = 1 << pass.page_shift;
        for (at, slots) in slots[..context].chunks(page).enumerate() {
            let first = slots[0];
            let is_new = at * page + slots.len() > *start;
            if !(first as usize).is_multiple_of(page) || !follow(slots, is_new) {
                let reason = format!("the slots from position {} on are no page of {page}", at * page);
                return Err(OpError::unsupported(OP, reason));
            }
            self.staging.push(first >> pass.page_shift);
            pass.slots_end = pass.slots_end.max(first as usize + slots.len());
        }
        let splits = context.div_ceil(1 << split_shift(context));
        if is_decoded(sequence) && splits > 1 {
            pass.partial_rows += splits * rows.len();
        }
        Ok(())
    }
}

fn is_decoded(sequence: &Sequence<'_>) -> bool {
    sequence.rows.len() <= DECODE_ROWS_MAX
}

/// Keys of a split, as a power of two: the smallest that leaves few enough splits. Kernels compute the same.
fn split_shift(context: usize) -> u32 {
    context.next_power_of_two().trailing_zeros().saturating_sub(SPLITS_MAX_SHIFT).max(SPLIT_SHIFT_MIN)
}

/// A sequence must begin at the row where the one before ended, and have slots.
fn cover(sequence: &Sequence<'_>, covered: &mut usize) -> Result<(), OpError> {
    let Sequence { rows, start, slots } = sequence;
    if rows.start != *covered || rows.end < rows.start {
        let reason = format!("a sequence's rows {rows:?} do not follow the {covered} before them");
        return Err(OpError::unsupported(OP, reason));
    }
    *covered = rows.end;
    let context = start.saturating_add(rows.len());
    fit(OP, "position", context)?;
    check_length(OP, "slots", context, context.min(slots.len()))
}

/// Whether slots are one behind the other; or just whether the last is where it would be.
fn follow(slots: &[u32], all: bool) -> bool {
    let is_at = |at: usize| slots[at] as usize == slots[0] as usize + at;
    if all { (0..slots.len()).all(is_at) } else { is_at(slots.len() - 1) }
}

#[cfg(test)]
mod tests {
    use super::{SPLIT_SHIFT_MIN, SPLITS_MAX_SHIFT, split_shift};

    #[test]
    fn a_context_has_few_splits_and_none_is_short() {
        for context in [1, 2, 255, 256, 257, 8191, 8192, 8193, 16_384, 16_385, 131_072, 1_000_000, 1 << 30] {
            let shift = split_shift(context);
            let splits = context.div_ceil(1 << shift);
            assert!(splits <= 1 << SPLITS_MAX_SHIFT, "{context}");
            let fits_in_half = context.div_ceil(1 << (shift - 1)) <= 1 << SPLITS_MAX_SHIFT;
            assert_eq!(shift, if fits_in_half { SPLIT_SHIFT_MIN } else { shift }, "{context}");
        }
    }
}
