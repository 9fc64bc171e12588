use std::ffi::{CStr, c_char};

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute};

use super::{OPEN, check};
use crate::OpError;
use crate::cuda::driver::Properties;

/// How many there are, once the driver is initialised.
pub(super) fn count() -> Result<u32, OpError> {
    let mut count = 0;
    // SAFETY: a plain question.
    check(OPEN, unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(count as u32)
}

pub(super) fn device(ordinal: u32) -> Result<CUdevice, OpError> {
    let count = count()?;
    if ordinal >= count {
        return Err(OpError::driver(OPEN, format!("there are {count} GPUs, none has number {ordinal}")));
    }
    let mut device = 0;
    // SAFETY: there is a device of this number.
    check(OPEN, unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
    Ok(device)
}

pub(super) fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<u32, OpError> {
    let mut value = 0;
    // SAFETY: the device exists.
    check(OPEN, unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
    Ok(value as u32)
}

pub(super) fn properties(device: CUdevice) -> Result<Properties, OpError> {
    use CUdevice_attribute as A;
    let attribute = |which| attribute(device, which);
    let mut name = [0 as c_char; 128];
    // SAFETY: as many bytes as are said, and the last stays zero.
    check(OPEN, unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device) })?;
    let mut driver_version = 0;
    // SAFETY: a plain question.
    check(OPEN, unsafe { sys::cuDriverGetVersion(&mut driver_version) })?;
    Ok(Properties {
        // SAFETY: zero-terminated, by the call above or by its last byte.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver_version: driver_version as u32,
    })
}
