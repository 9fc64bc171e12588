//! Files that `torch.save` would not write.

use crate::archive::{Archive, legacy};
use crate::pickle::{START, Tensor, call, dict, global, int, legacy_start, list, pickle, text, tuple};
use crate::{Reader, Row};

const NAME: &str = "pytorch_model.bin";
const STORAGE: &[u8] = &[0; 8];

fn row(name: &'static str, bytes: Vec<u8>, expected: &'static [&'static str]) -> Row {
    Row::new(name, Reader::Weights, vec![(NAME, bytes)], expected)
}

/// The archive that nothing is wrong with.
fn archive() -> Archive {
    Archive::of(&Tensor::default().pickle(), STORAGE)
}

/// An archive of this pickle.
fn of(pickle: &[u8]) -> Vec<u8> {
    Archive::of(pickle, STORAGE).bytes()
}

/// An archive with this tensor, `weight`.
fn tensor(tensor: Tensor) -> Vec<u8> {
    of(&tensor.pickle())
}

/// What has to be accepted, so that each row is refused for one reason.
pub(crate) fn valid() -> Vec<(&'static str, Vec<u8>)> {
    let wide =
        [&1u16.to_le_bytes()[..], &24u16.to_le_bytes(), &8u64.to_le_bytes(), &8u64.to_le_bytes()].concat();
    let header = archive().bytes().windows(12).position(|part| part == b"model/data/0").unwrap() as u64 - 30;
    let wide = [&wide[..], &header.to_le_bytes()].concat();
    let large = archive().with("data/0", |entry| {
        entry.extra = [&[0xfe, 0xca, 1, 0, 7][..], &wide].concat();
        entry.size = Some(u32::MAX);
        entry.packed = Some(u32::MAX);
        entry.header = Some(u32::MAX);
    });
    let keys = pickle(&list(&[text("0")]));
    vec![
        ("pytorch_model.bin", archive().bytes()),
        ("model.pt", Archive { wide: true, comment: b"PK".to_vec(), ..archive() }.bytes()),
        ("large.bin", large.bytes()),
        ("old.bin", legacy(&[&legacy_start(), &Tensor::default().pickle(), &keys], &[(2, STORAGE)])),
    ]
}

pub(crate) fn archives() -> Vec<Row> {
    let bytes = archive().bytes();
    let end = bytes.len();
    let pickle_of_zeros = vec![0; 1000];
    vec![
        row("empty .bin", Vec::new(), &[NAME, "torch.save did not write this: 0 bytes"]),
        row("text instead of weights", b"<html>not found".to_vec(), &[NAME, "start with `<html>no`"]),
        row("archive cut in its data", bytes[..300].to_vec(), &[NAME, "is the download complete?"]),
        row("archive cut by one byte", bytes[..end - 1].to_vec(), &[NAME, "no directory at its end"]),
        row(
            "only the end of an archive",
            [b"PK\x03\x04", &bytes[end - 22..]].concat(),
            &[NAME, "outside of the file"],
        ),
        row(
            "compressed pickle",
            archive().with("data.pkl", |entry| entry.method = 8).bytes(),
            &[NAME, "`data.pkl` is compressed"],
        ),
        row(
            "zip bomb",
            archive()
                .with("data/0", |entry| {
                    entry.method = 8;
                    entry.size = Some(4_000_000_000);
                })
                .bytes(),
            &[NAME, "`data/0` is compressed"],
        ),
        row(
            "stored entry with two sizes",
            archive().with("data/0", |entry| entry.size = Some(4_000_000_000)).bytes(),
            &[NAME, "`data/0` is compressed"],
        ),
        row(
            "encrypted entry",
            archive().with("data/0", |entry| entry.flags = 1).bytes(),
            &[NAME, "encrypted"],
        ),
        row(
            "entry longer than the file",
            archive()
                .with("data/0", |entry| {
                    entry.size = Some(4_000_000_000);
                    entry.packed = Some(4_000_000_000);
                })
                .bytes(),
            &[NAME, "`data/0` is not where, or not what"],
        ),
        row(
            "entry outside of the file",
            archive().with("data/0", |entry| entry.header = Some(4_000_000_000)).bytes(),
            &[NAME, "`data/0` is not where"],
        ),
        row(
            "entry that is another entry",
            archive().with("data/0", |entry| entry.header = Some(0)).bytes(),
            &[NAME, "`data/0` is not where"],
        ),
        row(
            "entry with another name before it",
            archive().with("data/0", |entry| entry.local_name = Some("model/data/1".to_owned())).bytes(),
            &[NAME, "`data/0` is not where"],
        ),
        row(
            "entry with 64-bit sizes that are missing",
            archive().with("data/0", |entry| entry.size = Some(u32::MAX)).bytes(),
            &[NAME, "a 64-bit size is missing"],
        ),
        row(
            "fewer entries than promised",
            Archive { count: Some(9), ..archive() }.bytes(),
            &[NAME, "fewer entries"],
        ),
        row(
            "more entries than promised",
            Archive { count: Some(2), ..archive() }.bytes(),
            &[NAME, "more entries"],
        ),
        row(
            "billions of entries",
            Archive { count: Some(1 << 40), wide: true, ..archive() }.bytes(),
            &[NAME, "1099511627776 entries, the limit is 1048576"],
        ),
        row(
            "directory outside of the file",
            Archive { directory_start: Some(u64::MAX), wide: true, ..archive() }.bytes(),
            &[NAME, "outside of the file"],
        ),
        row(
            "directory that starts elsewhere",
            Archive { directory_start: Some(3), ..archive() }.bytes(),
            &[NAME, "fewer entries"],
        ),
        row(
            "an entry twice",
            {
                let mut twice = archive();
                twice.add("data/0", STORAGE);
                twice.bytes()
            },
            &[NAME, "two entries `model/data/0`"],
        ),
        row("no pickle", Archive::new(&[("data/0", STORAGE)]).bytes(), &[NAME, "no entry `data.pkl`"]),
        row(
            "two models",
            {
                let mut two = archive();
                two.add("other/data.pkl", &pickle_of_zeros);
                two.bytes()
            },
            &[NAME, "two entries `data.pkl`"],
        ),
        row(
            "big-endian numbers",
            Archive::new(&[
                ("data.pkl", &Tensor::default().pickle()),
                ("byteorder", b"big"),
                ("data/0", STORAGE),
            ])
            .bytes(),
            &[NAME, "little-endian"],
        ),
        row(
            "no storage",
            Archive::new(&[("data.pkl", &Tensor::default().pickle())]).bytes(),
            &[NAME, "`weight`: its storage `0` is missing"],
        ),
    ]
}

pub(crate) fn pickles() -> Vec<Row> {
    [code(), machine(), tensors()].into_iter().flatten().collect()
}

fn code() -> Vec<Row> {
    let system = call(global("os", "system"), &[text("true")]);
    let reduce = |value: Vec<u8>| of(&pickle(&dict(&[("weight", value)])));
    vec![
        row("a pickle that runs a program", of(&pickle(&system)), &[NAME, "`os.system`, which is refused"]),
        row(
            "the same beside a tensor",
            {
                of(&pickle(&dict(&[
                    ("weight", Tensor::default().value()),
                    ("x", call(global("posix", "system"), &[])),
                ])))
            },
            &[NAME, "`posix.system`"],
        ),
        row(
            "builtins.eval",
            reduce(call(global("builtins", "eval"), &[text("1")])),
            &[NAME, "`builtins.eval`"],
        ),
        row("the oldest instruction that calls", of(&pickle(b"(ios\nsystem\n")), &[NAME, "opcode 0x69"]),
        row("an instruction that makes objects", of(&pickle(b")\x81")), &[NAME, "opcode 0x81"]),
        row(
            "a name from the stack",
            of(&pickle(&[text("os"), text("system"), vec![0x93]].concat())),
            &[NAME, "opcode 0x93"],
        ),
        row(
            "a name with a dot in it",
            reduce(global("torch", "_utils._rebuild_tensor_v2")),
            &[NAME, "holds no dictionary with tensors"],
        ),
        row("a registered extension", of(&pickle(b"\x82\x01")), &[NAME, "opcode 0x82"]),
        row("a persistent name in text", of(&pickle(b"P0\n")), &[NAME, "opcode 0x50"]),
        row(
            "a storage class that is called",
            reduce(call(global("torch", "FloatStorage"), &[int(1 << 40)])),
            &[NAME, "`torch.FloatStorage`"],
        ),
        row(
            "an ordered dictionary with arguments",
            reduce(call(global("collections", "OrderedDict"), &[list(&[])])),
            &[NAME, "`collections.OrderedDict`"],
        ),
        row(
            "a storage class that does not exist",
            reduce(global("torch", "NoStorage")),
            &[NAME, "`torch.NoStorage`"],
        ),
        row("state for something that is no dictionary", of(&pickle(b"]Nb")), &[NAME, "opcode 0x62"]),
        row("protocol 4", of(&[0x80, 4, b'}', b'.']), &[NAME, "protocol 4"]),
    ]
}

fn machine() -> Vec<Row> {
    const MANY: usize = 3 << 20;
    let long_name = format!("c{}\nx\n", "m".repeat(100_000));
    vec![
        row("an empty pickle", of(b""), &[NAME, "ends too early"]),
        row("a pickle without an end", of(START), &[NAME, "ends too early"]),
        row("a pickle of nothing", of(b"\x80\x02."), &[NAME, "broken at byte 2"]),
        row("a string longer than the file", of(b"\x80\x02X\xff\xff\xff\xff"), &[NAME, "ends too early"]),
        row("a string of negative length", of(b"\x80\x02T\xff\xff\xff\xffabc"), &[NAME, "ends too early"]),
        row("a string that is not UTF-8", of(b"\x80\x02X\x01\0\0\0\xff."), &[NAME, "not UTF-8"]),
        row("a module name without an end", of(b"\x80\x02cos"), &[NAME, "ends too early"]),
        row(
            "a module name of many letters",
            of(&pickle(long_name.as_bytes())),
            &[NAME, "mmm", "…`, which is refused"],
        ),
        row("a memo that was never filled", of(b"\x80\x02j\xff\xff\xff\xff."), &[NAME, "broken at byte 2"]),
        row(
            "a memo of four billion places",
            of(b"\x80\x02}r\xff\xff\xff\xff."),
            &[NAME, "no dictionary with tensors"],
        ),
        row(
            "a memo bomb",
            of(&pickle(
                &[
                    b"N".to_vec(),
                    (0..MANY as u32).flat_map(|at| [&b"r"[..], &at.to_le_bytes()].concat()).collect(),
                ]
                .concat(),
            )),
            &[NAME, "more than 1048576 values"],
        ),
        row(
            "a dictionary that contains itself",
            of(b"\x80\x02}q\0X\x01\0\0\0ah\0s."),
            &[NAME, "no dictionary with tensors"],
        ),
        row("a list that contains itself", of(b"\x80\x02]q\0h\0a."), &[NAME, "no dictionary with tensors"]),
        row(
            "tuples in tuples",
            of(&pickle(&[b"N".to_vec(), vec![0x85; MANY]].concat())),
            &[NAME, "more than 1048576 values"],
        ),
        row(
            "tuples of twice the same",
            of(&pickle(&[b"N".to_vec(), b"q\0h\0\x86".repeat(40)].concat())),
            &[NAME, "no dictionary with tensors"],
        ),
        row("many open marks", of(&pickle(&vec![b'('; MANY])), &[NAME, "more than 65536 open marks"]),
        row("many values", of(&pickle(&vec![b'N'; MANY])), &[NAME, "more than 65536 values at once"]),
        row("many containers", of(&pickle(&b"]N\x86".repeat(MANY / 2))), &[NAME, "more than"]),
        row(
            "a pickle of 20 MB",
            of(&[START, b"}", &b"Nb".repeat(10 << 20)].concat()),
            &[NAME, "more than 16777216 bytes"],
        ),
        row("a mark that is closed twice", of(b"\x80\x02(tt."), &[NAME, "broken at byte 4"]),
        row("a dictionary of three", of(b"\x80\x02}(NNNu."), &[NAME, "broken at byte 7"]),
        row("a store below the mark", of(b"\x80\x02}N(Ns."), &[NAME, "broken at byte 6"]),
        row("a storage that is no tuple", of(b"\x80\x02NQ."), &[NAME, "broken at byte 3"]),
    ]
}

fn tensors() -> Vec<Row> {
    let base = Tensor::default;
    let twice = [("weight", base().value()), ("weight", base().value())];
    let few = call(global("torch._utils", "_rebuild_tensor_v2"), &[int(1)]);
    let wrapped = call(global("torch._utils", "_rebuild_parameter"), &[text("no tensor")]);
    let in_tuple = of(&pickle(&tuple(&[base().value()])));
    vec![
        row(
            "a tensor larger than its storage",
            tensor(Tensor { size: vec![3], ..base() }),
            &[NAME, "`weight` of shape [3]", "does not fit"],
        ),
        row(
            "a storage shorter than described",
            tensor(Tensor { elements: 3, size: vec![3], ..base() }),
            &[NAME, "`weight`", "has 8 bytes, 3 elements of F32 expected"],
        ),
        row(
            "a storage longer than described",
            tensor(Tensor { elements: 1, size: vec![1], ..base() }),
            &[NAME, "`weight`", "has 8 bytes, 1 elements of F32"],
        ),
        row(
            "a storage of another type",
            tensor(Tensor { class: "HalfStorage", ..base() }),
            &[NAME, "`weight`", "2 elements of F16"],
        ),
        row(
            "an offset behind the storage",
            tensor(Tensor { offset: 1, ..base() }),
            &[NAME, "`weight`", "from element 1 on"],
        ),
        row("a negative offset", tensor(Tensor { offset: -1, ..base() }), &[NAME, "`weight`: its offset"]),
        row("a negative size", tensor(Tensor { size: vec![-2], ..base() }), &[NAME, "`weight`: its size"]),
        row(
            "a negative stride",
            tensor(Tensor { stride: vec![-1], ..base() }),
            &[NAME, "`weight`: its stride"],
        ),
        row(
            "a stride that leaves the storage",
            tensor(Tensor { stride: vec![2], ..base() }),
            &[NAME, "`weight`", "strides [2]"],
        ),
        row(
            "a huge stride",
            tensor(Tensor { stride: vec![i64::MAX], size: vec![3], ..base() }),
            &[NAME, "`weight`", "does not fit"],
        ),
        row(
            "fewer strides than sizes",
            tensor(Tensor { stride: Vec::new(), ..base() }),
            &[NAME, "`weight`: its stride"],
        ),
        row(
            "sizes whose product overflows",
            tensor(Tensor { size: vec![i64::MAX, 4], stride: vec![0, 0], ..base() }),
            &[NAME, "`weight`", "does not fit"],
        ),
        row(
            "one element, a billion times",
            tensor(Tensor { size: vec![1 << 30], stride: vec![0], ..base() }),
            &[NAME, "`weight`", "repeats the 2 elements"],
        ),
        row(
            "many dimensions",
            tensor(Tensor { size: vec![1; 1000], stride: vec![1; 1000], ..base() }),
            &[NAME, "`weight`: its size"],
        ),
        row(
            "a negative storage",
            tensor(Tensor { elements: -2, ..base() }),
            &[NAME, "`weight`: its storage"],
        ),
        row(
            "a storage of all memory",
            tensor(Tensor { elements: i64::MAX, ..base() }),
            &[NAME, "`weight`", "9223372036854775807 elements"],
        ),
        row(
            "a storage with a path as its name",
            tensor(Tensor { key: "../../x", ..base() }),
            &[NAME, "`weight`: its storage `../../x` is missing"],
        ),
        row("a tensor twice", of(&pickle(&dict(&twice))), &[NAME, "`weight` is there twice"]),
        row(
            "a tensor of one argument",
            of(&pickle(&dict(&[("weight", few)]))),
            &[NAME, "`weight`: its list of arguments"],
        ),
        row(
            "a parameter without a tensor",
            of(&pickle(&dict(&[("weight", wrapped)]))),
            &[NAME, "`weight`: its list of arguments"],
        ),
        row(
            "a dictionary without tensors",
            of(&pickle(&dict(&[("weight", int(1))]))),
            &[NAME, "no dictionary with tensors"],
        ),
        row("tensors outside of a dictionary", in_tuple, &[NAME, "no dictionary with tensors"]),
    ]
}

pub(crate) fn legacy_files() -> Vec<Row> {
    let (start, state, keys) = (legacy_start(), Tensor::default().pickle(), pickle(&list(&[text("0")])));
    let good = legacy(&[&start, &state, &keys], &[(2, STORAGE)]);
    let of = |state: &[u8], keys: &[u8], storages: &[(u64, &[u8])]| legacy(&[&start, state, keys], storages);
    let two_types = pickle(&dict(&[
        ("weight", Tensor::default().value()),
        ("half", Tensor { class: "HalfStorage", ..Tensor::default() }.value()),
    ]));
    let big_endian = pickle(&dict(&[("little_endian", vec![0x89])]));
    let magic = &start[..start.windows(2).skip(1).position(|part| part == START).unwrap() + 1];
    vec![
        row("legacy: only a pickle", pickle(b"}"), &[NAME, "its magic number"]),
        row(
            "legacy: a program instead of the magic number",
            pickle(&call(global("os", "system"), &[])),
            &[NAME, "`os.system`"],
        ),
        row("legacy: another version", [magic, &pickle(&int(1002))].concat(), &[NAME, "its version"]),
        row(
            "legacy: big-endian",
            [magic, &pickle(&int(1001)), &big_endian].concat(),
            &[NAME, "little-endian"],
        ),
        row("legacy: cut in a pickle", good[..start.len() + 40].to_vec(), &[NAME, "ends too early"]),
        row(
            "legacy: cut before the storages",
            good[..good.len() - 16].to_vec(),
            &[NAME, "storage `0` is cut off"],
        ),
        row("legacy: cut in a storage", good[..good.len() - 1].to_vec(), &[NAME, "storage `0` is cut off"]),
        row(
            "legacy: a program in the state",
            of(&pickle(&global("os", "system")), &keys, &[]),
            &[NAME, "`os.system`"],
        ),
        row("legacy: keys that are no list", of(&state, &pickle(b"}"), &[]), &[NAME, "list of storages"]),
        row(
            "legacy: keys that are no text",
            of(&state, &pickle(&list(&[int(0)])), &[]),
            &[NAME, "list of storages"],
        ),
        row(
            "legacy: no keys",
            of(&state, &pickle(b"]"), &[]),
            &[NAME, "`weight`: its storage `0` is missing"],
        ),
        row(
            "legacy: an unknown key",
            of(&state, &pickle(&list(&[text("1")])), &[(2, STORAGE)]),
            &[NAME, "storage `1` is described twice, or not at all"],
        ),
        row(
            "legacy: a key twice",
            of(&state, &pickle(&list(&[text("0"), text("0")])), &[(2, STORAGE), (2, STORAGE)]),
            &[NAME, "storage `0` is described twice"],
        ),
        row(
            "legacy: a storage of two types",
            of(&two_types, &keys, &[(2, STORAGE)]),
            &[NAME, "storage `0` is described twice"],
        ),
        row(
            "legacy: a storage of another length",
            of(&state, &keys, &[(u64::MAX, STORAGE)]),
            &[NAME, "holds 18446744073709551615 elements, 2 are described"],
        ),
    ]
}
