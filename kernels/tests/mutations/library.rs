use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use crate::Mutation;

/// The compiler that built the kernels of this test, and its flags, set by the build script.
const COMPILER: &str = env!("KERNEL_COMPILER");
const FLAGS: &str = env!("KERNEL_COMPILER_FLAGS");

/// Quicker to compile. Kernels and templates must not be those of the same names in the executable, so a library shows none
/// of its symbols.
const MORE_FLAGS: [&str; 6] = ["-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"];

/// Where changed copies of the kernels are compiled.
pub(crate) struct Workshop {
    tables: &'static [&'static [Mutation]],
    folder: TempDir,
    next: AtomicUsize,
}

impl Workshop {
    pub(crate) fn new(tables: &'static [&'static [Mutation]]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { tables, folder, next: AtomicUsize::new(0) }
    }

    /// A library with a family's kernels as they are.
    pub(crate) fn without_fault(&self, family: &str) -> PathBuf {
        compile(&self.copy(), &self.sources(family)).unwrap_or_else(|error| panic!("{family}: {error}"))
    }

    /// A library with a fault. That of a header is in all kernels of the family.
    pub(crate) fn with_fault(&self, mutation: &Mutation) -> PathBuf {
        let Mutation { family, file, what, .. } = mutation;
        let copy = self.copy();
        fs::write(copy.join("cuda").join(file), changed(mutation)).expect("a copy that can be written");
        let sources = if file.ends_with(".cu") { [*file].into() } else { self.sources(family) };
        compile(&copy, &sources).unwrap_or_else(|error| panic!("{family}: {what}: {error}"))
    }

    /// The files with a family's kernels: the one of its name, and those that its faults are in.
    fn sources(&self, family: &str) -> BTreeSet<&'static str> {
        let all = self.tables.iter().copied().flatten();
        let files = all.filter(|mutation| mutation.family == family).map(|mutation| mutation.file);
        let sources: BTreeSet<&str> = files.filter(|file| file.ends_with(".cu")).collect();
        assert!(!sources.is_empty(), "{family}: at least one fault has to be in a .cu file");
        sources
    }

    /// A folder with a copy of the kernels, as the crate's folder has them.
    fn copy(&self) -> PathBuf {
        let copy = self.folder.path().join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        copy_folder(&crate_folder.join("cuda"), &copy.join("cuda"));
        symlink(crate_folder.join("emulation"), copy.join("emulation")).expect("a new folder");
        copy
    }
}

/// The file of a mutation, with its fault. Panics when the text is not there.
pub(crate) fn changed(mutation: &Mutation) -> String {
    let Mutation { family, file, what, text, replacement } = mutation;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda").join(file);
    let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{family}, {file}: {error}"));
    assert!(source.contains(text), "{family}: {what}: {file} does not contain {text:?}");
    source.replacen(text, replacement, 1)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a temporary folder that can be written");
    for entry in fs::read_dir(from).expect("the kernels' folder") {
        let from = entry.expect("a folder that is readable").path();
        let to = to.join(from.file_name().expect("entries have names"));
        if from.is_dir() {
            copy_folder(&from, &to);
        } else {
            fs::copy(&from, &to).expect("a file that can be copied");
        }
    }
}

/// Compiles as the build script does, then links without the sanitizer's library: the executable has what is called of it.
fn compile(folder: &Path, sources: &BTreeSet<&str>) -> Result<PathBuf, String> {
    let mut objects = Vec::new();
    for source in sources {
        let object = format!("{source}.o");
        let mut compiler = Command::new(COMPILER);
        compiler.args(FLAGS.split('\u{1f}')).args(MORE_FLAGS).arg("-c").arg(format!("cuda/{source}"));
        run(compiler.current_dir(folder).args(["-o", &object]))?;
        objects.push(object);
    }
    let library = folder.join("kernels.so");
    run(Command::new(COMPILER).current_dir(folder).arg("-shared").args(objects).arg("-o").arg(&library))?;
    Ok(library)
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}
