//! A plan for people, as an aligned table, and for programs, as JSON.

use std::fmt::{self, Display};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::values::Derived;
use super::{ChildCommand, LaunchPlan};
use crate::tether;

/// One derived value.
struct Row {
    name: &'static str,
    shown: String,
    value: Value,
    reason: String,
}

impl Row {
    fn new<T: Display + Serialize>(name: &'static str, derived: &Derived<T>) -> Self {
        let value = serde_json::to_value(&derived.value).expect("numbers and strings are JSON");
        Self { name, shown: derived.value.to_string(), value, reason: derived.reason.clone() }
    }

    fn path(name: &'static str, derived: &Derived<PathBuf>) -> Self {
        Self::new(name, &Derived::new(derived.value.display().to_string(), derived.reason.as_str()))
    }
}

impl LaunchPlan {
    /// The plan as JSON: `values` (each with `value` and `reason`), `warnings` and `commands`.
    pub fn json(&self) -> Value {
        let values: Map<String, Value> = self
            .rows()
            .into_iter()
            .map(|row| (row.name.to_owned(), json!({"value": row.value, "reason": row.reason})))
            .collect();
        let commands: Map<String, Value> =
            self.commands().into_iter().map(|(name, command)| (name, command_json(command))).collect();
        json!({"values": values, "warnings": self.warnings, "commands": commands})
    }

    fn rows(&self) -> Vec<Row> {
        let values = &self.values;
        let (limits, recovery) = (&values.limits, &values.recovery);
        vec![
            Row::new("model", &values.model),
            Row::path("model-directory", &values.model_directory),
            Row::new("device", &values.device),
            Row::new("dtype", &values.dtype),
            Row::new("quantization", &values.quantization),
            Row::new("lora-adapters", &values.adapters),
            Row::new("weights-memory", &values.weights),
            Row::new("machine-memory", &values.memory),
            Row::new("num-shard", &values.shard_count),
            Row::new("attention", &values.attention),
            Row::new("block-size", &values.block_tokens),
            Row::new("prefix-caching", &values.prefix_caching),
            Row::new("max-input-tokens", &limits.max_input_tokens),
            Row::new("max-total-tokens", &limits.max_total_tokens),
            Row::new("max-batch-prefill-tokens", &limits.max_batch_prefill_tokens),
            Row::new("max-batch-total-tokens", &limits.max_batch_total_tokens),
            Row::new("max-step-stretch", &values.max_step_stretch),
            Row::new("on-shard-failure", &recovery.on_shard_failure),
            Row::new("max-shard-restarts", &recovery.max_shard_restarts),
            Row::new("step-timeout", &recovery.step_timeout),
            Row::new("cpu-threads", &values.cpu_threads),
            Row::new("shard-threads", &values.shard_threads),
            Row::new("compute-type", &values.compute_type),
            Row::new("address", &values.address),
            Row::new("prometheus-port", &values.prometheus_port),
            Row::path("run-directory", &values.run_directory),
            Row::path("shard-uds-path", &values.socket_prefix),
            Row::new("shard-log-level", &values.log_level),
        ]
    }

    fn commands(&self) -> Vec<(String, &ChildCommand)> {
        let downloads = self.downloads.iter().map(|download| {
            let is_model = download.id == self.values.model.value;
            let name = if is_model { "download".to_owned() } else { format!("download-{}", download.id) };
            (name, &download.command)
        });
        let shards = self.shards.iter().map(|shard| (format!("shard-{}", shard.rank), &shard.command));
        downloads.chain(shards).chain([("router".to_owned(), &self.router)]).collect()
    }
}

fn command_json(command: &ChildCommand) -> Value {
    let arguments: Vec<_> = command.arguments.iter().map(|word| word.to_string_lossy()).collect();
    let variables: Map<String, Value> = command
        .variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.to_string().into()))
        .collect();
    json!({"program": command.program.to_string_lossy(), "arguments": arguments, "variables": variables})
}

/// The plan as an aligned table, then the warnings, then the children's commands.
impl Display for LaunchPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let name_width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let shown_width = rows.iter().map(|row| row.shown.chars().count()).max().unwrap_or(0);
        for Row { name, shown, reason, .. } in rows {
            writeln!(formatter, "{name:name_width$}  {shown:shown_width$}  {reason}")?;
        }
        if !self.warnings.is_empty() {
            writeln!(formatter, "\nWarnings")?;
        }
        for warning in &self.warnings {
            writeln!(formatter, "  {warning}")?;
        }
        writeln!(formatter, "\nCommands, in the order of starting")?;
        for (_, command) in self.commands() {
            writeln!(formatter, "  {}", shell_line(command))?;
        }
        Ok(())
    }
}

/// The command as one would type it, which is without the tie to this launcher.
fn shell_line(command: &ChildCommand) -> String {
    let variables =
        command.variables.iter().map(|(name, value)| format!("{name}={}", quoted(&value.to_string())));
    let tie = command.arguments.iter().take_while(|word| *word == tether::CHILD_OF).count() * 2;
    let words = [command.program.as_os_str()]
        .into_iter()
        .chain(command.arguments.iter().skip(tie).map(|word| word.as_ref()));
    let words = words.map(|word| quoted(&word.to_string_lossy()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./:=,@%+".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::plan;
    use super::*;

    #[test]
    fn the_table_is_aligned_and_ends_with_the_commands() {
        let text = plan(&["--speculate=2", "--api-key=hush", "--device=cpu"]).to_string();
        let lines: Vec<_> = text.lines().collect();
        let column = |line: &str, word: &str| line.find(word).unwrap();
        assert_eq!(column(lines[0], "demo"), column(lines[2], "cpu"));
        assert_eq!(column(lines[0], "no --model-id"), column(lines[2], "--device"));
        assert!(text.contains("Warnings\n  --speculate has no effect"), "{text}");
        assert!(lines[lines.len() - 2].starts_with("  RANK=0 WORLD_SIZE=1"), "{text}");
        assert!(lines[lines.len() - 1].contains("API_KEY='***'"), "{text}");
        assert!(!text.contains("hush"), "{text}");
    }

    #[test]
    fn the_json_has_numbers_reasons_and_commands() {
        let json = plan(&["--api-key=hush"]).json();
        assert_eq!(
            json["values"]["cpu-threads"],
            json!({"value": 6, "reason": "one per core this process may use"})
        );
        assert_eq!(json["values"]["prefix-caching"]["value"], true);
        assert_eq!(json["values"]["on-shard-failure"]["value"], "restart");
        assert_eq!(json["values"]["max-shard-restarts"]["value"], 10);
        assert_eq!(json["values"]["step-timeout"]["value"], 60.0);
        assert_eq!(json["values"]["max-step-stretch"]["value"], 2.0);
        assert_eq!(json["values"]["max-total-tokens"]["value"], json!({"at_most": 2048}));
        assert_eq!(json["commands"]["shard-0"]["variables"]["RANK"], "0");
        assert_eq!(json["commands"]["router"]["arguments"][2], "router");
        assert_eq!(json["commands"]["router"]["variables"]["API_KEY"], "***");
        assert_eq!(json["warnings"], json!([]));
    }

    #[test]
    fn words_are_quoted_as_a_shell_wants_them() {
        assert_eq!(["a-b=/c", "", "a b", "it's"].map(quoted), ["a-b=/c", "''", "'a b'", r"'it'\''s'"]);
    }
}
