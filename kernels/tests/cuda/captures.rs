//! Captures that must not be, and memory that graphs keep.

use std::sync::Arc;

use kernels::cuda::{Buffer, Element, Gpu, Graph, Norm, Schedule, norm};
use kernels::{NormKind, OpError};

const WIDTH: usize = 24;
const PLAIN: Norm<'_> = Norm { kind: NormKind::Rms, width: WIDTH, weight: None, bias: None, eps: 0.0 };

fn gpu() -> Arc<Gpu> {
    Gpu::emulated(Schedule::Forward)
}

/// The norm of all twos is all ones.
fn twos(gpu: &Arc<Gpu>) -> Buffer {
    gpu.upload(&[2f32; WIDTH]).expect("memory")
}

fn ones(gpu: &Gpu, x: &Buffer, out: &mut Buffer) -> Result<(), OpError> {
    norm(gpu, x.all(), PLAIN, out.all_mut())
}

/// After whatever happened in a capture, the device must work, and record.
fn expect_well(gpu: &Arc<Gpu>) {
    let (x, mut out) = (twos(gpu), gpu.upload(&[0f32; WIDTH]).expect("memory"));
    let graph = gpu.capture(|| ones(gpu, &x, &mut out)).expect("a capture");
    assert_eq!(graph.operations(), 1);
    assert_eq!(out.read::<f32>().expect("read"), [0.0; WIDTH]);
    graph.replay().expect("a replay");
    assert_eq!(out.read::<f32>().expect("read"), [1.0; WIDTH]);
}

#[test]
fn what_cannot_be_recorded_is_an_error_that_names_it_and_ends_the_capture() {
    type Misstep = (&'static str, fn(&Arc<Gpu>, &mut Buffer, &Graph) -> Option<OpError>);
    let missteps: [Misstep; 6] = [
        ("allocate", |gpu, _, _| gpu.buffer(Element::F32, 8).err()),
        ("synchronize", |gpu, _, _| gpu.synchronize().err()),
        ("write", |_, buffer, _| buffer.write(0, &[1f32]).err()),
        ("read", |_, buffer, _| buffer.read::<f32>().err()),
        ("capture", |gpu, _, _| gpu.capture(|| Ok::<_, OpError>(())).err()),
        ("replay", |_, _, graph| graph.replay().err()),
    ];
    for (name, misstep) in missteps {
        let gpu = gpu();
        let (x, mut out, mut other) = (twos(&gpu), twos(&gpu), twos(&gpu));
        let earlier = gpu.capture(|| ones(&gpu, &x, &mut other)).expect("a capture");
        let error = gpu.capture(|| {
            let error = misstep(&gpu, &mut other, &earlier).expect("an error").to_string();
            assert_eq!(error, format!("{name}: not while a graph is captured"));
            // As if nothing had happened.
            ones(&gpu, &x, &mut out)
        });
        let error: OpError = error.expect_err("no graph");
        assert_eq!(error.to_string(), format!("{name}: not while a graph is captured"));
        assert_eq!(out.read::<f32>().expect("read"), [2.0; WIDTH], "and nothing was done");
        expect_well(&gpu);
    }
}

#[test]
fn an_error_or_a_panic_in_a_capture_leaves_the_device_usable() {
    let gpu = gpu();
    let x = twos(&gpu);
    let mut short = gpu.buffer(Element::F32, 1).expect("memory");
    let error: OpError = gpu.capture(|| ones(&gpu, &x, &mut short)).expect_err("a wrong length");
    assert_eq!(error.to_string(), "norm: out has 1 elements, 24 expected");
    expect_well(&gpu);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = gpu.capture::<OpError>(|| std::panic::resume_unwind(Box::new("halfway")));
    }));
    panic.expect_err("the panic");
    expect_well(&gpu);
}

#[test]
fn a_graph_keeps_the_memory_that_it_was_recorded_with() {
    let gpu = gpu();
    let x = twos(&gpu);
    let mut between = gpu.buffer(Element::F32, WIDTH).expect("memory");
    let mut out = gpu.upload(&[0f32; WIDTH]).expect("memory");
    let graph = gpu
        .capture(|| {
            ones(&gpu, &x, &mut between)?;
            // The last buffer that points there; the emulator takes memory away when it is freed.
            drop(between);
            out.copy_from(x.all())
        })
        .expect("a capture");
    drop(x);
    graph.replay().expect("a replay");
    assert_eq!(out.read::<f32>().expect("read"), [2.0; WIDTH]);
    graph.replay().expect("another");
}
