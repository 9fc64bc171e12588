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
/// An entry of a list of work that is none.
const NO_SPLIT: u32 = u32::MAX;
/// Words of a sequence's record.
const RECORD: usize = 8;

/// The sequences of a pass on the device, for all of its attention layers. Kept from pass to pass.
#[derive(Debug)]
pub struct Sequences {
    gpu: Arc<Gpu>,
    buffer: Buffer,
    staging: Vec<u32>,
    bounds: Bounds,
    slots_end: usize,
}

/// What the launches of a pass depend on. Work that was recorded for sequences with the same bounds, see
/// [`Gpu::capture`](super::Gpu::capture), may be replayed for others, as long as their slots are in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Where the sequences are.
    address: u64,
    /// Sequences with rows.
    pub(super) count: usize,
    /// Their rows.
    pub(super) tokens: usize,
    /// Slots of a page, as a power of two.
    pub(super) page_shift: u32,
    /// At least the splits of the sequences that are decoded; the list goes on with [`NO_SPLIT`].
    pub(super) splits: usize,
    /// The most rows of those sequences.
    pub(super) decode_rows: usize,
    /// At least the rows of their splits, where there is more than one.
    pub(super) partial_rows: usize,
    /// The rows of each other sequence.
    pub(super) prefill_rows: Vec<usize>,
}

/// Addresses of the parts of the buffer.
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
        Ok(Self { gpu: gpu.clone(), buffer, staging: Vec::new(), bounds: Bounds::default(), slots_end: 0 })
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
        let mut bounds = Bounds { page_shift: fit(OP, "page", page)?.trailing_zeros(), ..Bounds::default() };
        for sequence in &ordered {
            cover(sequence, &mut bounds.tokens)?;
        }
        ordered.retain(|sequence| !sequence.rows.is_empty());
        bounds.count = ordered.len();
        self.staging.clear();
        self.staging.resize(RECORD * bounds.count, 0);
        self.list_splits(&ordered, &mut bounds)?;
        self.list_prefill(&ordered, &mut bounds);
        let mut slots_end = 0;
        for (index, sequence) in ordered.iter().enumerate() {
            let end = self.record(index, sequence, &mut bounds)?;
            slots_end = slots_end.max(end);
        }
        bounds.partial_rows = rounded_up(bounds.partial_rows);
        fit(OP, "pages", self.staging.len())?;
        if self.staging.len() > self.buffer.len() {
            self.buffer = self.gpu.buffer(Element::U32, self.staging.len().next_power_of_two())?;
        }
        self.buffer.write(0, &self.staging)?;
        bounds.address = self.buffer.all().ptr.0;
        (self.bounds, self.slots_end) = (bounds, slots_end);
        Ok(())
    }

    /// What recorded work must have been recorded for.
    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// The slot behind the last that is read.
    pub(super) fn slots_end(&self) -> usize {
        self.slots_end
    }

    pub(super) fn parts(&self) -> Parts {
        let all = self.buffer.all().ptr;
        let at = |words: usize| DevicePtr(all.0 + (words * Element::U32.size()) as u64);
        let splits = RECORD * self.bounds.count;
        Parts { all, records: all, splits: at(splits), prefill: at(splits + self.bounds.splits) }
    }

    fn list_splits(&mut self, ordered: &[&Sequence<'_>], bounds: &mut Bounds) -> Result<(), OpError> {
        let begin = self.staging.len();
        for (index, sequence) in ordered.iter().enumerate().filter(|(_, sequence)| is_decoded(sequence)) {
            let index = fit(OP, "sequences", index << SPLITS_MAX_SHIFT)?;
            self.staging.extend((0..splits(sequence) as u32).map(|split| index | split));
            bounds.decode_rows = bounds.decode_rows.max(sequence.rows.len());
        }
        bounds.splits = rounded_up(self.staging.len() - begin);
        self.staging.resize(begin + bounds.splits, NO_SPLIT);
        Ok(())
    }

    fn list_prefill(&mut self, ordered: &[&Sequence<'_>], bounds: &mut Bounds) {
        for (index, sequence) in ordered.iter().enumerate().filter(|(_, sequence)| !is_decoded(sequence)) {
            self.staging.push(index as u32);
            bounds.prefill_rows.push(sequence.rows.len());
        }
    }

    /// Fills a sequence's record in, and appends its page table. Answers the slot behind its last.
    fn record(
        &mut self,
        index: usize,
        sequence: &Sequence<'_>,
        bounds: &mut Bounds,
    ) -> Result<usize, OpError> {
        let Sequence { rows, start, slots } = sequence;
        let table = fit(OP, "pages", self.staging.len())?;
        let partials = fit(OP, "partial results", bounds.partial_rows)?;
        let words = [fit(OP, "rows", rows.start)?, rows.len() as u32, *start as u32, table, partials];
        self.staging[RECORD * index..][..words.len()].copy_from_slice(&words);
        if is_decoded(sequence) && splits(sequence) > 1 {
            bounds.partial_rows += splits(sequence) * rows.len();
        }

        let (page, mut end) = (1 << bounds.page_shift, 0);
        for (at, slots) in slots[..start + rows.len()].chunks(page).enumerate() {
            let first = slots[0];
            let is_new = at * page + slots.len() > *start;
            if !(first as usize).is_multiple_of(page) || !follow(slots, is_new) {
                let reason = format!("the slots from position {} on are no page of {page}", at * page);
                return Err(OpError::unsupported(OP, reason));
            }
            self.staging.push(first >> bounds.page_shift);
            end = end.max(first as usize + slots.len());
        }
        Ok(end)
    }
}

fn is_decoded(sequence: &Sequence<'_>) -> bool {
    sequence.rows.len() <= DECODE_ROWS_MAX
}

fn splits(sequence: &Sequence<'_>) -> usize {
    let context = sequence.start + sequence.rows.len();
    context.div_ceil(1 << split_shift(context))
}

/// A little more, so that most passes have the bounds of the one before.
fn rounded_up(count: usize) -> usize {
    count.next_multiple_of((count.next_power_of_two() / 16).max(1))
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
    use super::{SPLIT_SHIFT_MIN, SPLITS_MAX_SHIFT, rounded_up, split_shift};

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

    #[test]
    fn bounds_are_at_most_an_eighth_too_large() {
        for count in 0..5000 {
            let rounded = rounded_up(count);
            assert!(rounded >= count && 8 * (rounded - count) <= count, "{count}");
        }
        assert_eq!([0, 1, 15, 17, 1000, 1024, 1025].map(rounded_up), [0, 1, 15, 18, 1024, 1024, 1152]);
    }
}
