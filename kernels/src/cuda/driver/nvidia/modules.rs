//! The kernels' code, loaded when it is first used.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};

use super::check;
use crate::OpError;
use crate::cuda::driver::{Kernel, Properties};

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Code begins where the driver may read it in words.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// What the kernels in this binary were compiled for.
const ARCHITECTURES: &str = env!("KERNEL_ARCHITECTURES");

/// Bytes of dynamic shared memory that a kernel may use without being asked.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;

/// What has been loaded into the current context.
#[derive(Debug, Default)]
pub(super) struct Modules {
    modules: HashMap<&'static str, CUmodule>,
    functions: HashMap<Kernel, Function>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Modules {}

#[derive(Clone, Copy, Debug)]
struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it may use.
    shared_bytes: u32,
}

impl Modules {
    /// The function of a kernel that has been loaded and may use as much shared memory.
    pub(super) fn loaded(&self, kernel: Kernel, shared_bytes: u32) -> Option<CUfunction> {
        self.functions
            .get(&kernel)
            .filter(|function| shared_bytes <= function.shared_bytes)
            .map(|function| function.handle)
    }

    /// The same, loaded now if it has to be. The kernel's one parameter must have `size` bytes.
    ///
    /// Errors when the binary does not have the kernel for this device.
    pub(super) fn load(
        &mut self,
        op: &'static str,
        kernel: Kernel,
        shared_bytes: u32,
        size: usize,
        properties: &Properties,
    ) -> Result<CUfunction, OpError> {
        let mut function = match self.functions.get(&kernel) {
            Some(function) => *function,
            None => {
                let module = match self.modules.get(kernel.module) {
                    Some(module) => *module,
                    None => load(op, kernel.module, properties)?,
                };
                self.modules.insert(kernel.module, module);
                find(op, module, kernel, size)?
            }
        };
        if shared_bytes > function.shared_bytes {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            check(op, unsafe { sys::cuFuncSetAttribute(function.handle, attribute, shared_bytes as i32) })?;
            function.shared_bytes = shared_bytes;
        }
        self.functions.insert(kernel, function);
        Ok(function.handle)
    }
}

fn load(op: &'static str, name: &str, properties: &Properties) -> Result<CUmodule, OpError> {
    let code = MODULES.iter().find(|(module, _)| *module == name).map(|(_, code)| *code);
    let code = code.ok_or_else(|| OpError::driver(op, format!("there is no kernel file `{name}`")))?;
    let mut module = null_mut();
    // SAFETY: a whole fatbin, which says itself how long it is.
    let result = unsafe { sys::cuModuleLoadData(&mut module, code.0.as_ptr().cast()) };
    if result == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
        let (major, minor) = properties.capability;
        let reason = format!(
            "{} has compute capability {major}.{minor}; the kernels were compiled for {ARCHITECTURES}",
            properties.name
        );
        return Err(OpError::driver(op, reason));
    }
    check(op, result)?;
    Ok(module)
}

/// The function of a kernel.
fn find(op: &'static str, module: CUmodule, kernel: Kernel, size: usize) -> Result<Function, OpError> {
    let name = CString::new(kernel.name).expect("names have no zero byte");
    let mut handle = null_mut();
    // SAFETY: a loaded module and a zero-terminated name.
    check(op, unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) })
        .map_err(|error| OpError::driver(op, format!("kernel {}: {error}", kernel.name)))?;
    let (mut offset, mut found) = (0, 0);
    // SAFETY: a function of a loaded module.
    check(op, unsafe { sys::cuFuncGetParamInfo(handle, 0, &mut offset, &mut found) })?;
    if found != size {
        let reason = format!("kernel {} takes {found} bytes of parameters, not {size}", kernel.name);
        return Err(OpError::driver(op, reason));
    }
    Ok(Function { handle, shared_bytes: SHARED_BYTES_DEFAULT })
}
