use std::io::Read;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::Gpus;
use super::rank::{Exercise, Found, Task};
use super::threads::not_done;

/// How long a rank may take to notice that the other is gone.
const GRACE: Duration = Duration::from_secs(10);

/// What is told of a process's errors, in bytes.
const ERRORS_MAX: usize = 600;

/// What each of two processes has found. They are this program, and are gone when this returns.
pub(super) fn run(exercise: Exercise, gpus: Gpus) -> anyhow::Result<Vec<Result<Found, String>>> {
    let directory = tempfile::tempdir().context("a directory where ranks meet")?;
    let program = std::env::current_exe().context("where this program is")?;
    let command = |task: Task| {
        let mut command = Command::new(&program);
        command.args(["doctor", "--gpu", "--as-rank", &serde_json::to_string(&task)?]);
        anyhow::Ok(command)
    };
    let commands = Task::of_all(exercise, gpus, directory.path()).into_iter().map(command);
    let told = watch(commands.collect::<anyhow::Result<_>>()?, exercise.limit, GRACE);
    let found = told.into_iter().map(|told| {
        let told = told?;
        serde_json::from_str(told.trim()).map_err(|error| format!("an answer that is none: {error}"))
    });
    Ok(found.collect())
}

/// Runs all of them, for so long; when one ends with an error, the others for a moment more. What each has written to its
/// standard output.
fn watch(commands: Vec<Command>, limit: Duration, grace: Duration) -> Vec<Result<String, String>> {
    let (ended, ends) = mpsc::channel();
    let count = commands.len();
    let mut children = Vec::new();
    for (rank, command) in commands.into_iter().enumerate() {
        match Child::start(rank, command, &ended) {
            Ok(child) => children.push(child),
            // Those that have started end with `children`.
            Err(error) => return vec![Err(format!("process of rank {rank}: {error}")); count],
        }
    }
    let mut results: Vec<Option<Result<String, String>>> = vec![None; count];
    let mut deadline = Instant::now() + limit;
    while results.iter().any(Option::is_none) {
        let Ok(end) = ends.recv_timeout(deadline.saturating_duration_since(Instant::now())) else { break };
        let End { rank, out, errors } = end;
        let result = children[rank].result(out, &errors);
        if result.is_err() {
            deadline = deadline.min(Instant::now() + grace);
        }
        results[rank] = Some(result);
    }
    drop(children);
    let ended = || format!("{}, and was ended", not_done(limit));
    results.into_iter().map(|result| result.unwrap_or_else(|| Err(ended()))).collect()
}

/// A process that does not outlive this.
struct Child(process::Child);

/// What a process has written, all of it.
struct End {
    rank: usize,
    out: String,
    errors: String,
}

impl Child {
    /// Starts it. `ended` is told when it has closed its outputs, as its end does.
    fn start(rank: usize, mut command: Command, ended: &Sender<End>) -> std::io::Result<Self> {
        // The input stays open as long as this is there.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Self(command.spawn()?);
        let (out, errors, ended) = (child.0.stdout.take(), child.0.stderr.take(), ended.clone());
        thread::Builder::new().name(format!("output of rank {rank}")).spawn(move || {
            let errors = thread::spawn(move || text_of(errors));
            let out = text_of(out);
            let errors = errors.join().unwrap_or_default();
            // Nobody is left to be told when it is late.
            drop(ended.send(End { rank, out, errors }));
        })?;
        Ok(child)
    }

    /// Once it has ended.
    fn result(&mut self, out: String, errors: &str) -> Result<String, String> {
        let status = self.0.wait().map_err(|error| format!("its end is not known: {error}"))?;
        if status.success() { Ok(out) } else { Err(reason(status, errors)) }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself. Afterwards nothing is left of it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text_of(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    // What has come until an error is all there is.
    let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last words of a process that has failed.
fn reason(status: ExitStatus, errors: &str) -> String {
    let errors: Vec<&str> = errors.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let errors = errors.join("; ");
    let start = errors.ceil_char_boundary(errors.len().saturating_sub(ERRORS_MAX));
    match &errors[start..] {
        "" => status.to_string(),
        last => format!("{status}: {last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// Whether a process is there, running or not reaped.
    fn exists(pid: &str) -> bool {
        std::path::Path::new("/proc").join(pid.trim()).exists()
    }

    #[test]
    fn what_processes_write_is_what_they_have_found() {
        let results = watch(vec![shell("echo one"), shell("echo two")], LONG, LONG);
        assert_eq!(results, [Ok("one\n".to_owned()), Ok("two\n".to_owned())]);
    }

    #[test]
    fn a_process_that_hangs_is_ended_and_reaped() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        // `exec`: the pid is that of the sleeper.
        let hanging = shell(&format!("echo $$ > {}; exec sleep 100000", pid.display()));
        let results = watch(vec![hanging, shell("echo two")], Duration::from_millis(1000), LONG);
        assert_eq!(
            results,
            [Err("not done within 1 seconds, and was ended".to_owned()), Ok("two\n".to_owned())]
        );
        let pid = std::fs::read_to_string(pid).unwrap();
        assert!(!exists(&pid), "process {pid} is still there");
    }

    #[test]
    fn the_failure_of_one_process_ends_the_other_soon_and_is_told_with_its_last_words() {
        let failing = shell("echo a thing >&2; echo is missing >&2; exit 3");
        let results = watch(vec![shell("exec sleep 100000"), failing], LONG, Duration::from_millis(10));
        assert!(results[0].as_ref().unwrap_err().ends_with("and was ended"), "{results:?}");
        assert_eq!(results[1].as_ref().unwrap_err(), "exit status: 3: a thing; is missing");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_of_all() {
        let results = watch(vec![shell("exec sleep 100000"), Command::new("/no/such/program")], LONG, LONG);
        assert!(results.iter().all(|result| result.as_ref().unwrap_err().starts_with("process of rank 1: ")));
    }
}
