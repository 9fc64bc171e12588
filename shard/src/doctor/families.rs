use std::time::Instant;

use kernels::cuda::checks::{self, FAMILIES, Family, Finding};

use super::Report;
use super::patient::Patient;

/// The families with these names; all, if there are none. Errors when there is no such family.
pub(super) fn chosen(names: &[String]) -> anyhow::Result<Vec<(&'static str, Family)>> {
    let all: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = names.iter().find(|name| !all.contains(&name.as_str())) {
        anyhow::bail!("there is no family `{unknown}` of kernels; there are {}", all.join(", "));
    }
    let is_chosen = |name: &str| names.is_empty() || names.iter().any(|chosen| chosen == name);
    Ok(FAMILIES.iter().copied().filter(|(name, _)| is_chosen(name)).collect())
}

/// Families of kernels against their definitions.
pub(super) fn check(
    patient: &mut Patient,
    families: &[(&'static str, Family)],
    seed: u64,
    report: &mut Report<'_>,
) {
    report.table(&["kernels", "checks", "wrong", "largest error, as a share of its bound", "ms"]);
    for &(name, family) in families {
        let begin = Instant::now();
        let what = format!("family {name}");
        let found = patient.run(&what, move |gpu| Ok(checks::run(gpu, family, seed)?));
        let Some(findings) = report.take(&what, found) else { continue };
        let wrong: Vec<&Finding> = findings.iter().filter(|finding| !finding.passes()).collect();
        let worst = findings.iter().map(|finding| finding.error).fold(0.0, worse);
        report.checked(findings.len());
        report.row(&[
            name.to_owned(),
            findings.len().to_string(),
            wrong.len().to_string(),
            format!("{worst:.3}"),
            begin.elapsed().as_millis().to_string(),
        ]);
        wrong.iter().for_each(|finding| report.wrong(format!("{name}: {finding}")));
    }
}

/// The larger error; what is no number is the worst of all.
pub(super) fn worse(one: f64, other: f64) -> f64 {
    if one.is_nan() || other <= one { one } else { other }
}

#[cfg(all(test, feature = "emulation"))]
mod tests {
    use std::time::Duration;

    use kernels::OpError;
    use kernels::cuda::checks::Checker;
    use kernels::cuda::{Gpu, Schedule};

    use super::*;

    fn failing(_: &mut Checker) -> Result<(), OpError> {
        Err(OpError::Device { op: "rope", reason: "an illegal address".to_owned() })
    }

    fn panicking(_: &mut Checker) -> Result<(), OpError> {
        panic!("at the disco")
    }

    #[test]
    fn a_family_that_fails_is_named_and_those_after_a_failed_device_are_not_checked() {
        let norm = chosen(&["norm".to_owned()]).unwrap()[0];
        let families: [(&'static str, Family); 5] =
            [("one", panicking), norm, ("two", failing), ("three", failing), norm];
        let mut patient = Patient::new(Gpu::emulated(Schedule::Forward), Duration::from_secs(600));
        let mut text = Vec::new();
        let mut report = Report::new(&mut text, "GPU");
        report.part("kernels", |report| check(&mut patient, &families, 1, report));
        assert!(!report.finish());
        let text = String::from_utf8(text).unwrap();
        for line in [
            "| wrong: family one: panic: at the disco |",
            "| norm | 252 | 0 |",
            "| wrong: family two: rope: an illegal address |",
            "| family three: not checked: the GPU was lost in family two;",
            "| family norm: not checked: the GPU was lost in family two;",
            "\n2 findings are wrong:\n",
            "\nNot checked: family three, family norm.\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
