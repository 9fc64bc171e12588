//! Supervision, played with shell scripts as shards and router, and the test itself as the router's voice.

use std::fs;
use std::future::Future;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::*;
use crate::plan::{ChildCommand, testing};

const FOREVER: &str = "exec sleep 600";

/// How often the tests look.
const GLANCE: Duration = Duration::from_millis(1);

/// For a play that should have ended long ago.
const PATIENCE: Duration = Duration::from_secs(60);

/// Children that are scripts. The shards call themselves `shard-0`, `shard-1` and so on.
struct Stage {
    directory: TempDir,
    plan: LaunchPlan,
    /// Whether the shards' sockets appear, each when its shard runs, until there is a file `stuck`.
    shards_become_ready: bool,
}

/// What a scene can see and do.
struct Scene {
    directory: PathBuf,
    signals: mpsc::Sender<&'static str>,
}

impl Stage {
    fn new(words: &[&str], shards: &[&str], router: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let count = format!("--num-shard={}", shards.len());
        let mut plan = testing::plan(&[&[count.as_str()], words].concat());
        plan.termination_timeout = Duration::from_secs(5);
        for (shard, script) in plan.shards.iter_mut().zip(shards) {
            shard.socket = directory.path().join(format!("socket-{}", shard.rank));
            shard.command = shell(directory.path(), &format!("shard-{}", shard.rank), script);
        }
        plan.group = directory.path().join("socket-group");
        plan.control = directory.path().join("control");
        plan.router = shell(directory.path(), "router", router);
        Self { directory, plan, shards_become_ready: true }
    }

    fn whose_shards_never_become_ready(self) -> Self {
        Self { shards_become_ready: false, ..self }
    }

    /// Runs until everything has ended and the scene is over.
    fn play<S: Future<Output = ()>>(&self, scene: impl FnOnce(Scene) -> S) -> Result<(), LaunchError> {
        let (sender, names) = mpsc::channel(8);
        let scene = scene(Scene { directory: self.directory.path().to_owned(), signals: sender });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = StopSignals::named(names);
            let supervision = async {
                let outcome = run(&self.plan, &mut signals).await;
                println!("the supervision has ended: {outcome:?}");
                outcome
            };
            tokio::select! {
                (outcome, ()) = async { tokio::join!(supervision, scene) } => outcome,
                () = self.make_sockets() => unreachable!("it goes on forever"),
                () = sleep(PATIENCE) => panic!("the play does not end"),
            }
        })
    }

    /// Runs until everything has ended by itself.
    fn watch(&self) -> String {
        self.play(|_| async {}).expect_err("no signal came").to_string()
    }

    /// What the shards, being scripts, cannot do themselves.
    async fn make_sockets(&self) {
        let mut known = vec![None; self.plan.shards.len()];
        loop {
            sleep(GLANCE).await;
            for (shard, known) in self.plan.shards.iter().zip(&mut known) {
                let pid = read_pid(self.directory.path(), &format!("shard-{}", shard.rank));
                let becomes_ready = self.shards_become_ready && !self.exists("stuck");
                if becomes_ready && pid.is_some() && pid != *known {
                    // Nobody listens any more when this one dies. If there is a file, that is as good.
                    let _ = UnixListener::bind(&shard.socket);
                    *known = pid;
                }
            }
        }
    }

    fn exists(&self, file: &str) -> bool {
        self.directory.path().join(file).exists()
    }

    fn starts(&self, name: &str) -> usize {
        starts(self.directory.path(), name)
    }

    #[track_caller]
    fn check_that_all_have_ended(&self) {
        let shards = self.plan.shards.iter().map(|shard| format!("shard-{}", shard.rank));
        for name in shards.chain(["router".to_owned()]) {
            let pid = read_pid(self.directory.path(), &name).unwrap();
            assert!(has_ended(pid), "{name}");
        }
        for shard in &self.plan.shards {
            assert!(!shard.socket.exists());
        }
        assert!(!self.plan.group.exists());
    }
}

impl Scene {
    /// The router's voice.
    async fn connect(&self) -> Voice {
        self.pid("router").await;
        Voice(BufReader::new(UnixStream::connect(self.directory.join("control")).await.unwrap()))
    }

    /// The router's voice, which has said that it is ready.
    async fn ready(&self) -> Voice {
        let mut voice = self.connect().await;
        voice.say("ready").await;
        voice
    }

    /// The process of a child that has been started.
    async fn pid(&self, name: &str) -> Pid {
        self.pid_after(name, None).await
    }

    /// The process of a child that has been started again, since it was `old`.
    async fn pid_after(&self, name: &str, old: impl Into<Option<Pid>>) -> Pid {
        let old = old.into();
        loop {
            match read_pid(&self.directory, name) {
                Some(pid) if Some(pid) != old => return pid,
                _ => sleep(GLANCE).await,
            }
        }
    }

    async fn kill_and_see_again(&self, name: &str) -> Pid {
        let old = self.pid(name).await;
        kill(old, Signal::SIGKILL).unwrap();
        self.pid_after(name, old).await
    }

    async fn file(&self, name: &str) {
        while !self.directory.join(name).exists() {
            sleep(GLANCE).await;
        }
    }

    fn make_file(&self, name: &str) {
        fs::write(self.directory.join(name), "").unwrap();
    }

    async fn terminate(&self) {
        self.signals.send("SIGTERM").await.unwrap();
    }
}

struct Voice(BufReader<UnixStream>);

impl Voice {
    async fn say(&mut self, line: &str) {
        self.0.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    async fn hears(&mut self, expected: &str) {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        assert_eq!(line, format!("{expected}\n"));
    }
}

/// A shell in `directory` that notes its start, writes its process id into the file `name`, and then does as told.
fn shell(directory: &Path, name: &str, script: &str) -> ChildCommand {
    ChildCommand {
        program: PathBuf::from("/bin/sh"),
        // Renamed, so that who sees the file sees the whole number. The word after the script is its `$0`.
        arguments: vec![
            "-c".into(),
            format!(
                r#"cd "$0"; echo >> {name}.starts; echo $$ > {name}.new; mv {name}.new {name}; {script}"#
            )
            .into(),
            directory.into(),
        ],
        variables: Vec::new(),
        removed: Vec::new(),
    }
}

fn read_pid(directory: &Path, name: &str) -> Option<Pid> {
    Some(Pid::from_raw(fs::read_to_string(directory.join(name)).ok()?.trim().parse().unwrap()))
}

fn starts(directory: &Path, name: &str) -> usize {
    fs::read_to_string(directory.join(format!("{name}.starts"))).map_or(0, |text| text.lines().count())
}

/// Whether there is no such process, nor its remains.
fn has_ended(pid: Pid) -> bool {
    kill(pid, None) == Err(Errno::ESRCH)
}

/// A shard that dies when there is a file `die`, by a signal.
const MORTAL: &str = "while ! [ -e die ]; do sleep 0.01; done; kill -9 $$";

#[test]
fn a_shard_that_ends_while_loading_cannot_start_and_there_is_no_router() {
    let stage = Stage::new(&[], &["exit 3"], FOREVER).whose_shards_never_become_ready();
    assert_eq!(stage.watch(), "ShardCannotStart: shard 0 ended with exit code 3 before it was ready");
    assert_eq!((stage.starts("shard-0"), stage.starts("router")), (1, 0));
}

#[test]
fn the_router_waits_for_every_shard() {
    // The last one ends before any is ready, but not before the others run.
    let last = "while ! [ -e shard-0 ] || ! [ -e shard-1 ]; do sleep 0.01; done; exit 4";
    let stage = Stage::new(&[], &[FOREVER, FOREVER, last], FOREVER).whose_shards_never_become_ready();
    assert_eq!(stage.watch(), "ShardCannotStart: shard 2 ended with exit code 4 before it was ready");
    assert_eq!(stage.starts("router"), 0);
    for name in ["shard-0", "shard-1"] {
        assert!(has_ended(read_pid(stage.directory.path(), name).unwrap()), "{name}");
    }
}

#[test]
fn a_router_that_ends_before_it_was_ready_is_a_failed_start() {
    let stage = Stage::new(&[], &[FOREVER], "exit 1");
    assert_eq!(stage.watch(), "WebserverFailed: the webserver ended with exit code 1");
    stage.check_that_all_have_ended();
    assert_eq!((stage.starts("shard-0"), stage.starts("router")), (1, 1));
}

#[test]
fn a_shard_that_dies_before_the_router_was_ready_is_a_failed_start() {
    // As it would in the warm-up.
    let dies = "echo > socket-group; while ! [ -e router ]; do sleep 0.01; done; kill -9 $$";
    let stage = Stage::new(&[], &[FOREVER, dies, FOREVER], FOREVER);
    assert_eq!(stage.watch(), "ShardFailed: shard 1 ended with signal 9 (SIGKILL)");
    stage.check_that_all_have_ended();
    assert_eq!(stage.starts("shard-1"), 1);
}

#[test]
fn a_shard_that_is_killed_runs_again_time_and_again() {
    let stage = Stage::new(&[], &[FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let _voice = scene.ready().await;
        let router = scene.pid("router").await;
        for _ in 0..3 {
            scene.kill_and_see_again("shard-0").await;
        }
        assert_eq!(scene.pid("router").await, router);
        scene.terminate().await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
    assert_eq!((stage.starts("shard-0"), stage.starts("router")), (4, 1));
}

#[test]
fn all_ranks_start_again_without_what_the_dead_ones_left() {
    // The first rank makes the file at which they meet, and notes one that is there already.
    let first = "[ -e socket-group ] && echo > left; echo > socket-group; exec sleep 600";
    let stage = Stage::new(&[], &[first, FOREVER, FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let _voice = scene.ready().await;
        let old = [scene.pid("shard-0").await, scene.pid("shard-1").await, scene.pid("shard-2").await];
        kill(old[1], Signal::SIGKILL).unwrap();
        for (rank, old) in old.into_iter().enumerate() {
            scene.pid_after(&format!("shard-{rank}"), old).await;
        }
        assert!(old.into_iter().all(has_ended));
        scene.terminate().await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
    assert!(!stage.exists("left"));
}

#[test]
fn a_limit_of_restarts_in_a_row_ends_everything_and_the_router_is_told_first() {
    let stage = Stage::new(&["--max-shard-restarts=2"], &[MORTAL], FOREVER);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        scene.make_file("die");
        voice.hears("abandon shard 0 ended with signal 9 (SIGKILL)").await;
        assert!(!has_ended(scene.pid("router").await), "it gets a moment");
    });
    let error = outcome.unwrap_err();
    let line = "ShardFailed: shard 0 ended with signal 9 (SIGKILL), after 2 restarts in a row";
    assert_eq!((error.to_string().as_str(), error.exit_code()), (line, 1));
    stage.check_that_all_have_ended();
    assert_eq!((stage.starts("shard-0"), stage.starts("router")), (3, 1));
}

#[test]
fn a_router_that_gives_up_when_told_to_is_not_started_again() {
    let router = "while ! [ -e told ]; do sleep 0.01; done; exit 1";
    let stage = Stage::new(&["--max-shard-restarts=1"], &[MORTAL], router);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        scene.make_file("die");
        voice.hears("abandon shard 0 ended with signal 9 (SIGKILL)").await;
        scene.make_file("told");
    });
    let line = "ShardFailed: shard 0 ended with signal 9 (SIGKILL), after a restart";
    assert_eq!(outcome.unwrap_err().to_string(), line);
    assert_eq!(stage.starts("router"), 1);
}

#[test]
fn progress_begins_a_new_row() {
    let stage = Stage::new(&["--max-shard-restarts=1"], &[FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        let mut shard = scene.pid("shard-0").await;
        for _ in 0..3 {
            voice.say("progress").await;
            voice.say(&format!("restart {shard} it hangs")).await;
            shard = scene.pid_after("shard-0", shard).await;
        }
        voice.say(&format!("restart {shard} it hangs again")).await;
        voice.hears("abandon shard 0 was given up by the webserver: it hangs again").await;
    });
    let line = "ShardFailed: shard 0 was given up by the webserver: it hangs again, after a restart";
    assert_eq!(outcome.unwrap_err().to_string(), line);
    assert_eq!(stage.starts("shard-0"), 4);
}

#[test]
fn a_shard_that_the_router_gives_up_is_restarted_with_the_others_and_only_once() {
    let stage = Stage::new(&[], &[FOREVER, FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        let (first, second) = (scene.pid("shard-0").await, scene.pid("shard-1").await);
        voice.say(&format!("restart {second} no answer within 60 s")).await;
        let first = scene.pid_after("shard-0", first).await;
        let new = scene.pid_after("shard-1", second).await;
        // The old one is gone; a router that does not know which one it is means one of those that are there.
        voice.say(&format!("restart {second} no answer within 60 s")).await;
        voice.say("nonsense").await;
        voice.say(&format!("restart {new} internal error")).await;
        scene.pid_after("shard-1", new).await;
        scene.pid_after("shard-0", first).await;
        scene.terminate().await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
    assert_eq!((stage.starts("shard-0"), stage.starts("shard-1"), stage.starts("router")), (3, 3, 1));
}

#[test]
fn a_router_that_does_not_know_which_shard_has_failed_has_all_of_them_restarted() {
    let stage = Stage::new(&[], &[FOREVER, FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        let (first, second) = (scene.pid("shard-0").await, scene.pid("shard-1").await);
        voice.say("restart 0 internal error").await;
        scene.pid_after("shard-0", first).await;
        scene.pid_after("shard-1", second).await;
        scene.terminate().await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
}

#[test]
fn a_router_that_dies_after_it_was_ready_is_started_again() {
    let stage = Stage::new(&["--max-shard-restarts=2"], &[FOREVER], FOREVER);
    let outcome = stage.play(|scene| async move {
        let _old = scene.ready().await;
        let shard = scene.pid("shard-0").await;
        let router = scene.kill_and_see_again("router").await;
        // This one is not ready, and yet no failed start.
        kill(router, Signal::SIGKILL).unwrap();
        scene.pid_after("router", router).await;
        let mut voice = scene.ready().await;
        voice.say("progress").await;
        // Said after the progress, so when the shard is there again that has been heard.
        voice.say("restart 0 internal error").await;
        scene.pid_after("shard-0", shard).await;
        for _ in 0..2 {
            scene.kill_and_see_again("router").await;
        }
        kill(scene.pid("router").await, Signal::SIGKILL).unwrap();
    });
    let line = "WebserverFailed: the webserver ended with signal 9 (SIGKILL), after 2 restarts in a row";
    assert_eq!(outcome.unwrap_err().to_string(), line);
    stage.check_that_all_have_ended();
    assert_eq!((stage.starts("shard-0"), stage.starts("router")), (2, 5));
}

#[test]
fn told_to_end_with_its_children_the_launcher_starts_none_again() {
    for words in ["--on-shard-failure=exit", "--max-shard-restarts=0"] {
        let stage = Stage::new(&[words], &[FOREVER], FOREVER);
        let outcome = stage.play(|scene| async move {
            let mut voice = scene.ready().await;
            kill(scene.pid("shard-0").await, Signal::SIGKILL).unwrap();
            voice.hears("abandon shard 0 ended with signal 9 (SIGKILL)").await;
        });
        let line = "ShardFailed: shard 0 ended with signal 9 (SIGKILL)";
        assert_eq!(outcome.unwrap_err().to_string(), line);
        stage.check_that_all_have_ended();

        let stage = Stage::new(&[words], &[FOREVER], FOREVER);
        let outcome = stage.play(|scene| async move {
            let _voice = scene.ready().await;
            kill(scene.pid("router").await, Signal::SIGKILL).unwrap();
        });
        let line = "WebserverFailed: the webserver ended with signal 9 (SIGKILL)";
        assert_eq!(outcome.unwrap_err().to_string(), line);
        stage.check_that_all_have_ended();
        assert_eq!((stage.starts("shard-0"), stage.starts("router")), (1, 1));
    }
}

#[test]
fn a_signal_between_two_restarts_ends_everything() {
    let stage = Stage::new(&[], &[MORTAL], FOREVER);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        scene.make_file("die");
        // The next pause is close to a second.
        while starts(&scene.directory, "shard-0") < 7 {
            sleep(GLANCE).await;
        }
        while !has_ended(scene.pid("shard-0").await) {
            sleep(GLANCE).await;
        }
        scene.terminate().await;
        voice.hears("abandon the server is stopping, and its shards are not ready").await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
    assert!(stage.starts("shard-0") < 10);
}

#[test]
fn a_signal_while_shards_load_again_ends_everything() {
    // It does not end by itself, only the launcher can end it.
    let shard =
        "if [ -e stuck ]; then trap '' TERM; echo > loading; while :; do sleep 1; done; fi; exec sleep 600";
    let mut stage = Stage::new(&[], &[shard], FOREVER);
    stage.plan.termination_timeout = Duration::ZERO;
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        scene.make_file("stuck");
        scene.kill_and_see_again("shard-0").await;
        scene.file("loading").await;
        scene.terminate().await;
        voice.hears("abandon the server is stopping, and its shards are not ready").await;
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
}

#[test]
fn a_router_that_drains_does_not_wait_for_a_shard_that_is_gone() {
    let router = "trap 'echo > draining; while ! [ -e told ]; do sleep 0.01; done; exit 0' TERM; \
        echo > patient; while :; do sleep 0.01; done";
    let stage = Stage::new(&[], &[FOREVER], router);
    let outcome = stage.play(|scene| async move {
        let mut voice = scene.ready().await;
        scene.file("patient").await;
        scene.terminate().await;
        scene.file("draining").await;
        kill(scene.pid("shard-0").await, Signal::SIGKILL).unwrap();
        voice.hears("abandon the server is stopping, and a shard has ended").await;
        scene.make_file("told");
    });
    outcome.unwrap();
    stage.check_that_all_have_ended();
    assert_eq!(stage.starts("shard-0"), 1);
}

#[test]
fn shards_that_cannot_be_started_again_count_as_restarts() {
    let mut stage = Stage::new(&["--max-shard-restarts=2"], &[FOREVER], FOREVER);
    // The program goes away while it runs.
    let program = stage.directory.path().join("sh");
    std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
    stage.plan.shards[0].command.program = program.clone();
    let outcome = stage.play(|scene| async move {
        let _voice = scene.ready().await;
        fs::remove_file(program).unwrap();
        kill(scene.pid("shard-0").await, Signal::SIGKILL).unwrap();
    });
    let line = outcome.unwrap_err().to_string();
    assert!(line.starts_with("ShardFailed: ShardCannotStart: shard 0: No such file"), "{line}");
    assert!(line.ends_with("after 2 restarts in a row"), "{line}");
    stage.check_that_all_have_ended();
}

#[test]
fn of_several_that_have_ended_the_one_that_was_killed_is_named() {
    let exit = |code: i32| Ending::Status(ExitStatus::from_raw(code << 8));
    let killed = || Ending::Status(ExitStatus::from_raw(9));
    let named = |ended| culprit(ended).0;
    assert_eq!(named(vec![(0, exit(1)), (2, killed()), (3, killed())]), 2);
    assert_eq!(named(vec![(1, exit(1)), (2, exit(1))]), 1);
}
