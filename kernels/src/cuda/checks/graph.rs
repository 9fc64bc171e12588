use super::{Checker, FLOATS};
use crate::cuda::{self, Buffer, Element, Gpu, Multiply};
use crate::{NormKind, OpError};

const ROWS: usize = 3;
const WIDTH: usize = 40;

/// What runs before anything of it has, inside a graph, must do the same each time that it does outside.
pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        let gpu = c.gpu();
        let mut step = Step::new(c, element)?;
        let weight = c.floats(element, WIDTH * WIDTH)?.buffer;
        let graph = gpu.capture(|| step.run(&gpu, &weight))?;
        let untouched = c.read(&step.out)?.iter().all(|value| value.is_nan());
        c.equal(format!("{element:?}, a capture does nothing"), &[untouched], &[true]);
        for round in 0..3 {
            let input = c.floats(element, ROWS * WIDTH)?.buffer;
            step.input.copy_from(input.all())?;
            graph.replay()?;
            let replayed = c.read(&step.out)?;
            step.run(&gpu, &weight)?;
            let run = c.read(&step.out)?;
            let finite = run.iter().all(|value| value.is_finite());
            c.equal(format!("{element:?}, replay {round}"), &replayed, &run);
            c.equal(format!("{element:?}, replay {round} is of numbers"), &[finite], &[true]);
        }
    }
    Ok(())
}

/// One of each thing that can be recorded, each with the result of the one before.
struct Step {
    input: Buffer,
    normed: Buffer,
    copied: Buffer,
    out: Buffer,
}

impl Step {
    fn new(c: &mut Checker, element: Element) -> Result<Self, OpError> {
        let buffer = || c.unwritten(element, ROWS * WIDTH);
        Ok(Self { input: buffer()?, normed: buffer()?, copied: buffer()?, out: buffer()? })
    }

    fn run(&mut self, gpu: &Gpu, weight: &Buffer) -> Result<(), OpError> {
        let element = weight.element();
        let norm = cuda::Norm { kind: NormKind::Rms, width: WIDTH, weight: None, bias: None, eps: 1e-5 };
        cuda::norm(gpu, self.input.all(), norm, self.normed.all_mut())?;
        self.copied.copy_from(self.normed.all())?;
        self.out.fill(0)?;
        let product = Multiply {
            rows: ROWS,
            outputs: WIDTH,
            inputs: WIDTH,
            element,
            out_element: element,
            input_stride: WIDTH,
            weight_stride: WIDTH,
            out_stride: WIDTH,
            add: true,
            batch: 1,
            batch_strides: [0; 3],
        };
        gpu.multiply("linear", &product, self.copied.all(), weight.all(), self.out.all_mut())
    }
}
