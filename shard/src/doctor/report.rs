use std::fmt::{self, Display};

/// Tables of findings, as Markdown.
#[derive(Debug)]
pub(super) struct Report {
    text: String,
    wrong: Vec<String>,
}

impl Report {
    pub(super) fn new(title: &str) -> Self {
        Self { text: format!("# {title}\n"), wrong: Vec::new() }
    }

    /// Starts a table with these columns.
    pub(super) fn table(&mut self, columns: &[&str]) {
        self.text.push('\n');
        self.row(columns);
        self.row(&columns.iter().map(|_| "---").collect::<Vec<_>>());
    }

    /// Adds a row to the table that was started last.
    pub(super) fn row(&mut self, cells: &[impl Display]) {
        self.text.push('|');
        for cell in cells {
            self.text.push_str(&format!(" {cell} |"));
        }
        self.text.push('\n');
    }

    /// Notes that something is not as it should be.
    pub(super) fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    /// Whether everything is as it should be.
    pub(super) fn is_well(&self) -> bool {
        self.wrong.is_empty()
    }
}

impl Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)?;
        match self.wrong.len() {
            0 => formatter.write_str("\nAll is well.\n"),
            count => {
                writeln!(formatter, "\n{count} findings are wrong:\n")?;
                self.wrong.iter().try_for_each(|wrong| writeln!(formatter, "- {wrong}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_markdown_and_ends_with_what_is_wrong() {
        let mut report = Report::new("GPU");
        report.table(&["what", "how many"]);
        report.row(&["things", "3"]);
        assert!(report.is_well());
        assert_eq!(
            report.to_string(),
            "# GPU\n\n| what | how many |\n| --- | --- |\n| things | 3 |\n\nAll is well.\n"
        );
        report.wrong("one of them".to_owned());
        assert!(!report.is_well());
        assert!(report.to_string().ends_with("\n1 findings are wrong:\n\n- one of them\n"));
    }
}
