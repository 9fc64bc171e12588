//! The doctor, as somebody starts it who has a GPU for some minutes; here it is emulated.
#![cfg(feature = "emulation")]

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::{binary, fixtures};
use serde_json::Value;

/// The exit code, and everything that was written.
fn doctor(flags: &[&str]) -> Result<(i32, String)> {
    let output =
        Command::new(binary::launcher()).args(["doctor", "--gpu", "--emulated"]).args(flags).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().context("it ends by itself")?, String::from_utf8(text)?))
}

fn contains(text: &str, lines: &[&str]) -> Result<()> {
    lines.iter().try_for_each(|line| {
        ensure!(text.contains(line), "{line} is not in\n{text}");
        Ok(())
    })
}

/// The repository's, all of them.
fn all_fixtures() -> Result<String> {
    let root = fixtures::directory("");
    Ok(root.to_str().context("a path in UTF-8")?.to_owned())
}

#[test]
fn every_part_finds_an_emulated_gpu_well_and_says_what_it_has_checked() -> Result<()> {
    let all = all_fixtures()?;
    let flags = ["--fixtures", &all, "--fixture", "llama", "--fixture", "mixtral_split"];
    let (code, text) = doctor(&flags)?;
    ensure!(code == 0, "{text}");
    contains(
        &text,
        &[
            "| GPU | emulated |",
            "\n| norm |",
            "\n| Llama, BF16 |",
            "\n| llama |",
            "\n| llama + qv |",
            "\n| mixtral_split |",
            "| two threads | emulated, emulated | peer memory |",
            "| two threads | emulated, emulated | through the host's memory |",
            "| two processes | emulated, emulated | peer memory: they do not have it |",
            "| two processes | emulated, emulated | through the host's memory |",
            "\n## Summary\n\n| part | checks | wrong | seconds |\n| --- | --- | --- | --- |\n| kernels |",
            "\nAll that was checked is well. Not checked: ranks by NCCL.\n",
        ],
    )
}

#[test]
fn what_was_not_asked_for_is_not_passed_over_in_silence() -> Result<()> {
    let (code, text) = doctor(&["--part", "fixtures", "--part", "model"])?;
    ensure!(code == 0, "{text}");
    contains(
        &text,
        &["\n| fixtures | not checked: --fixtures does not say where they are |", "Not checked: fixtures.\n"],
    )
}

/// A copy of the fixture `llama`, alone in its directory, without its adapters, and with other answers.
fn changed(directory: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let (from, to) = (fixtures::directory("llama"), directory.join("llama"));
    fs::create_dir(&to)?;
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), to.join(name))?;
    }
    fs::copy(fixtures::directory("rounding.json"), directory.join("rounding.json"))?;
    let mut expected: Value = serde_json::from_slice(&fs::read(from.join("expected.json"))?)?;
    change(&mut expected);
    Ok(fs::write(to.join("expected.json"), serde_json::to_vec(&expected)?)?)
}

fn examine_changed(change: impl FnOnce(&mut Value)) -> Result<(i32, String)> {
    let directory = tempfile::tempdir()?;
    changed(directory.path(), change)?;
    let path = directory.path().to_str().context("a path in UTF-8")?;
    doctor(&["--fixtures", path, "--part", "fixtures"])
}

#[test]
fn an_answer_that_is_not_the_expected_one_is_told_with_fixture_type_and_prompt() -> Result<()> {
    let (code, text) = examine_changed(|expected| {
        let logprob = &mut expected["prompts"][1]["prefill_logprobs"][2];
        *logprob = (logprob.as_f64().unwrap_or(0.0) - 0.75).into();
    })?;
    ensure!(code == 1, "{text}");
    for dtype in ["float32", "float16", "bfloat16"] {
        let line = format!("\n- llama, {dtype}: prompt `unicode`: a log-probability is 0.7");
        contains(
            &text,
            &[&line, "\n3 findings are wrong:\n", "\n| wrong: llama, float32: prompt `unicode`: "],
        )?;
    }

    let (code, text) = examine_changed(|expected| expected["prompts"][0]["generated_ids"][4] = 7.into())?;
    ensure!(code == 1, "{text}");
    contains(&text, &["\n- llama, float32: prompt `short`: token 4 is 1003, 7 expected\n"])
}

#[test]
fn fixtures_that_are_not_there_are_errors_that_name_what_is_missing() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().to_str().context("a path in UTF-8")?;
    let (code, text) = doctor(&["--fixtures", path])?;
    ensure!(
        code == 1 && text == format!("Error: {path}: no fixture is there: no directory with expected.json\n"),
        "{text}"
    );

    let (code, text) = doctor(&["--fixtures", "/no/such/directory"])?;
    ensure!(code == 1 && text.starts_with("Error: /no/such/directory: "), "{text}");

    let all = all_fixtures()?;
    let (code, text) = doctor(&["--fixtures", &all, "--fixture", "lama"])?;
    ensure!(code == 1 && text.contains("there is no fixture `lama`; there are baichuan_13b, "), "{text}");

    changed(directory.path(), |expected| expected["prompts"][2]["top"] = Value::Array(vec![]))?;
    let (code, text) = doctor(&["--fixtures", path])?;
    let reason = "llama/expected.json: prompt `long`: `top` has 0 entries, 24 expected";
    ensure!(code == 1 && text.contains(reason), "{text}");
    Ok(())
}

#[test]
fn a_family_that_is_not_there_is_an_error_that_lists_them() -> Result<()> {
    let (code, text) = doctor(&["--family", "nrom"])?;
    ensure!(code == 1 && text.contains("no family `nrom`") && text.contains("norm, "), "{text}");
    Ok(())
}
