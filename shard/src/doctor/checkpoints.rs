use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kernels::DType;

use super::Report;
use super::fixtures::{Answer, Fixture, Furthest, Rounding};
use super::patient::{Outcome, Patient, within};
use crate::backend::{Cuda, Device};
use crate::collective::Ranks;

/// The types that models compute in, as `config.json` calls them.
const DTYPES: [(DType, &str); 3] =
    [(DType::F32, "float32"), (DType::F16, "float16"), (DType::BF16, "bfloat16")];

/// In float32, what GPU and CPU compute differs by less.
const APART_MAX: f64 = 0.02;

/// Threads for the tiny models of fixtures on the CPU.
const THREADS_MAX: usize = 4;

/// Fixtures, and what is known of their rounding.
pub(super) struct Checkpoints {
    pub(super) fixtures: Vec<Fixture>,
    rounding: Rounding,
}

impl Checkpoints {
    /// Those below `root`, or of these names.
    ///
    /// Errors when there is none, and when one is not what it should be.
    pub(super) fn read(root: &Path, names: &[String]) -> anyhow::Result<Self> {
        Ok(Self { fixtures: Fixture::find(root, names)?, rounding: Rounding::read(root)? })
    }

    /// Every fixture on the GPU in every type, against its expected answers, and against the CPU.
    pub(super) fn check(&self, patient: &mut Patient, report: &mut Report<'_>) {
        report.table(&[
            "fixture: largest difference of a log-probability",
            "float32",
            "to the CPU",
            "float16",
            "to the CPU",
            "bfloat16",
            "to the CPU",
            "ms",
        ]);
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = threads.min(NonZeroUsize::new(THREADS_MAX).unwrap_or(NonZeroUsize::MIN));
        let cpu = match Device::cpu(threads) {
            Ok(cpu) => cpu,
            Err(error) => return report.wrong(format!("the CPU: {error}")),
        };
        for fixture in &self.fixtures {
            self.check_one(&Arc::new(fixture.clone()), &cpu, patient, report);
        }
    }

    fn check_one(
        &self,
        fixture: &Arc<Fixture>,
        cpu: &Device,
        patient: &mut Patient,
        report: &mut Report<'_>,
    ) {
        let (begin, name) = (Instant::now(), fixture.name());
        let (mut cells, mut notes) = (vec![name.clone()], Vec::new());
        let (theirs, cpu) = (fixture.clone(), cpu.clone());
        let on_cpu = within(patient.limit(), move || theirs.answers(&cpu, Ranks::alone()));
        let on_cpu =
            on_cpu.map_err(|failure| notes.push((format!("{name}, on the CPU"), failed(failure)))).ok();
        for (dtype, dtype_name) in DTYPES {
            let what = format!("{name}, {dtype_name}");
            let theirs = fixture.clone();
            let answers = patient.run(&what, move |gpu| {
                let device = Cuda::new(gpu.clone(), dtype, dtype.into())?;
                theirs.answers(&Device::Cuda(Arc::new(device)), Ranks::alone())
            });
            let compared = match answers {
                Outcome::Done(answers) => self.compare(fixture, dtype, &answers, on_cpu.as_deref()),
                Outcome::Failed(reason) => Compared::without(Outcome::Failed(reason)),
                Outcome::NotRun(reason) => Compared::without(Outcome::NotRun(reason)),
            };
            cells.extend(compared.cells);
            report.checked(compared.checks);
            notes.extend(compared.notes.into_iter().map(|note| (what.clone(), note)));
        }
        cells.push(begin.elapsed().as_millis().to_string());
        report.row(&cells);
        for (what, note) in notes {
            report.take(&what, note);
        }
    }

    /// Answers of the GPU with those that are expected, and with those of the CPU.
    fn compare(
        &self,
        fixture: &Fixture,
        dtype: DType,
        answers: &[Answer],
        on_cpu: Option<&[Answer]>,
    ) -> Compared {
        let bounds = self.rounding.bounds(fixture, dtype);
        let mut compared =
            Compared { checks: answers.len(), cells: [String::new(), String::new()], notes: vec![] };
        match fixture.compare(answers, bounds) {
            Ok(furthest) => compared.judge(0, &furthest, Some(bounds.logprob), "what is expected"),
            Err(error) => compared.notes.push(failed(format!("{error:#}"))),
        }
        if let Some(on_cpu) = on_cpu {
            let limit = (dtype == DType::F32).then_some(APART_MAX);
            compared.checks += if limit.is_some() { on_cpu.len() } else { 0 };
            compared.judge(1, &fixture.apart(answers, on_cpu), limit, "what the CPU computes");
        }
        compared
    }
}

/// Of one fixture in one type.
struct Compared {
    checks: usize,
    /// The differences from what is expected, and from the CPU.
    cells: [String; 2],
    /// What went wrong.
    notes: Vec<Outcome<()>>,
}

impl Compared {
    fn without(note: Outcome<()>) -> Self {
        Self { checks: 0, cells: [String::new(), String::new()], notes: vec![note] }
    }

    fn judge(&mut self, cell: usize, furthest: &Furthest, limit: Option<f64>, from: &str) {
        let Furthest { difference, prompt } = furthest;
        self.cells[cell] = match limit {
            Some(limit) => format!("{difference:.6} of {limit:.3}"),
            None => format!("{difference:.6}"),
        };
        if limit.is_some_and(|limit| *difference >= limit || difference.is_nan()) {
            let reason = format!("prompt `{prompt}`: a log-probability is {difference:.6} away from {from}");
            self.notes.push(failed(reason));
        }
    }
}

fn failed(reason: impl ToString) -> Outcome<()> {
    Outcome::Failed(reason.to_string())
}
