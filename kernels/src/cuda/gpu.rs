use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::buffer::{Buffer, wrong_element};
use super::driver::journal::Journaled;
use super::driver::{Driver, Grid, Kernel, Memory, Multiply, Properties};
use super::graph::Captures;
use super::params::Params;
use super::{Element, HostElement, Slice, SliceMut};
use crate::OpError;

/// Who computes products of more rows than a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// The library of the driver, which is the fastest. How it sums may depend on the number of rows.
    Library,
    /// The kernels of this crate: the same bits for a token, however many others there are.
    Own,
}

/// A device, with the one stream that everything on it runs on.
#[derive(Debug)]
pub struct Gpu {
    driver: Box<dyn Driver>,
    /// Products that are new are tried out.
    tunes: AtomicBool,
    /// [`Products::Own`]
    own_products: AtomicBool,
    pub(super) captures: Mutex<Captures>,
    /// Pieces of memory that are held.
    pub(super) buffers: AtomicUsize,
    origin: Origin,
}

/// What it was opened as.
#[derive(Clone, Copy, Debug)]
enum Origin {
    #[cfg(feature = "cuda")]
    Device(u32),
    #[cfg(feature = "emulation")]
    Emulated(super::Schedule),
    Ledger(usize),
}

impl Gpu {
    /// The GPU with this number among those that the process may see.
    ///
    /// Errors when there is no driver, no such GPU, or none that the kernels were compiled for; the reason is one line.
    #[cfg(feature = "cuda")]
    pub fn open(ordinal: u32) -> Result<Arc<Self>, OpError> {
        Ok(Self::new(super::driver::nvidia::Nvidia::open(ordinal)?, Origin::Device(ordinal)))
    }

    /// How many GPUs the process may see. Errors when there is no driver.
    #[cfg(feature = "cuda")]
    pub fn count() -> Result<u32, OpError> {
        super::driver::nvidia::count()
    }

    /// No GPU: kernels run on the CPU, thread by thread in the order that is asked for. For tests.
    #[cfg(feature = "emulation")]
    pub fn emulated(schedule: super::Schedule) -> Arc<Self> {
        Self::new(super::driver::emulated::Emulated::new(schedule), Origin::Emulated(schedule))
    }

    /// No GPU, but a count of what `total` bytes of one would be taken for. Everything succeeds, and nothing is computed.
    pub fn ledger(total: usize) -> Arc<Self> {
        Self::new(super::driver::ledger::Ledger::new(total), Origin::Ledger(total))
    }

    /// Whether its memory holds what is written there.
    pub fn stores(&self) -> bool {
        self.driver.stores()
    }

    /// The same device once more, with a stream of its own: for another rank that is a thread of this process.
    pub fn sibling(&self) -> Result<Arc<Self>, OpError> {
        match self.origin {
            #[cfg(feature = "cuda")]
            Origin::Device(ordinal) => Self::open(ordinal),
            #[cfg(feature = "emulation")]
            Origin::Emulated(schedule) => Ok(Self::emulated(schedule)),
            Origin::Ledger(total) => Ok(Self::ledger(total)),
        }
    }

    fn new(driver: impl Driver + 'static, origin: Origin) -> Arc<Self> {
        Arc::new(Self {
            driver: Box::new(Journaled::new(driver)),
            tunes: AtomicBool::new(false),
            own_products: AtomicBool::new(false),
            captures: Mutex::default(),
            buffers: AtomicUsize::new(0),
            origin,
        })
    }

    /// Who computes products of many rows; at first the library.
    pub fn products(&self) -> Products {
        if self.own_products.load(Ordering::Relaxed) { Products::Own } else { Products::Library }
    }

    /// From now on they compute them.
    pub fn set_products(&self, products: Products) {
        self.own_products.store(products == Products::Own, Ordering::Relaxed);
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// How much memory there is.
    pub fn memory(&self) -> Result<Memory, OpError> {
        self.driver.memory()
    }

    /// How many buffers are held, each of which a driver may have rounded up to whole pages.
    pub fn buffers(&self) -> usize {
        self.buffers.load(Ordering::Relaxed)
    }

    /// Memory for `len` elements, whose values are unspecified.
    ///
    /// Errors when there is no room for them.
    pub fn buffer(self: &Arc<Self>, element: Element, len: usize) -> Result<Buffer, OpError> {
        Buffer::new(self.clone(), element, len)
    }

    /// These elements on the device.
    ///
    /// Errors when there is no room for them.
    pub fn upload<T: HostElement>(self: &Arc<Self>, elements: &[T]) -> Result<Buffer, OpError> {
        let mut buffer = self.buffer(T::ELEMENT, elements.len())?;
        buffer.write(0, elements)?;
        Ok(buffer)
    }

    /// Waits until all work is done. What failed since the last time is an error here at the latest.
    pub fn synchronize(&self) -> Result<(), OpError> {
        const OP: &str = "synchronize";
        self.outside_capture(OP)?;
        self.driver.synchronize(OP)
    }

    pub(super) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Runs a kernel.
    ///
    /// # Safety
    /// `params` is the struct that the kernel takes, and what it points to has the sizes that the kernel expects.
    pub(super) unsafe fn launch<P: Params>(
        &self,
        op: &'static str,
        kernel: Kernel,
        grid: Grid,
        params: &P,
    ) -> Result<(), OpError> {
        let bytes = std::ptr::from_ref(params).cast::<c_void>();
        // SAFETY: the caller vouches for it; `params` outlives the call, which copies it.
        unsafe { self.driver.launch(op, kernel, grid, bytes, size_of::<P>()) }
    }

    /// Loads kernels before they are needed: to load one may wait for the device.
    pub(super) fn load<P: Params>(&self, op: &'static str, kernels: &[Kernel]) -> Result<(), OpError> {
        kernels.iter().try_for_each(|kernel| self.driver.load(op, *kernel, size_of::<P>()))
    }

    /// The kernel of a family for elements of this type, of those for f32, f16 and bf16.
    pub(super) fn pick(op: &'static str, element: Element, kernels: [Kernel; 3]) -> Result<Kernel, OpError> {
        element.pick(kernels).ok_or_else(|| wrong_element(op, element))
    }

    /// Runs `run`, which may be a step of a model. Dense products that have not run before are then tried out with every
    /// algorithm that there is for their shape, each with the matrices at hand, and go on with the fastest. It takes
    /// milliseconds per shape, and waits for all work.
    ///
    /// Which is the fastest may turn out differently on another rank: what has to be the same on all of them, bit for bit,
    /// must have run before, untuned.
    pub fn tuned<R>(&self, run: impl FnOnce() -> R) -> R {
        struct Tuning<'a>(&'a AtomicBool);
        impl Drop for Tuning<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        self.tunes.store(true, Ordering::Relaxed);
        let _until_then = Tuning(&self.tunes);
        run()
    }

    /// Runs a dense product: see [`Multiply`].
    ///
    /// Errors when a matrix does not lie within its slice, is of another type than said, or has no columns to sum over.
    pub fn multiply(
        &self,
        op: &'static str,
        product: &Multiply,
        input: Slice<'_>,
        weight: Slice<'_>,
        out: SliceMut<'_>,
    ) -> Result<(), OpError> {
        let Multiply { rows, outputs, inputs, batch, .. } = *product;
        if rows == 0 || outputs == 0 || batch == 0 {
            return Ok(());
        }
        let floats = [Element::F32, Element::F16, Element::BF16];
        if !floats.contains(&product.element) {
            return Err(wrong_element(op, product.element));
        }
        if ![product.element, Element::F32].contains(&product.out_element) {
            return Err(wrong_element(op, product.out_element));
        }
        if inputs == 0 {
            return Err(OpError::unsupported(op, "a product over no columns"));
        }
        let parts = [
            ("input", input.element(), product.element, input.len()),
            ("weight", weight.element(), product.element, weight.len()),
            ("out", out.element(), product.out_element, out.len()),
        ];
        for ((what, found, element, len), extent) in parts.into_iter().zip(product.extents()) {
            if found != element {
                return Err(wrong_element(op, found));
            }
            if extent.is_none_or(|extent| extent > len) {
                let expected = extent.unwrap_or(usize::MAX);
                return Err(OpError::Length { op, what, expected, found: len });
            }
        }
        // SAFETY: every matrix was found to lie within its slice.
        unsafe {
            if self.tunes.load(Ordering::Relaxed) && !self.is_capturing() {
                self.driver.tune(op, product, input.ptr, weight.ptr, out.ptr)?;
            }
            self.driver.multiply(op, product, input.ptr, weight.ptr, out.ptr)
        }
    }
}

#[cfg(all(test, feature = "emulation"))]
mod tests {
    use super::*;
    use crate::NormKind;
    use crate::cuda::driver::DevicePtr;
    use crate::cuda::norm::{Norm, NormParams, norm};

    const KERNEL: Kernel = Kernel { module: "norm", name: "norm_f32" };
    const WIDTH: usize = 24;
    const NOTHING: NormParams = NormParams {
        x: DevicePtr::NULL,
        residual: DevicePtr::NULL,
        out: DevicePtr::NULL,
        weight: DevicePtr::NULL,
        bias: DevicePtr::NULL,
        width: 0,
        period: 1,
        eps: 0.0,
        centered: 0,
    };

    fn good(gpu: &Gpu, x: &Buffer, out: &mut Buffer) -> Result<(), OpError> {
        let plain = Norm { kind: NormKind::Rms, width: WIDTH, weight: None, bias: None, eps: 0.0 };
        norm(gpu, x.all(), plain, out.all_mut())
    }

    /// A kernel that reads what is nobody's memory.
    fn faulty(gpu: &Gpu, out: &Buffer) -> Result<(), OpError> {
        let nobodys = DevicePtr(out.all().ptr.0 + (1 << 20));
        let params = NormParams { x: nobodys, out: out.all().ptr, width: WIDTH as u32, ..NOTHING };
        // SAFETY: none: it is what the emulator is to find.
        unsafe { gpu.launch("norm", KERNEL, Grid::linear(3, 32), &params) }
    }

    #[test]
    fn a_failure_names_what_was_under_way_and_is_the_answer_to_everything_after_it() {
        let gpu = Gpu::emulated(crate::cuda::Schedule::Forward);
        let x = gpu.upload(&[1f32; WIDTH]).expect("memory");
        let mut out = gpu.buffer(Element::F32, WIDTH).expect("memory");
        good(&gpu, &x, &mut out).expect("a norm");
        let graph = gpu.capture(|| good(&gpu, &x, &mut out)).expect("a graph");
        gpu.synchronize().expect("all is well");
        for _ in 0..10 {
            good(&gpu, &x, &mut out).expect("a norm");
        }
        graph.replay().expect("a replay");
        let first = faulty(&gpu, &out).expect_err("a fault");
        let text = first.to_string();
        assert!(matches!(first, OpError::Device { .. }), "{first:?}");
        assert!(text.starts_with("norm: kernel norm_f32, block (0,0,0), thread (0,0,0): "), "{text}");
        assert!(text.contains("under way: …, norm (norm_f32, 1 x 1 x 1 blocks), norm ("), "{text}");
        assert!(text.contains("), replay (graph of 1), norm (norm_f32, 3 x 1 x 1 blocks); "), "{text}");
        assert!(text.ends_with("; 12 operations since the last synchronisation"), "{text}");

        let later = [
            gpu.synchronize(),
            good(&gpu, &x, &mut out),
            gpu.buffer(Element::F32, 1).map(drop),
            out.write(0, &[1f32]),
            out.read::<f32>().map(drop),
            out.fill(0),
            graph.replay(),
            gpu.capture(|| Ok(())).map(drop),
            gpu.memory().map(drop),
        ];
        for result in later {
            assert_eq!(result.expect_err("a failed device"), first);
        }
    }

    #[test]
    fn what_is_taken_of_an_emulated_memory_is_counted_until_it_is_given_back() {
        let gpu = Gpu::emulated(crate::cuda::Schedule::Forward);
        let taken = || gpu.memory().map(|memory| memory.total - memory.free).expect("a count");
        let buffers =
            [gpu.buffer(Element::F32, 100), gpu.buffer(Element::F16, 3), gpu.buffer(Element::U8, 0)];
        assert_eq!((taken(), gpu.buffers()), (406, 2));
        drop(buffers);
        assert_eq!((taken(), gpu.buffers()), (0, 0));
    }

    #[test]
    fn what_cannot_be_launched_leaves_the_device_usable() {
        let gpu = Gpu::emulated(crate::cuda::Schedule::Forward);
        let x = gpu.upload(&[1f32; WIDTH]).expect("memory");
        let mut out = gpu.buffer(Element::F32, WIDTH).expect("memory");
        let missing = Kernel { module: "norm", name: "norm_f1" };
        // SAFETY: there is no such kernel.
        let error =
            unsafe { gpu.launch("norm", missing, Grid::linear(1, 32), &NOTHING) }.expect_err("no kernel");
        assert!(matches!(error, OpError::Driver { .. }), "{error:?}");
        good(&gpu, &x, &mut out).expect("a norm");
        assert_eq!(out.read::<f32>().expect("read"), [1.0; WIDTH]);
    }
}
