use std::fmt::Display;
use std::io::{self, Write};
use std::time::Instant;

use super::patient::Outcome;

/// Tables of findings, as Markdown. Every row is written as soon as it is known: who ends the doctor early has seen what was
/// found by then.
pub(super) struct Report<'a> {
    out: &'a mut dyn Write,
    /// Why nothing can be written any more.
    closed: Option<io::Error>,
    /// Of the table that was started last.
    columns: usize,
    parts: Vec<Part>,
    wrong: Vec<String>,
    unchecked: Vec<String>,
}

/// A row of the summary.
#[derive(Default)]
struct Part {
    name: String,
    checks: usize,
    wrong: usize,
    seconds: f64,
    /// Why it was left out.
    left_out: Option<String>,
}

impl<'a> Report<'a> {
    pub(super) fn new(out: &'a mut dyn Write, title: &str) -> Self {
        let (parts, wrong, unchecked) = (Vec::new(), Vec::new(), Vec::new());
        let mut report = Self { out, closed: None, columns: 0, parts, wrong, unchecked };
        report.line(&format!("# {title}"));
        report
    }

    /// Starts a table with these columns.
    pub(super) fn table(&mut self, columns: &[&str]) {
        self.line("");
        self.columns = columns.len();
        self.row(columns);
        self.row(&columns.iter().map(|_| "---").collect::<Vec<_>>());
    }

    /// Adds a row to the table that was started last. Cells that are missing are empty.
    pub(super) fn row(&mut self, cells: &[impl Display]) {
        let mut line = String::from("|");
        for cell in cells {
            line.push_str(&format!(" {} |", cell.to_string().replace('\n', " ").replace('|', "\\|")));
        }
        line.push_str(&"  |".repeat(self.columns.saturating_sub(cells.len())));
        self.line(&line);
    }

    /// Counts what has been compared in this part.
    pub(super) fn checked(&mut self, checks: usize) {
        if let Some(part) = self.parts.last_mut() {
            part.checks += checks;
        }
    }

    /// Notes that something is not as it should be.
    pub(super) fn wrong(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.row(&[format!("wrong: {what}")]);
        self.wrong.push(what);
    }

    /// Notes that something was left out.
    pub(super) fn not_checked(&mut self, what: &str, reason: &str) {
        self.row(&[format!("{what}: not checked: {reason}")]);
        self.unchecked.push(what.to_owned());
    }

    /// What came of some work, if it came to its end. Notes if it did not, under its name.
    pub(super) fn take<T>(&mut self, what: &str, outcome: Outcome<T>) -> Option<T> {
        match outcome {
            Outcome::Done(done) => return Some(done),
            Outcome::Failed(reason) => self.wrong(format!("{what}: {reason}")),
            Outcome::NotRun(reason) => self.not_checked(what, &reason),
        }
        None
    }

    /// A part of the examination.
    pub(super) fn part(&mut self, name: &str, examine: impl FnOnce(&mut Self)) {
        let begin = Instant::now();
        let wrong_before = self.wrong.len();
        self.parts.push(Part { name: name.to_owned(), ..Part::default() });
        examine(self);
        let wrong = self.wrong.len() - wrong_before;
        let part = self.parts.last_mut().expect("it has just been added");
        (part.wrong, part.seconds) = (wrong, begin.elapsed().as_secs_f64());
    }

    /// A part that is left out.
    pub(super) fn left_out(&mut self, name: &str, reason: &str) {
        let left_out = Some(reason.to_owned());
        self.parts.push(Part { name: name.to_owned(), left_out, ..Part::default() });
        self.unchecked.push(name.to_owned());
    }

    /// Writes the summary. Answers whether everything that was checked is as it should be, and somebody has read so.
    pub(super) fn finish(mut self) -> bool {
        self.line("");
        self.line("## Summary");
        self.table(&["part", "checks", "wrong", "seconds"]);
        for Part { name, checks, wrong, seconds, left_out, .. } in std::mem::take(&mut self.parts) {
            match left_out {
                Some(reason) => self.row(&[name, format!("not checked: {reason}")]),
                None => self.row(&[name, checks.to_string(), wrong.to_string(), format!("{seconds:.1}")]),
            }
        }
        self.line("");
        match (self.wrong.len(), self.unchecked.join(", ")) {
            (0, unchecked) if unchecked.is_empty() => self.line("All is well."),
            (0, unchecked) => self.line(&format!("All that was checked is well. Not checked: {unchecked}.")),
            (count, unchecked) => {
                self.line(&format!("{count} findings are wrong:\n"));
                for wrong in std::mem::take(&mut self.wrong) {
                    self.line(&format!("- {wrong}"));
                }
                if !unchecked.is_empty() {
                    self.line(&format!("\nNot checked: {unchecked}."));
                }
                return false;
            }
        }
        self.closed.is_none()
    }

    fn line(&mut self, line: &str) {
        if self.closed.is_none() {
            self.closed = writeln!(self.out, "{line}").and_then(|()| self.out.flush()).err();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(examine: impl FnOnce(&mut Report<'_>)) -> (String, bool) {
        let mut text = Vec::new();
        let mut report = Report::new(&mut text, "GPU");
        examine(&mut report);
        let is_well = report.finish();
        (String::from_utf8(text).unwrap(), is_well)
    }

    #[test]
    fn a_report_is_markdown_and_ends_with_a_summary() {
        let (text, is_well) = write(|report| {
            report.part("things", |report| {
                report.table(&["what", "how many"]);
                report.row(&["things", "3"]);
                report.checked(3);
            });
        });
        let expected = "# GPU\n\n| what | how many |\n| --- | --- |\n| things | 3 |\n\n## Summary\n\n\
            | part | checks | wrong | seconds |\n| --- | --- | --- | --- |\n| things | 3 | 0 | 0.0 |\n\nAll is well.\n";
        assert_eq!((text.as_str(), is_well), (expected, true));
    }

    #[test]
    fn what_is_wrong_is_a_row_at_once_and_listed_at_the_end() {
        let (text, is_well) = write(|report| {
            report.part("good", |report| report.checked(1));
            report.part("bad", |report| {
                report.table(&["what", "how many"]);
                report.wrong("one\nof|them");
                assert_eq!(report.take("work", Outcome::<()>::Failed("broken".to_owned())), None);
                assert_eq!(report.take("work", Outcome::Done(7)), Some(7));
            });
        });
        assert!(!is_well);
        assert!(text.contains("\n| wrong: one of\\|them |  |\n"), "{text}");
        assert!(text.contains("| good | 1 | 0 | 0.0 |\n| bad | 0 | 2 | 0.0 |\n"), "{text}");
        assert!(text.ends_with("2 findings are wrong:\n\n- one\nof|them\n- work: broken\n"), "{text}");
    }

    #[test]
    fn what_is_left_out_is_said() {
        let (text, is_well) = write(|report| {
            report.left_out("fixtures", "nobody says where they are");
            report.part("rest", |report| {
                report.table(&["what"]);
                assert_eq!(report.take("last", Outcome::<()>::NotRun("the GPU is lost".to_owned())), None);
            });
        });
        assert!(is_well);
        assert!(text.contains("| last: not checked: the GPU is lost |\n"), "{text}");
        assert!(text.contains("| fixtures | not checked: nobody says where they are |  |  |\n"), "{text}");
        assert!(text.ends_with("All that was checked is well. Not checked: fixtures, last.\n"), "{text}");
    }
}
