//! The real launcher and models of a Hub on loopback: served, downloaded, interrupted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::fake_hub::{Access, COMMIT, Content, FakeHub, Fault};
use integration_tests::stack::{Stack, children, command, free_address, gone};
use integration_tests::{binary, fixtures};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

/// How long anything may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of the weights that downloads are interrupted at: more than fits into one window of chunks.
const LARGE: u64 = 80 << 20;

/// Where [`LARGE`] weights stall: the beginning of the chunk that this is in is what gets written.
const STALL: u64 = 41 << 20;

/// A Hub and a home for its cache.
struct Case {
    fake: FakeHub,
    home: tempfile::TempDir,
}

impl Case {
    fn new() -> Result<Self> {
        Ok(Self { fake: FakeHub::start()?, home: tempfile::tempdir()? })
    }

    /// The fixture of the Llama family as `org/llama`.
    fn with_llama() -> Result<Self> {
        let case = Self::new()?;
        let mut files = vec![("README.md".to_owned(), Content::of("not needed"))];
        for entry in fs::read_dir(fixtures::directory("llama"))? {
            let entry = entry?;
            if entry.path().is_dir() {
                continue;
            }
            let name = entry.file_name().into_string().ok().context("a name in UTF-8")?;
            files.push((name, Content::read(&entry.path())?));
        }
        case.fake.add("org/llama", files);
        Ok(case)
    }

    /// A model with large weights that mean nothing, as `org/large`.
    fn with_large() -> Result<Self> {
        let case = Self::new()?;
        let files = [
            ("config.json", Content::of(r#"{"model_type": "llama"}"#)),
            ("tokenizer.json", Content::of("{}")),
            ("model.safetensors", Content::generated(LARGE)),
        ];
        case.fake.add("org/large", files);
        Ok(case)
    }

    fn variables(&self) -> Vec<(String, String)> {
        let home = self.home.path().display().to_string();
        vec![("HF_ENDPOINT".into(), self.fake.endpoint()), ("HF_HOME".into(), home)]
    }

    async fn serve(&self, arguments: &[&str], more: &[(&str, &str)]) -> Result<Stack> {
        let own = self.variables();
        let own = own.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        Stack::start_with(arguments, &own.chain(more.iter().copied()).collect::<Vec<_>>()).await
    }

    /// Runs a launcher that is expected to end by itself, and returns whether it succeeded and all it printed.
    async fn run(&self, mut command: Command) -> Result<(bool, String)> {
        command.envs(self.variables());
        let output = tokio::time::timeout(PATIENCE, command.output()).await.context("it does not end")??;
        Ok((output.status.success(), String::from_utf8([output.stdout, output.stderr].concat())?))
    }

    /// Starts `download-weights` with its log in a file.
    fn download(&self, log: &str) -> Result<(Child, PathBuf)> {
        let log = self.home.path().join(log);
        let output = fs::File::create(&log)?;
        let mut command = download_command("org/large");
        command.envs(self.variables()).stdout(output.try_clone()?).stderr(output);
        Ok((command.spawn()?, log))
    }

    fn repository(&self, folder: &str) -> PathBuf {
        self.home.path().join("hub").join(folder)
    }

    fn weights(&self) -> PathBuf {
        self.repository("models--org--large").join("snapshots").join(COMMIT).join("model.safetensors")
    }

    fn partial(&self) -> PathBuf {
        let name = format!("{}.incomplete", Content::generated(LARGE).etag());
        self.repository("models--org--large").join("blobs").join(name)
    }

    /// Waits until all that comes before the stall is on the disk, and says how much that is.
    async fn stalled(&self) -> Result<u64> {
        let expected = STALL / (4 << 20) * (4 << 20);
        until(|| fs::metadata(self.partial()).is_ok_and(|metadata| metadata.len() == expected)).await?;
        Ok(expected)
    }

    /// Where the ranges of the weights began that were asked for.
    fn range_starts(&self) -> Result<Vec<u64>> {
        let seen = self.fake.seen().into_iter().filter(|seen| seen.elsewhere && seen.method == "GET");
        let start = |range: &str| range.strip_prefix("bytes=")?.split('-').next()?.parse().ok();
        seen.map(|seen| seen.header("range").and_then(start).context("a range")).collect()
    }
}

fn download_command(id: &str) -> Command {
    let mut command = Command::new(binary::launcher());
    command.env_clear().args(["download-weights", id]).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Waits until something is so.
async fn until(is_so: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !is_so() {
        ensure!(begin.elapsed() < PATIENCE, "it does not become so");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn is_right(path: &Path) -> Result<bool> {
    let found = fs::read(path)?;
    let content = Content::generated(LARGE);
    let mut expected = vec![0; found.len()];
    Ok(found.len() as u64 == LARGE && content.fill(0, &mut expected) == found.len() && found == expected)
}

async fn generated_ids(stack: &Stack, prompt: &fixtures::Prompt, count: u32) -> Result<Vec<u32>> {
    let answer = stack.greedy(&prompt.text, count).await?;
    let tokens = answer["details"]["tokens"].as_array().context("tokens")?;
    tokens.iter().map(|token| Ok(u32::try_from(token["id"].as_u64().context("an id")?)?)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_by_its_id_and_then_without_the_network() -> Result<()> {
    let case = Case::with_llama()?;
    let expected = fixtures::expected("llama")?;
    let mut asked = 0;
    for more in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
        let stack = case.serve(&["--model-id", "org/llama"], more).await?;
        let prompt = &expected.prompts[0];
        assert_eq!(generated_ids(&stack, prompt, expected.max_new_tokens).await?, prompt.generated_ids);
        assert_eq!(stack.client().get("/info").await?.json()?["model_id"], "org/llama");
        let log = stack.log()?;
        assert_eq!(log.contains("Successfully downloaded weights for org/llama"), more.is_empty(), "{log}");
        let before = std::mem::replace(&mut asked, case.fake.seen().len());
        assert!(more.is_empty() || asked == before, "offline, nothing is asked");
    }
    assert!(!case.fake.seen().iter().any(|seen| seen.path.contains("README")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_come_from_a_flat_directory_when_one_is_given() -> Result<()> {
    let case = Case::with_llama()?;
    let mut command = command(free_address()?);
    let weights = fixtures::directory("llama");
    let weights = weights.to_str().context("a path in UTF-8")?;
    command.args(["--model-id", "org/llama", "--weights-cache-override", weights, "--plan", "--json-output"]);
    let (succeeded, text) = case.run(command).await?;
    assert!(succeeded, "{text}");
    let plan: Value = serde_json::from_str(&text)?;
    for child in ["download", "shard-0"] {
        let arguments = plan["commands"][child]["arguments"].as_array().context("arguments")?;
        let place = arguments.iter().position(|word| word == "--weights-cache-override").context(child)?;
        assert_eq!(arguments[place + 1], weights);
    }
    assert!(
        plan["values"]["weights-memory"]["value"].as_u64().is_some_and(|bytes| bytes > 100_000),
        "{text}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_fetches_config_json_and_nothing_else() -> Result<()> {
    let case = Case::with_large()?;
    let mut launcher = command(free_address()?);
    launcher.args(["--model-id", "org/large", "--revision", "v1.0", "--plan", "--json-output"]);
    let (succeeded, text) = case.run(launcher).await?;
    assert!(succeeded, "{text}");
    let plan: Value = serde_json::from_str(&text)?;
    assert_eq!(plan["values"]["weights-memory"]["value"], json!(LARGE));
    let snapshot = case.repository("models--org--large").join("snapshots").join(COMMIT);
    assert_eq!(plan["values"]["model-directory"]["value"], json!(snapshot));
    assert_eq!(plan["commands"]["shard-0"]["arguments"][4], json!(snapshot));
    let fetched: Vec<String> = fs::read_dir(&snapshot)?
        .map(|entry| Ok(entry?.file_name().display().to_string()))
        .collect::<Result<_>>()?;
    assert_eq!(fetched, ["config.json"]);

    let mut offline = command(free_address()?);
    offline.args(["--model-id", "org/large", "--plan"]).env("HF_HUB_OFFLINE", "true");
    let (succeeded, text) = case.run(offline).await?;
    assert!(!succeeded && text.contains("HF_HUB_OFFLINE") && text.contains("revision `main`"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_hub_refuses_ends_the_launcher_with_one_line() -> Result<()> {
    let case = Case::with_llama()?;
    case.fake.restrict("org/llama", Access::Gated("hf_granted".into()));
    /// Arguments, variables, and what the line says.
    type Row<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Row<'_>; 4] = [
        (&["--model-id", "org/lama"], &[], &["`org/lama`", "spelling"]),
        (&["--model-id", "org/llama", "--revision", "v9"], &[], &["no revision `v9`"]),
        (&["--model-id", "org/llama"], &[("HF_TOKEN", "hf_hush")], &["gated", "/org/llama", "from HF_TOKEN"]),
        (&["--model-id", "org/llama"], &[("HF_ENDPOINT", "nowhere")], &["HF_ENDPOINT `nowhere`"]),
    ];
    for (arguments, variables, expected) in cases {
        let mut launcher = command(free_address()?);
        let own = case.variables();
        launcher.args(arguments).envs(own).envs(variables.iter().copied());
        let output = tokio::time::timeout(PATIENCE, launcher.output()).await??;
        let errors = String::from_utf8(output.stderr)?;
        assert!(
            !output.status.success() && errors.starts_with("Error: ") && errors.lines().count() == 1,
            "{errors}"
        );
        for expected in expected {
            assert!(errors.contains(expected), "no {expected} in {errors}");
        }
        assert!(!errors.contains("hf_hush") && !String::from_utf8(output.stdout)?.contains("hf_hush"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_download_goes_on_where_it_was() -> Result<()> {
    let case = Case::with_large()?;
    case.fake.fail("/large/", Fault::StallAt(STALL), 1);
    let (mut killed, _) = case.download("first")?;
    let written = case.stalled().await?;
    killed.kill().await?;
    assert_eq!(fs::metadata(case.partial())?.len(), written);
    let before = case.range_starts()?.len();

    let (mut second, log) = case.download("second")?;
    let status = tokio::time::timeout(PATIENCE, second.wait()).await??;
    assert!(status.success(), "{}", fs::read_to_string(log)?);
    assert!(is_right(&case.weights())? && !case.partial().exists());
    assert!(case.range_starts()?[before..].iter().all(|start| *start >= written), "nothing came twice");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_share_one_download() -> Result<()> {
    let case = Case::with_large()?;
    case.fake.fail("/large/", Fault::StallAt(STALL), 1);
    let (mut first, first_log) = case.download("first")?;
    case.stalled().await?;
    let (mut second, second_log) = case.download("second")?;
    let is_waiting =
        || fs::read_to_string(&second_log).is_ok_and(|log| log.contains("Waiting for another process"));
    until(is_waiting).await?;
    case.fake.release();
    for (process, log) in [(&mut first, first_log), (&mut second, second_log)] {
        let status = tokio::time::timeout(PATIENCE, process.wait()).await??;
        assert!(status.success(), "{}", fs::read_to_string(log)?);
    }
    assert!(is_right(&case.weights())?);
    let mut starts = case.range_starts()?;
    let count = starts.len();
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts.len(), count, "each range was asked for once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_holder_leaves_no_lock_behind() -> Result<()> {
    let case = Case::with_large()?;
    case.fake.fail("/large/", Fault::StallAt(STALL), 1);
    let (mut first, _) = case.download("first")?;
    case.stalled().await?;
    let (mut second, log) = case.download("second")?;
    until(|| fs::read_to_string(&log).is_ok_and(|log| log.contains("Waiting for another process"))).await?;
    first.kill().await?;
    let status = tokio::time::timeout(PATIENCE, second.wait()).await??;
    assert!(status.success(), "{}", fs::read_to_string(log)?);
    assert!(is_right(&case.weights())?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_during_the_download_ends_the_launcher_cleanly() -> Result<()> {
    let case = Case::with_large()?;
    case.fake.fail("/large/", Fault::StallAt(STALL), 1);
    let mut launcher = command(free_address()?);
    launcher.args(["--model-id", "org/large"]).envs(case.variables());
    launcher.stdout(Stdio::null()).stderr(Stdio::null());
    let mut launcher = launcher.spawn()?;
    let pid = Pid::from_raw(launcher.id().context("it runs")?.try_into()?);
    let written = case.stalled().await?;
    let download = children(pid)?;
    assert_eq!(download.len(), 1, "nothing but the download runs");
    kill(pid, Signal::SIGTERM)?;
    let status = tokio::time::timeout(PATIENCE, launcher.wait()).await??;
    assert!(status.success(), "{status}");
    gone(&download).await?;
    assert_eq!(fs::metadata(case.partial())?.len(), written, "what has come stays");
    Ok(())
}

/// With a limit for the size of files, which any user can set: writing fails in the middle as it does on a full disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_fit_is_named_with_its_directory_and_stays_for_later() -> Result<()> {
    let case = Case::with_large()?;
    let mut shell = Command::new("/bin/sh");
    // The unit of `ulimit -f` is 512 bytes or 1 KiB, so this is 10 or 20 MiB.
    shell.env_clear().args(["-c", r#"trap '' XFSZ; ulimit -f 20480; exec "$0" download-weights org/large"#]);
    shell.arg(binary::launcher()).stdin(Stdio::null()).kill_on_drop(true);
    let (succeeded, text) = case.run(shell).await?;
    assert!(!succeeded, "{text}");
    let blobs = case.repository("models--org--large").join("blobs");
    for expected in ["not enough space in", &blobs.display().to_string(), "model.safetensors needs"] {
        assert!(text.contains(expected), "no {expected} in {text}");
    }
    let written = fs::metadata(case.partial())?.len();
    assert!((4 << 20..LARGE).contains(&written), "{written}");

    let (succeeded, text) = case.run(download_command("org/large")).await?;
    assert!(succeeded && is_right(&case.weights())?, "{text}");
    Ok(())
}

/// On a small file system in memory, where this process may make one.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_beforehand_and_when_it_happens() -> Result<()> {
    let case = Case::with_large()?;
    let disk = case.home.path().join("hub");
    fs::create_dir(&disk)?;
    let mount = |size: &str| {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(&disk).stderr(Stdio::null()).status()
    };
    if !mount("size=64m").is_ok_and(|status| status.success()) {
        eprintln!("this process may not mount file systems: left out");
        return Ok(());
    }
    let _unmount = Unmount(&disk);

    let (succeeded, text) = case.run(download_command("org/large")).await?;
    assert!(
        !succeeded && text.contains("not enough space in") && text.contains("`org/large` needs"),
        "{text}"
    );
    assert_eq!(case.range_starts()?, Vec::<u64>::new(), "nothing was begun");

    ensure!(mount("remount,size=100m")?.success());
    case.fake.fail("/large/", Fault::StallAt(STALL), 1);
    let (mut download, log) = case.download("log")?;
    let written = case.stalled().await?;
    // Another program fills the disk meanwhile.
    fs::write(disk.join("other"), vec![0; 40 << 20])?;
    case.fake.release();
    let status = tokio::time::timeout(PATIENCE, download.wait()).await??;
    let text = fs::read_to_string(log)?;
    assert!(
        !status.success() && text.contains("not enough space in") && text.contains("model.safetensors"),
        "{text}"
    );
    assert!(fs::metadata(case.partial())?.len() > written);

    fs::remove_file(disk.join("other"))?;
    let (succeeded, text) = case.run(download_command("org/large")).await?;
    assert!(succeeded && is_right(&case.weights())?, "{text}");
    Ok(())
}

/// Takes a file system away at the end.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        // Nothing is left to be done when this fails; the test has its result.
        let _ = std::process::Command::new("umount").arg(self.0).status();
    }
}
