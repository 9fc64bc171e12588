//! Writes pickles as Python does, and wrong ones. Each function gives the instructions that leave one value.

pub(crate) const START: &[u8] = &[0x80, 2];

pub(crate) fn pickle(value: &[u8]) -> Vec<u8> {
    [START, value, b"."].concat()
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn int(number: i64) -> Vec<u8> {
    [&[0x8a, 8], &number.to_le_bytes()[..]].concat()
}

pub(crate) fn tuple(members: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &members.concat()[..], b"t"].concat()
}

pub(crate) fn list(members: &[Vec<u8>]) -> Vec<u8> {
    [b"](", &members.concat()[..], b"e"].concat()
}

pub(crate) fn dict(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let members: Vec<u8> =
        members.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
    [b"}(", &members[..], b"u"].concat()
}

pub(crate) fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

pub(crate) fn call(function: Vec<u8>, arguments: &[Vec<u8>]) -> Vec<u8> {
    [function, tuple(arguments), b"R".to_vec()].concat()
}

/// What a tensor of the storage `data/0` is described by.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) class: &'static str,
    pub(crate) key: &'static str,
    pub(crate) elements: i64,
    pub(crate) offset: i64,
    pub(crate) size: Vec<i64>,
    pub(crate) stride: Vec<i64>,
}

impl Default for Tensor {
    /// Two f32 that fill their storage.
    fn default() -> Self {
        Self { class: "FloatStorage", key: "0", elements: 2, offset: 0, size: vec![2], stride: vec![1] }
    }
}

impl Tensor {
    pub(crate) fn value(&self) -> Vec<u8> {
        let numbers = |numbers: &[i64]| tuple(&numbers.iter().map(|&number| int(number)).collect::<Vec<_>>());
        call(
            global("torch._utils", "_rebuild_tensor_v2"),
            &[
                self.storage(),
                int(self.offset),
                numbers(&self.size),
                numbers(&self.stride),
                vec![0x89],
                call(global("collections", "OrderedDict"), &[]),
            ],
        )
    }

    fn storage(&self) -> Vec<u8> {
        let class = global("torch", self.class);
        let members = [text("storage"), class, text(self.key), text("cpu"), int(self.elements)];
        [tuple(&members), b"Q".to_vec()].concat()
    }

    /// A whole pickle of a dictionary that holds it as `weight`.
    pub(crate) fn pickle(&self) -> Vec<u8> {
        pickle(&dict(&[("weight", self.value())]))
    }
}

/// The three pickles before the tensors in the format before PyTorch 1.6.
pub(crate) fn legacy_start() -> Vec<u8> {
    let magic = [0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    let writer = dict(&[("protocol_version", int(1001)), ("little_endian", vec![0x88])]);
    [pickle(&magic), pickle(&int(1001)), pickle(&writer)].concat()
}
