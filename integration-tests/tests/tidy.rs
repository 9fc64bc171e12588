//! How the repository keeps itself: checked by plain `cargo test`, so that nobody has to remember it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A screen. The best projects of the field have under 2 % of functions longer than this.
const FUNCTION_LINES_MAX: usize = 70;

/// Beyond this, a file is more than one concept.
const FILE_LINES_MAX: usize = 600;

/// All test data together, in bytes.
const TEST_DATA_MAX: u64 = 25_000_000;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above this crate").to_owned()
}

/// Every file below `directory` that is not built or hidden.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("names are UTF-8")?.to_owned();
        if name.starts_with('.') || name == "target" || name == "work" || name == "__pycache__" {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// Path and text of every Rust file that ships: tests, benches and fuzz targets left out, and test modules inside files too.
fn shipped_sources() -> Result<Vec<(PathBuf, String)>> {
    let mut sources = Vec::new();
    for path in files(&root())? {
        let inside = path.strip_prefix(root())?;
        let test = inside
            .iter()
            .any(|part| ["tests", "benches", "fuzz", "integration-tests"].iter().any(|name| part == *name));
        if path.extension().is_some_and(|extension| extension == "rs") && !test {
            let text = std::fs::read_to_string(&path)?;
            let shipped = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
            sources.push((inside.to_owned(), shipped));
        }
    }
    anyhow::ensure!(sources.len() > 50, "only {} sources found: the search is broken", sources.len());
    Ok(sources)
}

#[test]
fn functions_fit_a_screen_and_files_hold_one_concept() -> Result<()> {
    let mut functions = 0;
    let mut long = Vec::new();
    for (path, text) in shipped_sources()? {
        let lines: Vec<&str> = text.lines().collect();
        let code = lines
            .iter()
            .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with("//"))
            .count();
        assert!(code <= FILE_LINES_MAX, "{} has {code} lines of code", path.display());
        for (start, line) in lines.iter().enumerate().filter(|(_, line)| opens_function(line)) {
            // Formatted code closes a function at the indentation it was opened with.
            let indent = &line[..line.len() - line.trim_start().len()];
            let close = format!("{indent}}}");
            let length = lines[start..].iter().position(|line| *line == close).map_or(1, |end| end + 1);
            functions += 1;
            if length > FUNCTION_LINES_MAX {
                long.push(format!("{}:{} ({length} lines)", path.display(), start + 1));
            }
        }
    }
    assert!(long.len() * 50 <= functions, "{} of {functions} functions are too long: {long:#?}", long.len());
    Ok(())
}

fn opens_function(line: &str) -> bool {
    let code = line.trim_start();
    let code = code.strip_prefix("pub ").or_else(|| code.strip_prefix("pub(crate) ")).unwrap_or(code);
    let code = code.strip_prefix("async ").or_else(|| code.strip_prefix("unsafe ")).unwrap_or(code);
    code.starts_with("fn ")
}

#[test]
fn the_environment_is_read_in_one_place_per_process() -> Result<()> {
    for (path, text) in shipped_sources()? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let builds = path.iter().any(|part| part == "build");
        if builds || ["config.rs", "args.rs", "env.rs", "build.rs"].contains(&name) {
            continue;
        }
        for word in ["env::var(", "env::var_os(", "env::vars("] {
            assert!(!text.contains(word), "{} reads the environment", path.display());
        }
    }
    Ok(())
}

#[test]
fn no_file_is_named_after_nothing() -> Result<()> {
    for path in files(&root())? {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        assert!(
            !["util", "utils", "helper", "helpers", "common", "misc"].contains(&stem),
            "{}",
            path.display()
        );
    }
    Ok(())
}

#[test]
fn unsafe_code_lives_in_kernels_and_the_mapped_file() -> Result<()> {
    for (path, text) in shipped_sources()? {
        if path.starts_with("kernels") || path.ends_with("weights/mapped.rs") {
            continue;
        }
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            assert!(!line.contains("unsafe {") && !line.contains("unsafe fn"), "{}: {line}", path.display());
        }
    }
    Ok(())
}

#[test]
fn test_data_stays_small() -> Result<()> {
    let sizes = files(&root().join("integration-tests"))?.into_iter().map(|path| Ok(path.metadata()?.len()));
    let total: u64 = sizes.sum::<Result<u64>>()?;
    assert!(total < TEST_DATA_MAX, "{total} bytes below integration-tests");
    let demo: u64 = files(&root().join("launcher/demo/model"))?
        .iter()
        .map(|path| path.metadata().map_or(0, |m| m.len()))
        .sum();
    assert!(demo < 8_000_000, "the demo model has {demo} bytes");
    Ok(())
}

#[test]
fn the_map_in_the_readme_names_every_folder() -> Result<()> {
    let readme = std::fs::read_to_string(root().join("README.md"))?;
    let manifest = std::fs::read_to_string(root().join("Cargo.toml"))?;
    let members =
        manifest.split("members = [").nth(1).and_then(|rest| rest.split(']').next()).context("members")?;
    for member in members.split(',').map(|item| item.trim().trim_matches('"')).filter(|item| !item.is_empty())
    {
        assert!(readme.contains(&format!("{member}/")), "the README does not name {member}/");
    }
    Ok(())
}
