//! Choosing tokens on a GPU.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use kernels::cuda::{self, ALTERNATIVES_MAX, Buffer, Element, Gpu, Sampled, SamplerState, SamplingRow};
use kernels::{OpError, Penalties, Sampling, Watermark};
use proto::units::TokenId;

use super::super::{SamplingState, Tensor};
use super::{Cuda, FOREIGN};
use crate::sampling::{Choice, HistoryPlace, Pick, Sampler, Scored};

/// Rows and histories there is room for at first.
const ROOM_FIRST: usize = 16;

/// What choosing tokens needs in a GPU's memory. It grows with the largest step.
#[derive(Debug)]
pub struct DeviceSampling {
    gpu: Arc<Gpu>,
    /// Made when the first logits come, whose width it needs.
    set: Option<Set>,
    /// How many sets there were.
    sets: u64,
    returned: Receiver<(u32, u64)>,
    home: Sender<(u32, u64)>,
    /// For log-probabilities of prompts.
    prompts: Prompts,
}

#[derive(Debug)]
struct Set {
    state: SamplerState,
    vocabulary: usize,
    rows: usize,
    histories: usize,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Prompts {
    at: Buffer,
    ids: Buffer,
    logprobs: Buffer,
}

pub(in super::super) fn sampling_state(device: &Cuda) -> SamplingState {
    let gpu = device.gpu.clone();
    let empty = |element| gpu.buffer(element, 0).expect("no memory is enough memory for nothing");
    let prompts =
        Prompts { at: empty(Element::U32), ids: empty(Element::U32), logprobs: empty(Element::F32) };
    let (home, returned) = mpsc::channel();
    SamplingState::Device(Box::new(DeviceSampling { gpu, set: None, sets: 0, returned, home, prompts }))
}

pub(in super::super) fn row_logprobs(
    device: &Cuda,
    state: &mut SamplingState,
    logits: &Tensor,
    at: &[u32],
    ids: &[u32],
) -> Result<Vec<f32>, OpError> {
    let SamplingState::Device(state) = state else { unreachable!("{FOREIGN}") };
    let Prompts { at: places, ids: targets, logprobs } = &mut state.prompts;
    if ids.len() > targets.len() {
        let room = ids.len().next_power_of_two();
        *places = device.gpu.buffer(Element::U32, room)?;
        *targets = device.gpu.buffer(Element::U32, room)?;
        *logprobs = device.gpu.buffer(Element::F32, room)?;
    }
    places.write(0, at)?;
    targets.write(0, ids)?;
    let all = 0..ids.len();
    let (at, ids) = (places.slice(all.clone()), targets.slice(all.clone()));
    cuda::row_logprobs(
        &device.gpu,
        logits.width(),
        logits.device(),
        at,
        ids,
        logprobs.slice_mut(all.clone()),
    )?;
    let mut found = vec![0.0; all.len()];
    logprobs.read_into(0, &mut found)?;
    Ok(found)
}

pub(in super::super) fn choose(
    _: &Cuda,
    state: &mut SamplingState,
    logits: &mut Tensor,
    picks: &mut [Pick<'_>],
) -> Result<Vec<Option<Choice>>, OpError> {
    let SamplingState::Device(state) = state else { unreachable!("{FOREIGN}") };
    if picks.is_empty() {
        return Ok(Vec::new());
    }
    state.make_room(logits.width(), picks)?;
    let set = state.set.as_mut().expect("room was made");
    let biases: Vec<Vec<(u32, f32)>> = picks
        .iter()
        .map(|pick| pick.sampler.params().logit_bias.iter().map(|(id, bias)| (id.0, *bias)).collect())
        .collect();
    let rows: Vec<SamplingRow<'_>> =
        picks.iter_mut().zip(&biases).map(|(pick, bias)| row(pick, bias)).collect();
    set.state.set(&rows)?;
    set.state.sample(logits.device_mut())?;
    let sampled = set.state.results()?;
    Ok(picks.iter_mut().zip(sampled).map(|(pick, sampled)| Some(accept(pick, sampled?))).collect())
}

/// What the device needs to know of a pick.
fn row<'a>(pick: &mut Pick<'_>, bias: &'a [(u32, f32)]) -> SamplingRow<'a> {
    let history = pick.sampler.place_mut().as_ref().map(|place| place.slot);
    let sampler = &*pick.sampler;
    let params = sampler.params();
    let penalties = params.penalties;
    SamplingRow {
        logits: pick.row as u32,
        sampling: Sampling {
            watermark: params.watermark.map(|watermark| Watermark {
                gamma: watermark.gamma,
                delta: watermark.delta,
                previous: sampler.previous().0,
            }),
            bias,
            penalties: Penalties {
                repetition: penalties.repetition,
                frequency: penalties.frequency,
                presence: penalties.presence,
                count: penalties.count,
            },
            mask: None,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            typical_p: params.typical_p,
            min_p: params.min_p,
            draws: params.samples(),
            seed: params.seed,
            index: sampler.generated(),
        },
        history,
        alternatives: pick.top.min(ALTERNATIVES_MAX) as u32,
    }
}

fn accept(pick: &mut Pick<'_>, sampled: Sampled) -> Choice {
    let scored = |(id, logprob): (u32, f32)| Scored { id: TokenId(id), logprob: logprob.min(0.0) };
    pick.sampler.advance(TokenId(sampled.token));
    Choice {
        token: scored((sampled.token, sampled.logprob)),
        top: sampled.alternatives.into_iter().map(scored).collect(),
    }
}

impl DeviceSampling {
    /// A row for every pick, and a place for every history.
    fn make_room(&mut self, vocabulary: usize, picks: &mut [Pick<'_>]) -> Result<(), OpError> {
        let penalized = picks.iter().filter(|pick| pick.sampler.history().is_some()).count();
        self.take_back();
        let current = self.sets;
        let mut new = penalized;
        for pick in &mut *picks {
            new -= usize::from(pick.sampler.place_mut().as_ref().is_some_and(|place| place.set == current));
        }
        let suffices =
            |set: &Set| set.vocabulary == vocabulary && set.rows >= picks.len() && set.free.len() >= new;
        if !self.set.as_ref().is_some_and(suffices) {
            self.replace(vocabulary, picks.len(), new)?;
        }
        for pick in picks {
            self.place(pick.sampler)?;
        }
        Ok(())
    }

    fn take_back(&mut self) {
        for (slot, set) in self.returned.try_iter() {
            if let Some(current) = self.set.as_mut().filter(|_| set == self.sets) {
                current.free.push(slot);
            }
        }
    }

    /// A larger set. Histories come again when they are needed: what a request has seen is known here too.
    fn replace(&mut self, vocabulary: usize, rows: usize, new: usize) -> Result<(), OpError> {
        let before = self.set.take().map_or((0, 0), |set| (set.rows, set.histories));
        let rows = rows.max(before.0).max(ROOM_FIRST).next_power_of_two();
        let histories = if new == 0 && before.1 == 0 { 0 } else { (before.1 + new).max(ROOM_FIRST) };
        let histories = if histories == 0 { 0 } else { histories.next_power_of_two() };
        let state = SamplerState::new(&self.gpu, vocabulary, rows, histories)?;
        self.sets += 1;
        let free = (0..histories as u32).rev().collect();
        self.set = Some(Set { state, vocabulary, rows, histories, free });
        Ok(())
    }

    /// Brings a request's history to the device, unless it is there.
    fn place(&mut self, sampler: &mut Sampler) -> Result<(), OpError> {
        let (current, home) = (self.sets, self.home.clone());
        if sampler.history().is_none()
            || sampler.place_mut().as_ref().is_some_and(|place| place.set == current)
        {
            return Ok(());
        }
        let set = self.set.as_mut().expect("room was made");
        let slot = set.free.pop().expect("room was made for every new history");
        *sampler.place_mut() = Some(HistoryPlace { slot, set: current, home });
        let history = sampler.history().expect("it was there a moment ago");
        let prompt = history.length() - sampler.generated() as usize;
        set.state.restore(slot, prompt, history.counts())
    }
}
