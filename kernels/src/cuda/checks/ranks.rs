//! What a rank has to get right, whatever connects it with the others.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use super::{Checker, FLOATS, Finding, Random, bits};
use crate::OpError;
use crate::collective::LocalGroup;
use crate::cuda::comm::{Comm, SumOrder, Way};
use crate::cuda::{Buffer, Element, Gpu};

/// Of what a graph sums.
const REPLAYED: Element = Element::BF16;
const REPLAYED_LEN: usize = 300;

/// Lengths of sums as models have them: nothing, less than a vector, a token, some tokens, and a prefill. The kernels deal
/// with them by a part of a block, by one, by as many as there are, by those in several rounds; and in several pieces.
const LENGTHS: [usize; 10] = [0, 1, 3, 257, 4096, 4097, 30_001, 150_001, 1 << 20, (4 << 20) + 3];

/// Rows and columns that are put side by side: a token, some tokens, and what one of the ranks has none of.
const COLUMNS: [(usize, [usize; 2]); 4] = [(1, [500, 500]), (3, [129, 7]), (17, [0, 33]), (5, [1000, 999])];

/// Elements up to which kernels are emulated in a moment.
pub const EMULATED_LENGTH_MAX: usize = 150_001;

/// One of two ranks, connected in some way, sums and puts side by side: every type, and lengths of up to `length_max`
/// elements. Both call it with the same seed, and hold the same bits in the end.
///
/// Errors when a device fails, or the other rank does not take part.
pub fn run_rank(
    gpu: &Arc<Gpu>,
    group: &LocalGroup,
    (way, comm): (Way, Arc<dyn Comm>),
    length_max: usize,
    seed: u64,
) -> Result<Vec<Finding>, OpError> {
    let checker = Checker { gpu: gpu.clone(), random: Random::new(seed), findings: Vec::new() };
    let mut rank = Rank::new(checker, comm, way.order());
    let mut rounds = Vec::new();
    for element in FLOATS {
        for len in LENGTHS.into_iter().filter(|len| *len <= length_max) {
            rounds.push(rank.reduce(rounds.len(), element, len)?);
        }
        for (rows, cols) in COLUMNS {
            rounds.push(rank.gather(rounds.len(), element, rows, cols.to_vec())?);
        }
        if way.can_be_recorded() {
            rounds.push(rank.replay(rounds.len())?);
        }
    }
    let sums = rank.run(rounds)?;
    if way.order() == SumOrder::Any {
        rank.alike(group, &sums)?;
    }
    Ok(rank.into_checker().findings)
}

/// One of several that draw the same random numbers, and so do the same.
pub(super) struct Rank {
    checker: Checker,
    comm: Arc<dyn Comm>,
    order: SumOrder,
    /// For what each does by itself.
    own: Random,
}

/// A call, and what has to come of it.
pub(super) struct Round {
    case: String,
    call: Call,
    /// Where the result is.
    out: Buffer,
    expected: Vec<f32>,
}

enum Call {
    /// Of a part of `out`.
    Reduce(Range<usize>),
    /// To `out`.
    Gather { own: Buffer, rows: usize, cols: Vec<usize> },
    /// Of what the graph takes, by the graph.
    Replay { own: Buffer },
}

impl Rank {
    pub(super) fn new(checker: Checker, comm: Arc<dyn Comm>, order: SumOrder) -> Self {
        let own = Random::new(comm.rank() as u64 + 7);
        Self { checker, comm, order, own }
    }

    pub(super) fn into_checker(self) -> Checker {
        self.checker
    }

    pub(super) fn world(&self) -> usize {
        self.comm.world()
    }

    /// The same on all ranks.
    pub(super) fn random(&mut self) -> &mut Random {
        self.checker.random()
    }

    /// Makes the calls, and notes what came of them. Answers the results, which are those of all ranks.
    ///
    /// Where ranks share a device, whoever allocates, frees or loads may wait for all of it, and so for others that wait for
    /// him. So that is done before the first call, and after the last.
    pub(super) fn run(&mut self, mut rounds: Vec<Round>) -> Result<Vec<Vec<f32>>, OpError> {
        let gpu = self.checker.gpu();
        let mut data = self.checker.unwritten(REPLAYED, REPLAYED_LEN)?;
        // What is recorded once is a round of its own each time.
        let records = rounds.iter().any(|round| matches!(round.call, Call::Replay { .. }));
        let record = || gpu.capture(|| self.comm.all_reduce(data.all_mut()));
        let graph = records.then(record).transpose()?;
        self.comm.barrier()?;

        for Round { call, out, .. } in &mut rounds {
            // Each comes at another time.
            (0..self.own.below(4)).for_each(|_| thread::yield_now());
            match call {
                Call::Reduce(range) => self.comm.all_reduce(out.all_mut().slice_mut(range.clone()))?,
                Call::Gather { own, rows, cols } => {
                    self.comm.all_gather_columns(own.all(), *rows, cols, out.all_mut())?;
                }
                Call::Replay { own } => {
                    data.copy_from(own.all())?;
                    graph.as_ref().expect("recorded for these rounds").replay()?;
                    out.copy_from(data.all())?;
                }
            }
        }
        gpu.synchronize()?;
        self.comm.check()?;
        // Who leaves now is missed by nobody, and nobody waits.
        self.comm.barrier()?;
        rounds.into_iter().map(|round| self.compare(round)).collect()
    }

    fn compare(&mut self, Round { case, call, out, expected }: Round) -> Result<Vec<f32>, OpError> {
        let found = self.checker.read(&out)?;
        let is_sum = matches!(call, Call::Reduce(_) | Call::Replay { .. });
        if is_sum && self.order == SumOrder::Any {
            // Both round each time that they add.
            let roundings = 2.0 * (self.world() - 1) as f64;
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            self.checker.close(case, &out, &expected, roundings)?;
        } else {
            self.checker.equal(case, &bits(&found), &bits(&expected));
        }
        Ok(match call {
            Call::Reduce(range) => found[range].to_vec(),
            Call::Gather { .. } | Call::Replay { .. } => found,
        })
    }

    /// Whatever order sums are taken in, it is the same for all ranks.
    fn alike(&mut self, group: &LocalGroup, sums: &[Vec<f32>]) -> Result<(), OpError> {
        let own: Vec<u8> = sums.iter().flatten().flat_map(|sum| sum.to_bits().to_le_bytes()).collect();
        let mut first = own.clone();
        let told = group.broadcast_bytes(0, &mut first);
        told.map_err(|error| OpError::driver("check", error.to_string()))?;
        self.checker.equal(format!("the bits of rank 0 on rank {}", self.comm.rank()), &own, &first);
        Ok(())
    }

    /// What each rank brings, as its type holds it.
    fn numbers(&mut self, element: Element, lens: &[usize]) -> Result<Vec<Vec<f32>>, OpError> {
        let rounded = |len: &usize| {
            let numbers = self.checker.random.numbers(*len);
            Ok(self.checker.given(element, &numbers)?.host)
        };
        lens.iter().map(rounded).collect()
    }

    fn case(&self, what: &str, index: usize, element: Element, len: usize) -> String {
        let (rank, world) = (self.comm.rank(), self.comm.world());
        format!("{what} {index} of {len} {element:?}, rank {rank} of {world}")
    }

    /// A sum of so many elements.
    pub(super) fn reduce(&mut self, index: usize, element: Element, len: usize) -> Result<Round, OpError> {
        let numbers = self.numbers(element, &vec![len; self.world()])?;
        let sums = self.sums(element, &numbers)?;
        // At any address, which is another on every rank; what lies around stays.
        let (before, behind) = (self.own.below(5), self.own.below(3));
        let around = |numbers: &[f32]| [&vec![0.5; before], numbers, &vec![0.5; behind]].concat();
        Ok(Round {
            case: self.case("sum", index, element, len),
            call: Call::Reduce(before..before + len),
            out: self.checker.given(element, &around(&numbers[self.comm.rank()]))?.buffer,
            expected: around(&sums),
        })
    }

    /// A sum by a graph.
    pub(super) fn replay(&mut self, index: usize) -> Result<Round, OpError> {
        let numbers = self.numbers(REPLAYED, &vec![REPLAYED_LEN; self.world()])?;
        let own = self.checker.given(REPLAYED, &numbers[self.comm.rank()])?.buffer;
        Ok(Round {
            case: self.case("replayed sum", index, REPLAYED, REPLAYED_LEN),
            call: Call::Replay { own },
            out: self.checker.unwritten(REPLAYED, REPLAYED_LEN)?,
            expected: self.sums(REPLAYED, &numbers)?,
        })
    }

    /// In the order of the ranks, rounded once.
    fn sums(&mut self, element: Element, numbers: &[Vec<f32>]) -> Result<Vec<f32>, OpError> {
        let mut sums = numbers[0].clone();
        for more in &numbers[1..] {
            sums.iter_mut().zip(more).for_each(|(sum, number)| *sum += number);
        }
        Ok(self.checker.given(element, &sums)?.host)
    }

    /// The columns of all ranks, so many of each, side by side.
    pub(super) fn gather(
        &mut self,
        index: usize,
        element: Element,
        rows: usize,
        cols: Vec<usize>,
    ) -> Result<Round, OpError> {
        let lens: Vec<usize> = cols.iter().map(|cols| rows * cols).collect();
        let numbers = self.numbers(element, &lens)?;
        let mut expected = Vec::new();
        for row in 0..rows {
            for (numbers, cols) in numbers.iter().zip(&cols) {
                expected.extend(&numbers[row * cols..][..*cols]);
            }
        }
        let own = self.checker.given(element, &numbers[self.comm.rank()])?.buffer;
        Ok(Round {
            case: self.case("columns", index, element, expected.len()),
            call: Call::Gather { own, rows, cols },
            out: self.checker.unwritten(element, expected.len())?,
            expected,
        })
    }
}
