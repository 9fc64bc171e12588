//! A pickle machine that cannot run anything: values go in, and a call stays a note of what was to be called.
//!
//! Strings are borrowed from the pickle; containers live in one list and refer to each other by position, so that
//! neither cycles nor depth cost anything. Memory is bounded by the limits below, time by the length of the pickle.

use std::collections::HashMap;

use safetensors::tensor::Dtype;

use super::error::PickleError;
use crate::weights::error::shown;

/// Longest pickle accepted. A tensor takes about 150 bytes.
const BYTES_MAX: usize = 16 << 20;

/// Most containers, members of containers and remembered values together. A tensor takes about 36.
const CELLS_MAX: usize = 1 << 20;

/// Most values at work. Python's pickler stores the members of a dictionary in batches of a thousand.
const STACK_MAX: usize = 1 << 16;

const PROTOCOL: u8 = 2;

/// Anything in a pickle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A number of more than 64 bits, little-endian.
    Long(&'a [u8]),
    /// Its value is never needed.
    Float,
    Text(&'a str),
    Global(Global),
    /// A position in the list of containers.
    Object(usize),
}

/// What refers to other values.
#[derive(Debug)]
pub(super) enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// What would have been called, and with which tuple.
    Call(Global, usize),
    /// A reference to a storage: the tuple that describes it.
    Storage(usize),
}

/// The names that a pickle may refer to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    Tensor,
    /// `torch._utils._rebuild_tensor_v3`, for types that have no storage class of their own
    TypedTensor,
    /// `torch._utils._rebuild_parameter`
    Parameter,
    /// `torch.FloatStorage` and its like
    Storage(Dtype),
    /// `torch.storage.UntypedStorage`: bytes
    UntypedStorage,
    /// `torch.float8_e4m3fn` and its like
    Dtype(Dtype),
}

const GLOBALS: &[(&str, Global)] = &[
    ("collections.OrderedDict", Global::OrderedDict),
    ("torch._utils._rebuild_tensor_v2", Global::Tensor),
    ("torch._utils._rebuild_tensor_v3", Global::TypedTensor),
    ("torch._utils._rebuild_parameter", Global::Parameter),
    ("torch.storage.UntypedStorage", Global::UntypedStorage),
    ("torch.DoubleStorage", Global::Storage(Dtype::F64)),
    ("torch.FloatStorage", Global::Storage(Dtype::F32)),
    ("torch.HalfStorage", Global::Storage(Dtype::F16)),
    ("torch.BFloat16Storage", Global::Storage(Dtype::BF16)),
    ("torch.LongStorage", Global::Storage(Dtype::I64)),
    ("torch.IntStorage", Global::Storage(Dtype::I32)),
    ("torch.ShortStorage", Global::Storage(Dtype::I16)),
    ("torch.CharStorage", Global::Storage(Dtype::I8)),
    ("torch.ByteStorage", Global::Storage(Dtype::U8)),
    ("torch.BoolStorage", Global::Storage(Dtype::BOOL)),
    ("torch.ComplexFloatStorage", Global::Storage(Dtype::C64)),
    ("torch.float8_e4m3fn", Global::Dtype(Dtype::F8_E4M3)),
    ("torch.float8_e5m2", Global::Dtype(Dtype::F8_E5M2)),
    ("torch.float8_e4m3fnuz", Global::Dtype(Dtype::F8_E4M3FNUZ)),
    ("torch.float8_e5m2fnuz", Global::Dtype(Dtype::F8_E5M2FNUZ)),
    ("torch.float8_e8m0fnu", Global::Dtype(Dtype::F8_E8M0)),
    ("torch.uint16", Global::Dtype(Dtype::U16)),
    ("torch.uint32", Global::Dtype(Dtype::U32)),
    ("torch.uint64", Global::Dtype(Dtype::U64)),
];

impl Global {
    fn find(module: &str, name: &str) -> Result<Self, PickleError> {
        let known = GLOBALS.iter().find(|(full, _)| {
            full.strip_suffix(name).and_then(|rest| rest.strip_suffix('.')) == Some(module)
        });
        known
            .map(|&(_, global)| global)
            .ok_or_else(|| PickleError::Global { name: shown(&format!("{module}.{name}")) })
    }

    fn name(self) -> String {
        let known = GLOBALS.iter().find(|&&(_, global)| global == self);
        known.map_or_else(String::new, |&(name, _)| name.to_owned())
    }
}

/// A pickle, read to its end.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    objects: Vec<Object<'a>>,
    /// What the pickle is of.
    pub(super) root: Value<'a>,
    /// Bytes up to its end.
    pub(super) length: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that `bytes` start with.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, PickleError> {
        let mut machine = Machine::new(&bytes[..bytes.len().min(BYTES_MAX)]);
        let root = loop {
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => break root,
                Err(PickleError::End) if bytes.len() > BYTES_MAX => {
                    return Err(PickleError::Large { what: "bytes", limit: BYTES_MAX });
                }
                Err(error) => return Err(error),
            }
        };
        Ok(Self { objects: machine.objects, root, length: machine.at })
    }

    /// Everything that is not a plain value.
    pub(super) fn objects(&self) -> impl Iterator<Item = &Object<'a>> {
        self.objects.iter()
    }

    /// The container that a value refers to.
    pub(super) fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Object(at) => Some(&self.objects[at]),
            _ => None,
        }
    }

    /// The members of the tuple that a value refers to.
    pub(super) fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.object(value)? {
            Object::Tuple(members) => Some(members),
            _ => None,
        }
    }

    /// The members of the dictionary that a value refers to, in the order of their storing.
    pub(super) fn dict(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.object(value)? {
            Object::Dict(members) => Some(members),
            _ => None,
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// How high the stack was at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    objects: Vec<Object<'a>>,
    cells: usize,
    /// The instruction at work, and where it stands.
    opcode: u8,
    opcode_at: usize,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            objects: Vec::new(),
            cells: 0,
            opcode: 0,
            opcode_at: 0,
        }
    }

    /// One instruction; the last one gives the pickled value.
    fn step(&mut self) -> Result<Option<Value<'a>>, PickleError> {
        self.opcode_at = self.at;
        let [opcode] = self.fixed()?;
        self.opcode = opcode;
        match opcode {
            0x80 => self.protocol()?,
            b'.' => return self.pop().map(Some),
            b'(' => self.mark()?,
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' => self.number(|[byte]: [u8; 1]| byte.into())?,
            b'M' => self.number(|bytes| u16::from_le_bytes(bytes).into())?,
            b'J' => self.number(|bytes| i32::from_le_bytes(bytes).into())?,
            0x8a => self.long()?,
            b'G' => {
                self.fixed::<8>()?;
                self.push(Value::Float)?;
            }
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.fixed()?);
                self.text(length)?;
            }
            b'U' => {
                let [length] = self.fixed()?;
                self.text(length.into())?;
            }
            b'}' => self.push_object(Object::Dict(Vec::new()))?,
            b']' => self.push_object(Object::List(Vec::new()))?,
            b')' => self.push_object(Object::Tuple(Vec::new()))?,
            b't' => self.above_mark().and_then(|members| self.tuple(members))?,
            0x85..=0x87 => {
                self.pop_many(usize::from(opcode - 0x84)).and_then(|members| self.tuple(members))?
            }
            b'a' => self.pop().and_then(|member| self.append(vec![member]))?,
            b'e' => self.above_mark().and_then(|members| self.append(members))?,
            b's' => self.pop_many(2).and_then(|members| self.store(members))?,
            b'u' => self.above_mark().and_then(|members| self.store(members))?,
            b'q' => {
                let [slot] = self.fixed()?;
                self.remember(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.fixed()?);
                self.remember(slot)?;
            }
            b'h' => {
                let [slot] = self.fixed()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.fixed()?);
                self.recall(slot)?;
            }
            b'c' => self.global()?,
            b'Q' => {
                let description = self.pop_tuple()?;
                self.push_object(Object::Storage(description))?;
            }
            b'R' => self.call()?,
            b'b' => self.build()?,
            _ => return Err(PickleError::Opcode { opcode, at: self.opcode_at }),
        }
        Ok(None)
    }

    fn protocol(&mut self) -> Result<(), PickleError> {
        match self.fixed()? {
            [PROTOCOL] => Ok(()),
            [version] => Err(PickleError::Protocol { version }),
        }
    }

    fn mark(&mut self) -> Result<(), PickleError> {
        if self.marks.len() == STACK_MAX {
            return Err(PickleError::Large { what: "open marks", limit: STACK_MAX });
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn number<const SIZE: usize>(&mut self, decode: fn([u8; SIZE]) -> i64) -> Result<(), PickleError> {
        let bytes = self.fixed()?;
        self.push(Value::Int(decode(bytes)))
    }

    /// Two's complement of up to 255 bytes; beyond 64 bits only a magic number is ever compared.
    fn long(&mut self) -> Result<(), PickleError> {
        let [length] = self.fixed()?;
        let bytes = self.take(length.into())?;
        if bytes.len() > size_of::<i64>() {
            return self.push(Value::Long(bytes));
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; size_of::<i64>()];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, length: u32) -> Result<(), PickleError> {
        let bytes = self.take(length as usize)?;
        let text = std::str::from_utf8(bytes).map_err(|_| PickleError::Text { at: self.opcode_at })?;
        self.push(Value::Text(text))
    }

    fn tuple(&mut self, members: Vec<Value<'a>>) -> Result<(), PickleError> {
        self.charge(members.len())?;
        self.push_object(Object::Tuple(members))
    }

    fn append(&mut self, members: Vec<Value<'a>>) -> Result<(), PickleError> {
        self.charge(members.len())?;
        match self.top()? {
            Object::List(list) => list.extend(members),
            _ => return Err(self.broken()),
        }
        Ok(())
    }

    fn store(&mut self, members: Vec<Value<'a>>) -> Result<(), PickleError> {
        self.charge(members.len())?;
        let (pairs, rest) = members.as_chunks::<2>();
        match self.top()? {
            Object::Dict(dict) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
            }
            _ => return Err(self.broken()),
        }
        Ok(())
    }

    fn remember(&mut self, slot: u32) -> Result<(), PickleError> {
        self.charge(1)?;
        let value = *self.stack.last().ok_or_else(|| self.broken())?;
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), PickleError> {
        let value = *self.memo.get(&slot).ok_or_else(|| self.broken())?;
        self.push(value)
    }

    fn global(&mut self) -> Result<(), PickleError> {
        let module = self.line()?;
        let name = self.line()?;
        self.push(Value::Global(Global::find(module, name)?))
    }

    /// Nothing is called: an ordered dictionary starts empty, and the rest is noted for `state_dict.rs` to understand.
    fn call(&mut self) -> Result<(), PickleError> {
        let arguments = self.pop_tuple()?;
        let Value::Global(global) = self.pop()? else { return Err(self.broken()) };
        match (global, &self.objects[arguments]) {
            (Global::OrderedDict, Object::Tuple(none)) if none.is_empty() => {
                self.push_object(Object::Dict(Vec::new()))
            }
            (Global::Tensor | Global::TypedTensor | Global::Parameter, _) => {
                self.push_object(Object::Call(global, arguments))
            }
            _ => Err(PickleError::Call { name: global.name(), at: self.opcode_at }),
        }
    }

    /// Sets attributes. Dictionaries of tensors have one, `_metadata`, which says nothing about tensors.
    fn build(&mut self) -> Result<(), PickleError> {
        self.pop()?;
        match self.top()? {
            Object::Dict(_) => Ok(()),
            _ => Err(self.broken()),
        }
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), PickleError> {
        if self.stack.len() == STACK_MAX {
            return Err(PickleError::Large { what: "values at once", limit: STACK_MAX });
        }
        self.stack.push(value);
        Ok(())
    }

    fn push_object(&mut self, object: Object<'a>) -> Result<(), PickleError> {
        self.charge(1)?;
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    fn charge(&mut self, cells: usize) -> Result<(), PickleError> {
        self.cells += cells;
        if self.cells > CELLS_MAX {
            return Err(PickleError::Large { what: "values", limit: CELLS_MAX });
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'a>, PickleError> {
        // What lies below an open mark belongs to an instruction that is still to come.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(self.broken());
        }
        self.stack.pop().ok_or_else(|| self.broken())
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Value<'a>>, PickleError> {
        let mut values = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        values.reverse();
        Ok(values)
    }

    fn pop_tuple(&mut self) -> Result<usize, PickleError> {
        match self.pop()? {
            Value::Object(at) if matches!(self.objects[at], Object::Tuple(_)) => Ok(at),
            _ => Err(self.broken()),
        }
    }

    fn above_mark(&mut self) -> Result<Vec<Value<'a>>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.broken())?;
        // `pop` leaves what lies below the mark alone.
        Ok(self.stack.split_off(mark))
    }

    /// The container on top of the stack.
    fn top(&mut self) -> Result<&mut Object<'a>, PickleError> {
        match self.stack.last() {
            Some(&Value::Object(at)) => Ok(&mut self.objects[at]),
            _ => Err(self.broken()),
        }
    }

    fn broken(&self) -> PickleError {
        PickleError::Stack { opcode: self.opcode, at: self.opcode_at }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PickleError> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..length).ok_or(PickleError::End)?;
        self.at += length;
        Ok(taken)
    }

    fn fixed<const SIZE: usize>(&mut self) -> Result<[u8; SIZE], PickleError> {
        let rest = &self.bytes[self.at..];
        let taken = rest.first_chunk().ok_or(PickleError::End)?;
        self.at += SIZE;
        Ok(*taken)
    }

    /// Up to the next line feed, which is passed.
    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or(PickleError::End)?;
        let line = self.take(length)?;
        self.at += 1;
        std::str::from_utf8(line).map_err(|_| PickleError::Text { at: self.opcode_at })
    }
}
