//! The kernels' sources, and what of them has changed.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Where the sources are.
pub(crate) const FOLDER: &str = "cuda";

/// Every `.cu` file, in the order of their names.
pub(crate) fn kernels() -> Vec<PathBuf> {
    let mut files = files(Path::new(FOLDER));
    files.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    files
}

/// Every file of a folder and what is below it, in the order of their names.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("a folder that is readable").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// The name of a kernel file, without its ending.
pub(crate) fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("names of sources are UTF-8")
}

/// A number that changes when one of the files does.
pub(crate) fn hash(files: &[PathBuf], more: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    more.hash(&mut hasher);
    for path in files {
        path.hash(&mut hasher);
        fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).hash(&mut hasher);
    }
    hasher.finish()
}

/// A file to compile, and what it becomes.
pub(crate) struct Unit {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    /// Of all that goes into it.
    pub(crate) key: u64,
}

/// Compiles what has changed since the last time, a few at a time, the longest sources first. A panic names what failed.
pub(crate) fn compile(mut units: Vec<Unit>, run: impl Fn(&Unit) -> Result<(), String> + Sync) {
    let stamp = |unit: &Unit| unit.target.with_extension("stamp");
    units.retain(|unit| {
        !unit.target.exists() || fs::read_to_string(stamp(unit)).ok() != Some(unit.key.to_string())
    });
    units.sort_by_key(|unit| std::cmp::Reverse(fs::metadata(&unit.source).map_or(0, |meta| meta.len())));
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let work = || {
            while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                run(unit).unwrap_or_else(|error| panic!("{}: {error}", unit.source.display()));
                fs::write(stamp(unit), unit.key.to_string()).expect("OUT_DIR is writable");
            }
        };
        let workers: Vec<_> = (0..usize::min(jobs, units.len())).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
