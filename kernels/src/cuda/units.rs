//! Memory that is moved without a look at its elements, in units of 1 to 16 bytes.

use super::driver::{DevicePtr, Kernel};

/// The kernels of a family for units of 1, 2, 4, 8 and 16 bytes: `"copy"` in module `copy` is `copy_1` and so on.
macro_rules! unit_kernels {
    ($module:literal, $name:literal) => {
        [
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_1") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_2") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_4") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_8") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_16") },
        ]
    };
}
pub(super) use unit_kernels;

/// The largest unit that everything consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    power: u32,
}

impl Unit {
    /// For memory at these addresses, in pieces and at distances of so many bytes.
    pub(super) fn of<const P: usize, const B: usize>(addresses: [DevicePtr; P], bytes: [usize; B]) -> Self {
        let all = addresses.iter().fold(0, |all, address| all | address.0);
        let all = bytes.iter().fold(all, |all, &bytes| all | bytes as u64);
        Self { power: all.trailing_zeros().min(4) }
    }

    /// The kernel of a family that moves such units.
    pub(super) fn pick(self, kernels: [Kernel; 5]) -> Kernel {
        kernels[self.power as usize]
    }

    /// How many of them are so many bytes.
    pub(super) fn count(self, bytes: usize) -> usize {
        bytes >> self.power
    }
}

#[cfg(test)]
mod tests {
    use super::{DevicePtr, Unit};

    #[test]
    fn units_are_as_large_as_everything_allows() {
        let bytes = |address, bytes| 1 << Unit::of([DevicePtr(256), DevicePtr(address)], [48, bytes]).power;
        assert_eq!(bytes(256, 32), 16);
        assert_eq!(bytes(264, 32), 8);
        assert_eq!(bytes(256, 20), 4);
        assert_eq!(bytes(258, 64), 2);
        assert_eq!(bytes(256, 7), 1);
        assert_eq!(bytes(0, 0), 16);
        assert_eq!(Unit::of([DevicePtr::NULL], [0]).count(64), 4);
    }
}
