use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use super::{Comm, check_float, columns, failed};
use crate::OpError;
use crate::collective::LocalGroup;
use crate::cuda::{Element, Gpu, Slice, SliceMut};

const ALL_REDUCE: &str = "all_reduce";
const ALL_GATHER: &str = "all_gather_columns";

/// Ranks that exchange numbers through the host's memory. Slow, since each call waits for the device; and it needs nothing.
#[derive(Debug)]
pub struct Staged {
    gpu: Arc<Gpu>,
    group: Arc<LocalGroup>,
    /// Kept from call to call.
    host: Mutex<Host>,
}

#[derive(Debug, Default)]
struct Host {
    bytes: Vec<u8>,
    own: Vec<f32>,
    all: Vec<f32>,
}

impl Staged {
    /// Of ranks that have met.
    pub fn new(gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Self {
        Self { gpu: gpu.clone(), group: group.clone(), host: Mutex::default() }
    }
}

impl Comm for Staged {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn all_reduce(&self, data: SliceMut<'_>) -> Result<(), OpError> {
        check_float(ALL_REDUCE, data.element())?;
        if self.world() == 1 {
            return Ok(());
        }
        self.gpu.outside_capture(ALL_REDUCE)?;
        let host = &mut *self.host.lock().expect("no thread panics while it holds the lock");
        host.download(&self.gpu, data.as_slice())?;
        self.group.all_reduce(&mut host.own).map_err(|error| failed(ALL_REDUCE, &error))?;
        host.all.clone_from(&host.own);
        host.upload(&self.gpu, &data)
    }

    fn all_gather_columns(
        &self,
        own: Slice<'_>,
        rows: usize,
        cols: &[usize],
        out: SliceMut<'_>,
    ) -> Result<(), OpError> {
        let begins = columns(ALL_GATHER, self.rank(), own, rows, cols, &out, self.world())?;
        self.gpu.outside_capture(ALL_GATHER)?;
        let host = &mut *self.host.lock().expect("no thread panics while it holds the lock");
        host.download(&self.gpu, own)?;
        host.all.clear();
        host.all.resize(rows * begins[self.world()], 0.0);
        self.group
            .all_gather_columns(&host.own, rows, cols, &mut host.all)
            .map_err(|error| failed(ALL_GATHER, &error))?;
        host.upload(&self.gpu, &out)
    }

    fn barrier(&self) -> Result<(), OpError> {
        self.gpu.synchronize()?;
        self.group.barrier().map_err(|error| failed("barrier", &error))
    }

    fn check(&self) -> Result<(), OpError> {
        self.group.check().map_err(|error| failed("check", &error))
    }

    fn abort(&self) {
        self.group.abort();
    }

    fn description(&self) -> String {
        "through the host's memory".to_owned()
    }
}

impl Host {
    /// `own` becomes what the slice holds.
    fn download(&mut self, gpu: &Gpu, from: Slice<'_>) -> Result<(), OpError> {
        self.bytes.resize(from.len() * from.element().size(), 0);
        if !from.is_empty() {
            // SAFETY: the slice has as many bytes.
            unsafe { gpu.driver().download(from.ptr, &mut self.bytes) }?;
        }
        self.own.clear();
        let bytes = &self.bytes;
        match from.element() {
            Element::F16 => {
                let words = bytes.as_chunks().0.iter();
                self.own.extend(words.map(|word| f16::from_ne_bytes(*word).to_f32()));
            }
            Element::BF16 => {
                let words = bytes.as_chunks().0.iter();
                self.own.extend(words.map(|word| bf16::from_ne_bytes(*word).to_f32()));
            }
            _ => self.own.extend(bytes.as_chunks().0.iter().map(|word| f32::from_ne_bytes(*word))),
        }
        Ok(())
    }

    /// The slice becomes what `all` holds.
    fn upload(&mut self, gpu: &Gpu, to: &SliceMut<'_>) -> Result<(), OpError> {
        self.bytes.clear();
        for &number in &self.all {
            match to.element() {
                Element::F16 => self.bytes.extend(f16::from_f32(number).to_ne_bytes()),
                Element::BF16 => self.bytes.extend(bf16::from_f32(number).to_ne_bytes()),
                _ => self.bytes.extend(number.to_ne_bytes()),
            }
        }
        if self.bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the slice has as many elements as `all`.
        unsafe { gpu.driver().upload(to.ptr, &self.bytes) }
    }
}
