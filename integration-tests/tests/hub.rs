//! Downloads from a Hub on loopback that does everything wrong that a Hub and the way to it can do wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hub::{Hub, HubConfig, HubError, Order, Patience, Proxies, Source, Token, WeightPlace};
use integration_tests::fake_hub::{Access, COMMIT, Content, FakeHub, Fault};

/// A Hub, and a cache of its own.
struct Case {
    fake: FakeHub,
    cache: tempfile::TempDir,
    config: HubConfig,
}

impl Case {
    fn new() -> Result<Self> {
        let (fake, cache) = (FakeHub::start()?, tempfile::tempdir()?);
        let config = HubConfig {
            endpoint: fake.endpoint(),
            token: None,
            cache: cache.path().to_owned(),
            offline: false,
            proxies: Proxies::default(),
            certificates: Vec::new(),
            origin: None,
            patience: Patience { pause: Duration::from_millis(1), ..Patience::default() },
        };
        Ok(Self { fake, cache, config })
    }

    /// A Hub with a small model.
    fn with_model() -> Result<Self> {
        let case = Self::new()?;
        case.fake.add("org/model", model(&[]));
        Ok(case)
    }

    fn hub(&self) -> Result<Hub> {
        Ok(Hub::new(self.config.clone())?)
    }

    fn fetch(&self, id: &str) -> Result<PathBuf, HubError> {
        self.fetch_at(id, None)
    }

    fn fetch_at(&self, id: &str, revision: Option<&str>) -> Result<PathBuf, HubError> {
        Hub::new(self.config.clone())?.fetch(&Source::new(id, revision)?, &Order::default())
    }

    fn repository(&self) -> PathBuf {
        self.cache.path().join("models--org--model")
    }

    /// Requests for files and their contents: method, and what of a file was asked for.
    fn transfers(&self, part: &str) -> Vec<String> {
        let seen =
            self.fake.seen().into_iter().filter(|seen| seen.method == "GET" && seen.path.contains(part));
        seen.map(|seen| seen.header("range").unwrap_or("all").to_owned()).collect()
    }
}

fn model(more: &[(&str, Content)]) -> Vec<(String, Content)> {
    let files = [
        ("config.json", Content::of(r#"{"model_type": "llama"}"#)),
        ("tokenizer.json", Content::of("{}")),
        ("README.md", Content::of("not needed")),
        ("onnx/model.onnx", Content::of("not needed")),
        ("model.safetensors", Content::of("weights")),
    ];
    files.iter().chain(more).map(|(name, content)| ((*name).to_owned(), content.clone())).collect()
}

/// A model whose weights are one generated file.
fn large_model(length: u64) -> Vec<(String, Content)> {
    let mut files = model(&[]);
    files.retain(|(name, _)| name != "model.safetensors");
    files.push(("model.safetensors".to_owned(), Content::generated(length)));
    files
}

fn is_equal(path: &Path, content: &Content) -> Result<bool> {
    let found = fs::read(path)?;
    let mut expected = vec![0; found.len()];
    Ok(found.len() as u64 == content.length()
        && content.fill(0, &mut expected) == found.len()
        && expected == found)
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().into_string().ok().context("a name in UTF-8")?);
    }
    names.sort();
    Ok(names)
}

#[test]
fn a_model_is_fetched_into_pythons_layout_without_what_is_not_needed() -> Result<()> {
    let case = Case::with_model()?;
    let template = ("additional_chat_templates/tool_use.jinja", Content::of("{{ tools }}"));
    case.fake.add("org/model", model(&[template]));
    let directory = case.fetch("org/model")?;

    assert_eq!(directory, case.repository().join("snapshots").join(COMMIT));
    let expected = ["additional_chat_templates", "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&directory)?, expected);
    assert_eq!(
        fs::read_to_string(directory.join("additional_chat_templates/tool_use.jinja"))?,
        "{{ tools }}"
    );
    assert_eq!(fs::read_to_string(case.repository().join("refs/main"))?, COMMIT);
    let link = fs::read_link(directory.join("model.safetensors"))?;
    assert_eq!(link, Path::new("../../blobs").join(Content::of("weights").etag()));
    Ok(())
}

#[test]
fn what_is_there_is_not_fetched_again() -> Result<()> {
    let case = Case::with_model()?;
    case.fetch("org/model")?;
    let before = case.fake.seen().len();
    case.fetch("org/model")?;
    assert_eq!(case.fake.seen().len(), before + 1, "the list of files is all that is asked for");
    Ok(())
}

#[test]
fn an_index_says_which_weights_are_fetched() -> Result<()> {
    let case = Case::new()?;
    let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
    case.fake.add(
        "org/model",
        [
            ("config.json", Content::of("{}")),
            ("model.safetensors.index.json", Content::of(index)),
            ("1.safetensors", Content::of("one")),
            ("2.safetensors", Content::of("two")),
            ("consolidated.safetensors", Content::of("the same once more")),
        ],
    );
    let directory = case.fetch("org/model")?;
    let expected = ["1.safetensors", "2.safetensors", "config.json", "model.safetensors.index.json"];
    assert_eq!(names(&directory)?, expected);
    Ok(())
}

#[test]
fn revisions_of_every_kind_are_found() -> Result<()> {
    let case = Case::with_model()?;
    for revision in ["v1.0", "refs/pr/1", COMMIT] {
        let directory = case.fetch_at("org/model", Some(revision))?;
        assert!(directory.join("model.safetensors").is_file(), "{revision}");
    }
    assert_eq!(fs::read_to_string(case.repository().join("refs/refs/pr/1"))?, COMMIT);
    assert!(!case.repository().join("refs").join(COMMIT).exists(), "a commit needs no name");
    Ok(())
}

#[test]
fn a_gigabyte_cut_at_ten_places_is_still_right() -> Result<()> {
    let case = Case::new()?;
    let length = 1_000_000_007;
    case.fake.add("org/model", large_model(length));
    for place in 0..10 {
        case.fake.fail("/large/", Fault::CutAt(place * 100_000_000 + 12_345), 1);
    }
    let begin = Instant::now();
    // The checksum, which is a sha256 of all bytes, has been compared when this returns.
    let directory = case.fetch("org/model")?;
    assert_eq!(case.fake.faults_left(), 0, "ten cuts happened");
    assert_eq!(fs::metadata(directory.join("model.safetensors"))?.len(), length);
    assert!(begin.elapsed() < Duration::from_secs(50), "it took {:?}", begin.elapsed());

    // Nothing came twice: what the ranges asked for beyond the file's length is what the cuts left to be asked for again.
    let ranges = case.transfers("/large/");
    let asked: u64 = ranges
        .iter()
        .map(|range| {
            let (from, to) =
                range.strip_prefix("bytes=").and_then(|range| range.split_once('-')).context("a range")?;
            anyhow::Ok(to.parse::<u64>()? + 1 - from.parse::<u64>()?)
        })
        .sum::<Result<u64>>()?;
    assert!(asked < length + 10 * (16 << 20), "{asked} bytes were asked for");
    Ok(())
}

#[test]
fn a_large_file_comes_over_several_connections_from_the_other_server_without_the_token() -> Result<()> {
    let mut case = Case::new()?;
    case.config.token = Some(Token::new("hf_secret", "HF_TOKEN")?);
    let content = Content::generated(50 << 20);
    case.fake.add("org/model", large_model(50 << 20));
    let directory = case.fetch("org/model")?;
    assert!(is_equal(&directory.join("model.safetensors"), &content)?);

    let seen = case.fake.seen();
    assert!(seen.iter().filter(|seen| seen.elsewhere).count() > 8);
    for seen in seen {
        let expected = if seen.elsewhere { None } else { Some("Bearer hf_secret") };
        assert_eq!(seen.header("authorization"), expected, "{} {}", seen.method, seen.path);
    }
    Ok(())
}

#[test]
fn a_download_goes_on_where_an_earlier_one_was_left() -> Result<()> {
    let case = Case::new()?;
    let content = Content::generated(30 << 20);
    case.fake.add("org/model", large_model(30 << 20));
    let mut beginning = vec![0; 20 << 20];
    content.fill(0, &mut beginning);
    fs::create_dir_all(case.repository().join("blobs"))?;
    fs::write(case.repository().join("blobs").join(format!("{}.incomplete", content.etag())), beginning)?;

    let directory = case.fetch("org/model")?;
    assert!(is_equal(&directory.join("model.safetensors"), &content)?);
    for range in case.transfers("/large/") {
        let from: u64 = range.trim_start_matches("bytes=").split('-').next().context("a start")?.parse()?;
        assert!(from >= 20 << 20, "{range} was there already");
    }
    assert!(names(&case.repository().join("blobs"))?.iter().all(|name| !name.ends_with(".incomplete")));
    Ok(())
}

#[test]
fn small_files_that_are_cut_go_on_too() -> Result<()> {
    let case = Case::new()?;
    case.fake.add("org/model", model(&[("merges.txt", Content::generated(500_000))]));
    case.fake.fail("/cached/org/model/merges.txt", Fault::CutAt(300_000), 1);
    let directory = case.fetch("org/model")?;
    assert!(is_equal(&directory.join("merges.txt"), &Content::generated(500_000))?);
    let transfers = case.transfers("/cached/org/model/merges.txt");
    assert_eq!(transfers[0], "all");
    assert!(transfers[1].ends_with("-499999") && transfers[1] != "bytes=0-499999", "{transfers:?}");
    Ok(())
}

#[test]
fn a_server_without_ranges_or_lengths_will_do() -> Result<()> {
    for (fault, times) in [(Fault::NoRanges, 100), (Fault::NoLength, 100)] {
        let case = Case::new()?;
        case.fake.add("org/model", large_model(20 << 20));
        case.fake.fail("/large/", fault.clone(), times);
        case.fake.fail("/cached/", fault.clone(), times);
        let directory = case.fetch("org/model").with_context(|| format!("{fault:?}"))?;
        assert!(is_equal(&directory.join("model.safetensors"), &Content::generated(20 << 20))?);
    }
    Ok(())
}

#[test]
fn links_that_expire_are_asked_for_anew() -> Result<()> {
    let case = Case::new()?;
    case.fake.add("org/model", large_model(60 << 20));
    // Old signatures are refused like this, the first ones and some in the middle.
    case.fake.fail("/large/", Fault::Status(403, Vec::new()), 2);
    case.fake.fail("/large/", Fault::CutAt(50 << 20), 1);
    let directory = case.fetch("org/model")?;
    assert!(is_equal(&directory.join("model.safetensors"), &Content::generated(60 << 20))?);
    assert_eq!(case.fake.faults_left(), 0);
    Ok(())
}

#[test]
fn servers_that_are_busy_or_broken_are_asked_again_when_they_say() -> Result<()> {
    let case = Case::with_model()?;
    let after = |seconds: &str| vec![("retry-after".to_owned(), seconds.to_owned())];
    case.fake.fail("/revision/", Fault::Status(429, after("1")), 1);
    case.fake.fail("/resolve/", Fault::Status(503, Vec::new()), 3);
    case.fake.fail("/cached/", Fault::Status(500, Vec::new()), 2);
    let begin = Instant::now();
    case.fetch("org/model")?;
    assert!(begin.elapsed() >= Duration::from_secs(1), "the server asked for a second");
    assert_eq!(case.fake.faults_left(), 0);
    Ok(())
}

#[test]
fn a_server_that_stays_broken_is_given_up_with_its_address_and_the_reason() -> Result<()> {
    let case = Case::with_model()?;
    case.fake.fail("/cached/org/model/config.json", Fault::Status(502, Vec::new()), usize::MAX);
    let error = case.fetch("org/model").unwrap_err().to_string();
    for expected in [case.fake.endpoint().as_str(), "config.json", "status 502", "attempts in a row: 6"] {
        assert!(error.contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn wrong_bytes_are_noticed_and_fetched_once_more() -> Result<()> {
    let case = Case::new()?;
    case.fake.add("org/model", large_model(3 << 20));
    case.fake.fail("/large/", Fault::WrongByte(1_000_000), 1);
    let directory = case.fetch("org/model")?;
    assert!(is_equal(&directory.join("model.safetensors"), &Content::generated(3 << 20))?);
    assert_eq!(case.transfers("/large/").len(), 2);
    Ok(())
}

#[test]
fn bytes_that_stay_wrong_are_an_error_that_names_file_and_sums() -> Result<()> {
    let cases = [
        ("/large/", "model.safetensors", "sha256"),
        ("/cached/org/model/config.json", "config.json", "git sha1"),
    ];
    for (part, file, algorithm) in cases {
        let case = Case::new()?;
        let files = large_model(3 << 20);
        let expected = files.iter().find(|(name, _)| name == file).context("the file")?.1.etag();
        case.fake.add("org/model", files);
        case.fake.fail(part, Fault::WrongByte(5), usize::MAX);
        let error = case.fetch("org/model").unwrap_err();
        let HubError::Checksum { found, .. } = &error else { panic!("{error}") };
        assert_ne!(*found, expected);
        let text = error.to_string();
        assert!(text.contains(file) && text.contains(algorithm) && text.contains(&expected), "{text}");
        let blobs = names(&case.repository().join("blobs"))?;
        assert!(!blobs.iter().any(|name| name.starts_with(&expected)), "{blobs:?} holds what is wrong");
    }
    Ok(())
}

#[test]
fn gated_private_and_unknown_repositories_are_explained() -> Result<()> {
    let mut case = Case::with_model()?;
    let endpoint = case.fake.endpoint();
    let check = |case: &Case, id: &str, revision: Option<&str>, expected: &[&str]| {
        let error = case.fetch_at(id, revision).unwrap_err().to_string();
        for expected in expected {
            assert!(error.contains(expected), "no {expected} in: {error}");
        }
        assert!(!error.contains("hf_mine") && error.lines().count() == 1, "{error}");
    };
    let ask = format!("{endpoint}/org/model");
    check(&case, "org/modle", None, &["`org/modle`", "spelling", "private", "no token was found"]);
    check(&case, "org/model", Some("v9"), &["`org/model`", "no revision `v9`"]);

    case.fake.restrict("org/model", Access::Gated("hf_granted".into()));
    check(&case, "org/model", None, &["gated", &ask, "no token was found"]);
    case.config.token = Some(Token::new("hf_mine", "HF_TOKEN")?);
    check(&case, "org/model", None, &["gated", &ask, "the token from HF_TOKEN was used"]);
    case.fake.restrict("org/model", Access::Private("hf_granted".into()));
    check(&case, "org/model", None, &["no model `org/model`", "the token from HF_TOKEN was used"]);

    case.config.token = Some(Token::new("hf_granted", "HF_TOKEN")?);
    case.fetch("org/model")?;
    Ok(())
}

#[test]
fn a_list_that_leads_out_of_the_cache_is_refused() -> Result<()> {
    let bodies = [
        r#"{"sha": "0123", "siblings": [{"rfilename": "../../../etc/passwd"}]}"#,
        r#"{"sha": "0123", "siblings": [{"rfilename": "/etc/passwd"}]}"#,
        r#"{"sha": "../..", "siblings": []}"#,
        r#"{"siblings": []}"#,
        "<html>a login page</html>",
    ];
    for body in bodies {
        let case = Case::with_model()?;
        case.fake.fail("/revision/", Fault::Body(body.into()), 1);
        let error = case.fetch("org/model").unwrap_err();
        assert!(matches!(error, HubError::BadAnswer { .. }), "{body}: {error}");
        assert_eq!(names(case.cache.path())?, Vec::<String>::new());
    }
    Ok(())
}

#[test]
fn a_repository_without_weights_says_so() -> Result<()> {
    let case = Case::new()?;
    case.fake.add("org/model", [("config.json", Content::of("{}")), ("model.onnx", Content::of("x"))]);
    let error = case.fetch("org/model").unwrap_err().to_string();
    assert!(error.contains("`org/model`") && error.contains(".safetensors, .bin or .pt"), "{error}");
    Ok(())
}

#[test]
fn an_adapter_is_fetched_as_one_and_is_no_model() -> Result<()> {
    let case = Case::with_model()?;
    let config = r#"{"base_model_name_or_path": "org/base"}"#;
    case.fake.add(
        "org/adapter",
        [
            ("adapter_config.json", Content::of(config)),
            ("adapter_model.safetensors", Content::of("ab")),
            ("optimizer.safetensors", Content::of("not needed")),
        ],
    );
    let directory = case.hub()?.fetch_adapter("org/adapter@v1.0", &Order::default())?;
    assert_eq!(names(&directory)?, ["adapter_config.json", "adapter_model.safetensors"]);

    let error = case
        .hub()?
        .survey_model(&Source::parse("org/adapter")?, &WeightPlace::Repository)
        .unwrap_err()
        .to_string();
    assert!(error.contains("a LoRA adapter of `org/base`") && error.contains("--lora-adapters"), "{error}");
    let error = case.hub()?.fetch_adapter("org/model", &Order::default()).unwrap_err().to_string();
    assert!(error.contains("`org/model` is not a LoRA adapter"), "{error}");
    Ok(())
}

#[test]
fn offline_nothing_is_asked_and_what_is_missing_is_named() -> Result<()> {
    let mut case = Case::with_model()?;
    case.config.offline = true;
    let error = case.fetch("org/model").unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("revision `main`"), "{error}");
    assert_eq!(case.fake.seen().len(), 0);

    case.config.offline = false;
    let directory = case.fetch("org/model")?;
    let asked = case.fake.seen().len();
    case.config.offline = true;
    assert_eq!(case.fetch("org/model")?, directory);
    fs::remove_file(directory.join("model.safetensors"))?;
    let error = case.fetch("org/model").unwrap_err().to_string();
    assert!(error.contains("missing: weights (*.safetensors)"), "{error}");
    let error = case.fetch_at("org/model", Some("v1.0")).unwrap_err().to_string();
    assert!(error.contains("revision `v1.0`"), "an uncached revision is never replaced by another: {error}");
    assert_eq!(case.fake.seen().len(), asked);
    Ok(())
}

#[test]
fn a_hub_that_cannot_be_reached_is_done_without_when_the_cache_is_complete() -> Result<()> {
    let mut case = Case::with_model()?;
    case.config.patience = Patience::default();
    let directory = case.fetch("org/model")?;
    // A port that nobody listens on any more.
    case.config.endpoint = format!("http://{}", integration_tests::stack::free_address()?);
    let begin = Instant::now();
    assert_eq!(case.fetch("org/model")?, directory);
    case.config.endpoint = case.fake.endpoint();
    case.fake.fail("/revision/", Fault::Status(503, Vec::new()), 1);
    assert_eq!(case.fetch("org/model")?, directory);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    Ok(())
}

#[test]
fn weights_that_lie_elsewhere_are_not_fetched_and_missing_ones_are_named() -> Result<()> {
    let case = Case::with_model()?;
    let elsewhere = tempfile::tempdir()?;
    let order = Order { weights: WeightPlace::Directory(elsewhere.path().to_owned()), ..Order::default() };
    let source = Source::parse("org/model")?;
    let error = case.hub()?.fetch(&source, &order).unwrap_err().to_string();
    assert!(
        error.contains("--weights-cache-override") && error.contains("missing: model.safetensors"),
        "{error}"
    );
    fs::write(elsewhere.path().join("model.safetensors"), "weights")?;
    let directory = case.hub()?.fetch(&source, &order)?;
    assert_eq!(names(&directory)?, ["config.json", "tokenizer.json"]);

    let mut case = case;
    case.config.offline = true;
    case.hub()?.fetch(&source, &order)?;
    let without = Order { weights: WeightPlace::Nowhere, ..Order::default() };
    case.hub()?.fetch(&source, &without)?;
    assert!(case.fetch("org/model").is_err(), "of itself the cache is not complete");
    Ok(())
}

#[test]
fn too_little_space_is_said_before_anything_is_fetched() -> Result<()> {
    let case = Case::new()?;
    let mut files = model(&[]);
    files.retain(|(name, _)| name != "model.safetensors");
    case.fake.add("org/model", files.into_iter().chain([("model.safetensors".to_owned(), Content::of("w"))]));
    let huge = vec![
        ("x-linked-size".to_owned(), (1_u64 << 60).to_string()),
        ("etag".to_owned(), format!("\"{}\"", "a0".repeat(32))),
    ];
    case.fake.fail(
        "/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors",
        Fault::Status(200, huge),
        1,
    );
    let error = case.fetch("org/model").unwrap_err().to_string();
    let blobs = case.repository().join("blobs");
    assert!(error.contains(&blobs.display().to_string()) && error.contains("are available"), "{error}");
    assert_eq!(case.transfers("/cached/").len(), 0);
    Ok(())
}
