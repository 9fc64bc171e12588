//! How long a checkpoint takes to get into memory, against `cat file > /dev/null`: from the disk and from the page cache.
//!
//! Takes a directory on the disk in question: `cargo bench -p shard --bench loading -- /somewhere`. It writes a
//! checkpoint of 2 GB there and removes it afterwards. The two take turns; the figures are medians.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use shard::weights::{Format, MappedFile, Tensors, prefetch};

const TENSORS: usize = 128;
/// Of bf16: 16 MB.
const ELEMENTS: usize = 8 << 20;
const RUNS: usize = 9;

fn main() -> io::Result<()> {
    // `cargo bench` adds `--bench`; without a directory, as in a run of all benches, there is nothing to do.
    let Some(directory) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')) else {
        println!("loading: give a directory with room for 2 GB to measure");
        return Ok(());
    };
    let directory = tempfile::tempdir_in(directory)?;
    let path = directory.path().join("model.safetensors");
    write_checkpoint(&path)?;
    for (state, cold) in [("cold", true), ("warm", false)] {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..RUNS {
            for (times, load) in times.iter_mut().zip([cat, load] as [fn(&Path) -> io::Result<()>; 2]) {
                if cold {
                    forget(&path)?;
                }
                let start = Instant::now();
                load(&path)?;
                times.push(start.elapsed().as_secs_f64());
            }
        }
        let [cat, load] = times.map(median);
        println!("{state}: cat {cat:.2} s, loading {load:.2} s: {:.2} times", load / cat);
    }
    Ok(())
}

fn write_checkpoint(path: &Path) -> io::Result<()> {
    let bytes = 2 * ELEMENTS;
    let entries: Vec<String> = (0..TENSORS)
        .map(|at| {
            let (start, end) = (at * bytes, (at + 1) * bytes);
            format!(r#""layer.{at}":{{"dtype":"BF16","shape":[{ELEMENTS}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // Bytes that no disk can compress: a linear congruential generator's (Knuth's MMIX).
    let mut state = 1u64;
    let mut tensor = vec![0; bytes];
    for chunk in tensor.as_chunks_mut::<8>().0 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *chunk = state.to_le_bytes();
    }
    for at in 0..TENSORS {
        tensor[0] = at as u8;
        file.write_all(&tensor)?;
    }
    file.into_inner()?.sync_all()
}

fn cat(path: &Path) -> io::Result<()> {
    run(Command::new("cat").arg(path))
}

/// From opening the file to all of it in memory, as a shard of one rank does it.
fn load(path: &Path) -> io::Result<()> {
    let file = Arc::new(MappedFile::open(path)?);
    let tensors = Tensors::parse(Format::Safetensors, path, file.bytes()).map_err(io::Error::other)?;
    let ranges: Vec<_> =
        tensors.names().filter_map(|name| tensors.bytes(name)).map(|range| (file.clone(), range)).collect();
    prefetch(&ranges, |_| ()).map_err(io::Error::other)
}

/// Drops the file from the page cache.
fn forget(path: &Path) -> io::Result<()> {
    run(Command::new("dd").arg(format!("if={}", path.display())).args(["iflag=nocache", "count=0"]))
}

fn run(command: &mut Command) -> io::Result<()> {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
