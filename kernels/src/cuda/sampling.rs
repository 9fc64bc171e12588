//! Logits to tokens: see [`Sampling`] for the stages.
//!
//! Nothing here waits for the device but [`SamplerState::results`], and that only for the step it speaks of.

use std::sync::Arc;

use super::driver::DevicePtr;
use super::params::params;
use super::{Buffer, Download, Element, Gpu, Grid, Kernel, Slice, SliceMut};
use crate::error::{check_length, check_rows};
use crate::{OpError, Sampling};

const PROCESS_LOGITS: Kernel = Kernel { module: "logits", name: "process_logits" };
const SAMPLE: Kernel = Kernel { module: "sampling", name: "sample" };
const ADMIT: Kernel = Kernel { module: "histories", name: "admit" };

const OP: &str = "sample";
/// As many elements as a block of `process_logits` looks at, and threads that do.
const CHUNK: usize = 4096;
const CHUNK_THREADS: usize = 256;
const ROW_THREADS: usize = 512;
/// Words of a chunk's summary and of a row's result.
const CHUNK_WORDS: usize = 4;
const RESULT_WORDS: usize = 4;
const NONE: u32 = u32::MAX;

/// Most tokens of a vocabulary: their probabilities are summed as integers of 64 bits.
const VOCABULARY_MAX: usize = 1 << 20;
/// Most alternatives that can be asked for.
pub const ALTERNATIVES_MAX: usize = 100;
/// Most alternatives that are listed, ties with the last one included.
pub const LISTED_MAX: usize = 128;

params! {
    struct RowParams {
        seed: u64,
        index: u64,
        green_key: u64,
        green_bound: u64,
        logits: u32,
        history: u32,
        history_length: f32,
        penalized: u32,
        green_delta: f32,
        repetition: f32,
        frequency: f32,
        presence: f32,
        count: f32,
        bias_at: u32,
        bias_count: u32,
        mask_at: u32,
        temperature: f32,
        top_k: u32,
        top_p: f32,
        typical_p: f32,
        min_p_log: f32,
        draws: u32,
        alternatives: u32,
        alternatives_at: u32,
    }
}

params! {
    struct LogitsParams {
        logits: DevicePtr,
        rows: DevicePtr,
        histories: DevicePtr,
        chunks: DevicePtr,
        vocabulary: u32,
    }
}

params! {
    struct SampleParams {
        logits: DevicePtr,
        rows: DevicePtr,
        chunks: DevicePtr,
        histories: DevicePtr,
        chosen: DevicePtr,
        results: DevicePtr,
        alternatives: DevicePtr,
        vocabulary: u32,
        chunks_per_row: u32,
        capacity: u32,
    }
}

params! {
    struct AdmitParams {
        history: DevicePtr,
        prompt: DevicePtr,
        vocabulary: u32,
        length: u32,
    }
}

/// A row of logits that a token is chosen from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingRow<'a> {
    /// Which row.
    pub logits: u32,
    /// How.
    pub sampling: Sampling<'a>,
    /// Slot of the request's history, to which the token is added. Penalties need one.
    pub history: Option<u32>,
    /// How many of the likeliest tokens are listed, at most [`ALTERNATIVES_MAX`], and ties with the last of them, up to
    /// [`LISTED_MAX`] in all.
    pub alternatives: u32,
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability among those that were possible.
    pub logprob: f32,
    /// The likeliest tokens and their log-probabilities, best first, the lower id first among equals.
    pub alternatives: Vec<(u32, f32)>,
}

/// What sampling needs on the device, and where its results are.
///
/// For each step: [`set`](Self::set), [`sample`](Self::sample), [`results`](Self::results). Who wants to start the next step
/// before it looks at the results of this one calls [`fetch`](Self::fetch) before it does.
#[derive(Debug)]
pub struct SamplerState {
    gpu: Arc<Gpu>,
    vocabulary: usize,
    rows_max: usize,
    /// `[slots, vocabulary]`: how often a token is in the prompt, in the lower half, and among the generated tokens.
    histories: Buffer,
    /// Length of the prompt of each slot.
    prompts: Vec<usize>,
    /// Of the step: parameters of its rows, biases, masks.
    staged: Vec<u32>,
    uploaded: Buffer,
    /// Where the ids of a prompt are until they are counted.
    prompt: Buffer,
    chunks: Buffer,
    /// `[rows_max, 4]`, then `[rows_max, LISTED_MAX, 2]`.
    results: Buffer,
    chosen: Buffer,
    step: Step,
    /// Results that were sent for, and of each row whether it wants alternatives.
    download: Download<u32>,
    fetched: Option<Vec<bool>>,
}

/// What is known of a step before it runs.
#[derive(Debug, Default)]
struct Step {
    /// 0 until all of them were found to be right.
    rows: usize,
    /// Whether each row wants alternatives.
    lists: Vec<bool>,
    /// How many do.
    listing: usize,
    /// One more than the highest row of logits.
    logits_end: usize,
    /// Rows of logits and slots of histories that have their row.
    taken_logits: Vec<bool>,
    taken_slots: Vec<bool>,
}

impl SamplerState {
    /// For at most `rows_max` rows at a time, and `histories` requests that have penalties.
    ///
    /// Takes `4 * vocabulary` bytes for each history and about 1 KiB for each row. Errors when there is no room for them, or
    /// the vocabulary has 2^20 tokens or more.
    pub fn new(
        gpu: &Arc<Gpu>,
        vocabulary: usize,
        rows_max: usize,
        histories: usize,
    ) -> Result<Self, OpError> {
        check_vocabulary(OP, vocabulary)?;
        // The second dimension of a grid.
        if rows_max > u16::MAX as usize {
            return Err(OpError::Index {
                op: OP,
                what: "row",
                index: rows_max,
                limit: u16::MAX as usize + 1,
            });
        }
        let words = |len| gpu.buffer(Element::U32, len);
        let results = rows_max * (RESULT_WORDS + 2 * LISTED_MAX);
        Ok(Self {
            gpu: gpu.clone(),
            vocabulary,
            rows_max,
            histories: words(histories * vocabulary)?,
            prompts: vec![0; histories],
            staged: Vec::new(),
            uploaded: words(rows_max * size_of::<RowParams>() / 4)?,
            prompt: words(0)?,
            chunks: words(rows_max * vocabulary.div_ceil(CHUNK) * CHUNK_WORDS)?,
            results: words(results)?,
            chosen: words(rows_max)?,
            step: Step::default(),
            download: Download::new(gpu, results)?,
            fetched: None,
        })
    }

    /// Begins the history of a request: its slot forgets what it held, and counts the tokens of the prompt. A count ends at
    /// 65535; ids that do not exist count for the length alone.
    ///
    /// Errors when there is no such slot.
    pub fn admit(&mut self, slot: u32, prompt: &[u32]) -> Result<(), OpError> {
        const OP: &str = "admit";
        self.prompt_length(slot)?;
        let slot = slot as usize;
        let length = u32::try_from(prompt.len())
            .map_err(|_| OpError::unsupported(OP, format!("a prompt of {} tokens", prompt.len())))?;
        grow(&self.gpu, &mut self.prompt, prompt.len())?;
        self.prompt.write(0, prompt)?;
        self.prompts[slot] = prompt.len();
        let history = self.histories.slice_mut(slot * self.vocabulary..(slot + 1) * self.vocabulary);
        let params = AdmitParams {
            history: history.ptr,
            prompt: self.prompt.all().ptr,
            vocabulary: self.vocabulary as u32,
            length,
        };
        // SAFETY: the slot has an element per token, and the prompt is as long as it says.
        unsafe { self.gpu.launch(OP, ADMIT, Grid::linear(1, threads_of_row(self.vocabulary)), &params) }
    }

    /// Takes over the history of a request: how long its prompt is, and of each token that it has seen, how often it is in
    /// the prompt and among the generated ones. A count ends at 65535; ids that do not exist count for the length alone.
    ///
    /// Errors when there is no such slot.
    pub fn restore(
        &mut self,
        slot: u32,
        prompt: usize,
        seen: impl Iterator<Item = (u32, [u32; 2])>,
    ) -> Result<(), OpError> {
        self.prompt_length(slot)?;
        self.staged.clear();
        self.staged.resize(self.vocabulary, 0);
        for (id, [in_prompt, generated]) in seen {
            if let Some(count) = self.staged.get_mut(id as usize) {
                *count = in_prompt.min(0xffff) | generated.min(0xffff) << 16;
            }
        }
        let slot = slot as usize;
        self.prompts[slot] = prompt;
        self.histories.write(slot * self.vocabulary, &self.staged)
    }

    /// Takes the rows of the next step, and sends what describes them to the device in one copy.
    ///
    /// Errors when there are too many of them, two have a row of logits or a history in common, a mask has not
    /// `ceil(vocabulary / 32)` words, or penalties have no history.
    pub fn set(&mut self, rows: &[SamplingRow<'_>]) -> Result<(), OpError> {
        if rows.len() > self.rows_max {
            return Err(OpError::Index { op: OP, what: "row", index: rows.len(), limit: self.rows_max + 1 });
        }
        self.step.begin(self.prompts.len());
        self.staged.clear();
        // Lists come behind the parameters, which are written when their places are known.
        let mut params = Vec::with_capacity(rows.len());
        let mut lists = Vec::new();
        let lists_at = rows.len() * size_of::<RowParams>() / 4;
        for row in rows {
            params.push(self.params_of(row, lists_at, &mut lists)?);
            self.step.take(row)?;
        }
        self.staged.extend_from_slice(words_of(&params));
        self.staged.extend_from_slice(&lists);
        u32::try_from(self.staged.len())
            .map_err(|_| OpError::unsupported(OP, "too many biases and masks"))?;
        grow(&self.gpu, &mut self.uploaded, self.staged.len())?;
        self.uploaded.write(0, &self.staged)?;
        self.step.rows = rows.len();
        Ok(())
    }

    /// Chooses a token from each row that was set. `logits`: `[any, vocabulary]`, f32; the rows that take part are changed,
    /// to what watermark, bias, penalties and mask make of them.
    ///
    /// Errors when a row does not exist.
    pub fn sample(&mut self, logits: SliceMut<'_>) -> Result<(), OpError> {
        let found = check_rows(OP, "logits", self.vocabulary, logits.len())?;
        logits.check(OP, "logits", Element::F32, logits.len())?;
        if self.step.logits_end > found {
            let index = self.step.logits_end - 1;
            return Err(OpError::Index { op: OP, what: "row of logits", index, limit: found });
        }
        let rows = self.step.rows as u32;
        if rows == 0 {
            return Ok(());
        }
        let chunks = self.vocabulary.div_ceil(CHUNK) as u32;
        let params = LogitsParams {
            logits: logits.ptr,
            rows: self.uploaded.all().ptr,
            histories: self.histories.all().ptr,
            chunks: self.chunks.all_mut().ptr,
            vocabulary: self.vocabulary as u32,
        };
        let threads = threads_of(self.vocabulary, CHUNK_THREADS);
        let grid = Grid { blocks: [chunks, rows, 1], threads, shared_bytes: 0 };
        // SAFETY: `set` checked that lists and histories are where the rows say, and each row of logits exists once.
        unsafe { self.gpu.launch(OP, PROCESS_LOGITS, grid, &params)? };
        let results = self.results.all_mut();
        let params = SampleParams {
            logits: logits.ptr,
            rows: params.rows,
            chunks: params.chunks,
            histories: params.histories,
            chosen: self.chosen.all_mut().ptr,
            results: results.ptr,
            alternatives: results.as_slice().slice(self.rows_max * RESULT_WORDS..results.len()).ptr,
            vocabulary: params.vocabulary,
            chunks_per_row: chunks,
            capacity: LISTED_MAX as u32,
        };
        // SAFETY: the same, and results have a place per row; at most one row writes to a history.
        unsafe { self.gpu.launch(OP, SAMPLE, Grid::linear(rows, threads_of_row(self.vocabulary)), &params) }
    }

    /// Sends for the results of the rows that were set, as they are when all work before is done. The next
    /// [`results`](Self::results) are these, whatever is set and sampled in between.
    pub fn fetch(&mut self) -> Result<(), OpError> {
        let Step { rows, listing, lists, .. } = &self.step;
        let lists_at = self.rows_max * RESULT_WORDS;
        let end = if *listing == 0 { rows * RESULT_WORDS } else { lists_at + listing * 2 * LISTED_MAX };
        self.download.start(self.results.slice(0..end))?;
        self.fetched = Some(lists[..*rows].to_vec());
        Ok(())
    }

    /// Waits for the results that were sent for, or sends for them. Answers the tokens of the rows, in their order; none
    /// where the logits are not numbers, or no token is possible.
    pub fn results(&mut self) -> Result<Vec<Option<Sampled>>, OpError> {
        if self.fetched.is_none() {
            self.fetch()?;
        }
        let rows = self.fetched.take().unwrap_or_default();
        let words = self.download.finish()?;
        let lists = words.get(self.rows_max * RESULT_WORDS..).unwrap_or_default();
        let mut lists = lists.chunks_exact(2 * LISTED_MAX);
        let of_row = |(result, wants): (&[u32], bool)| {
            let list = if wants { lists.next().unwrap_or_default() } else { &[] };
            sampled(result, list)
        };
        Ok(words.chunks_exact(RESULT_WORDS).zip(rows).map(of_row).collect())
    }

    /// The tokens that were chosen from the rows that were set, u32; all ones where there is none.
    pub fn chosen(&self) -> Slice<'_> {
        self.chosen.slice(0..self.step.rows)
    }

    fn prompt_length(&self, slot: u32) -> Result<usize, OpError> {
        let (index, limit) = (slot as usize, self.prompts.len());
        self.prompts.get(index).copied().ok_or(OpError::Index { op: OP, what: "history", index, limit })
    }

    fn params_of(
        &self,
        row: &SamplingRow<'_>,
        lists_at: usize,
        lists: &mut Vec<u32>,
    ) -> Result<RowParams, OpError> {
        let SamplingRow { sampling, history, .. } = row;
        let Sampling { penalties, .. } = sampling;
        let penalized = !penalties.are_neutral();
        if penalized && history.is_none() {
            return Err(OpError::unsupported(OP, "penalties need a history"));
        }
        let bias_at = lists_at + lists.len();
        lists.extend(sampling.bias.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]));
        let mask_at = lists_at + lists.len();
        if let Some(mask) = sampling.mask {
            check_length(OP, "mask", self.vocabulary.div_ceil(32), mask.len())?;
            lists.extend_from_slice(mask);
        }
        let prompt = history.map_or(Ok(0), |slot| self.prompt_length(slot))?;
        Ok(RowParams {
            seed: sampling.seed,
            index: sampling.index,
            green_key: sampling.watermark.map_or(0, |watermark| watermark.key()),
            green_bound: sampling.watermark.map_or(0, |watermark| watermark.bound()),
            logits: row.logits,
            history: history.unwrap_or(NONE),
            history_length: (prompt as u64 + sampling.index) as f32,
            penalized: u32::from(penalized),
            green_delta: sampling.watermark.map_or(0.0, |watermark| watermark.delta),
            repetition: penalties.repetition,
            frequency: penalties.frequency,
            presence: penalties.presence,
            count: penalties.count,
            bias_at: bias_at as u32,
            bias_count: sampling.bias.len() as u32,
            mask_at: if sampling.mask.is_some() { mask_at as u32 } else { NONE },
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            typical_p: sampling.typical_p,
            min_p_log: if sampling.min_p > 0.0 { sampling.min_p.ln() } else { f32::NEG_INFINITY },
            draws: u32::from(sampling.draws),
            alternatives: row.alternatives,
            alternatives_at: self.step.listing as u32,
        })
    }
}

impl Step {
    fn begin(&mut self, slots: usize) {
        (self.rows, self.listing) = (0, 0);
        self.lists.clear();
        self.logits_end = 0;
        self.taken_logits.clear();
        self.taken_slots.clear();
        self.taken_slots.resize(slots, false);
    }

    /// Rows change their logits and histories, so none may have two.
    fn take(&mut self, row: &SamplingRow<'_>) -> Result<(), OpError> {
        if row.alternatives as usize > ALTERNATIVES_MAX {
            let index = row.alternatives as usize;
            return Err(OpError::Index { op: OP, what: "alternative", index, limit: ALTERNATIVES_MAX + 1 });
        }
        let logits = row.logits as usize;
        self.logits_end = self.logits_end.max(logits + 1);
        if self.taken_logits.len() <= logits {
            self.taken_logits.resize(logits + 1, false);
        }
        if std::mem::replace(&mut self.taken_logits[logits], true) {
            return Err(OpError::unsupported(OP, format!("two rows of logits {logits}")));
        }
        if let Some(slot) = row.history
            && std::mem::replace(&mut self.taken_slots[slot as usize], true)
        {
            return Err(OpError::unsupported(OP, format!("two rows of history {slot}")));
        }
        self.lists.push(row.alternatives > 0);
        self.listing += usize::from(row.alternatives > 0);
        Ok(())
    }
}

/// Decodes what the kernel wrote of a row.
fn sampled(result: &[u32], list: &[u32]) -> Option<Sampled> {
    let &[token, logprob, listed, is_number] = result else { return None };
    let alternatives = list.chunks_exact(2).take(listed as usize);
    (is_number != 0).then(|| Sampled {
        token,
        logprob: f32::from_bits(logprob),
        alternatives: alternatives.map(|pair| (pair[0], f32::from_bits(pair[1]))).collect(),
    })
}

pub(super) fn check_vocabulary(op: &'static str, vocabulary: usize) -> Result<(), OpError> {
    if (1..VOCABULARY_MAX).contains(&vocabulary) {
        return Ok(());
    }
    Err(OpError::unsupported(op, format!("a vocabulary of {vocabulary} tokens, 1 to 2^20 - 1 are possible")))
}

/// Threads that look at a row: a power of two that follows from the vocabulary alone.
pub(super) fn threads_of_row(vocabulary: usize) -> u32 {
    threads_of(vocabulary, ROW_THREADS)
}

fn threads_of(vocabulary: usize, most: usize) -> u32 {
    vocabulary.div_ceil(16).next_power_of_two().clamp(32, most) as u32
}

/// Makes room for `len` elements. What the buffer held is lost.
fn grow(gpu: &Arc<Gpu>, buffer: &mut Buffer, len: usize) -> Result<(), OpError> {
    if buffer.len() < len {
        *buffer = gpu.buffer(buffer.element(), len.next_power_of_two())?;
    }
    Ok(())
}

fn words_of(rows: &[RowParams]) -> &[u32] {
    const { assert!(size_of::<RowParams>() == 4 * 8 + 20 * 4, "fields fill the struct") };
    // SAFETY: there is no padding, and every field is of 4 or 8 bytes, whose every pattern is a u32 or two.
    unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), size_of_val(rows) / 4) }
}
