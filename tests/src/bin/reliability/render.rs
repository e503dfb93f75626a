//! From the results to the tables of `RELIABILITY.md`, between its two markers.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::context::Experiment;
use crate::experiments::{
    drain, failed_loads, fuzz, overload, poison, publish_kill, replicas, server_kill, soak, swaps,
};
use crate::options::root;
use crate::report::Report;

const BEGIN: &str = "<!-- reliability:begin -->\n";
const END: &str = "<!-- reliability:end -->";

/// In the order in which they are shown.
const EXPERIMENTS: [&str; 10] = [
    swaps::Swaps::NAME,
    failed_loads::FailedLoads::NAME,
    publish_kill::PublishKill::NAME,
    overload::Overload::NAME,
    drain::Drain::NAME,
    poison::Poison::NAME,
    fuzz::Fuzz::NAME,
    replicas::Replicas::NAME,
    server_kill::ServerKill::NAME,
    soak::Soak::NAME,
];

/// Options of the command.
#[derive(Args)]
pub(crate) struct Render {
    /// Where the results are.
    #[arg(long, default_value_os_t = root().join("tests/reliability/results"), value_name = "FOLDER")]
    results: PathBuf,
    /// The page.
    #[arg(long, default_value_os_t = root().join("RELIABILITY.md"), value_name = "FILE")]
    page: PathBuf,
}

impl Render {
    /// Replaces what is between the markers.
    pub(crate) fn run(&self) -> Result<()> {
        let mut reports = Vec::new();
        for name in EXPERIMENTS {
            let path = self.results.join(format!("{name}.json"));
            if path.exists() {
                reports.push(Report::read(&path)?);
            } else {
                eprintln!("{name} has no result yet");
            }
        }
        let page = std::fs::read_to_string(&self.page).with_context(|| self.page.display().to_string())?;
        let page = between_markers(&page, &tables(&reports)).context("the page does not hold both markers")?;
        std::fs::write(&self.page, page).with_context(|| self.page.display().to_string())
    }
}

fn between_markers(page: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{text}{END}{after}"))
}

/// How many bars each experiment meets, then each with all that was measured.
fn tables(reports: &[Report]) -> String {
    let mut text = String::from("| experiment | bars met | missed |\n|---|---|---|\n");
    for report in reports {
        let measures = report.measures();
        let bars = measures.iter().filter(|measure| measure.bar.is_some()).count();
        let missed: Vec<_> = measures.iter().filter(|measure| measure.missed().is_some()).map(|m| &*m.name).collect();
        let title = &report.title;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| [{title}](#{}) | {} of {bars} | {} |",
            anchor(title),
            bars - missed.len(),
            missed.join("; ")
        );
    }
    for report in reports {
        let Report { title, what, command, material, machine, seconds, runs, experiment, .. } = report;
        let material = if material.is_empty() { String::new() } else { format!("With {material}. ") };
        let runs = match runs.len() {
            1 => "One run".to_owned(),
            n => format!("{n} runs: medians, with smallest and largest; of what must not happen, the worst"),
        };
        let _ = writeln!(
            text,
            "\n### {title}\n\n{what}\n\n    {command}\n\n{material}{runs}, {seconds:.0} s in all, {} \
             [{experiment}.json](tests/reliability/results/{experiment}.json).\n\n| figure | bar | measured |\n|---|---|---|",
            machine.in_words()
        );
        for measure in report.measures() {
            let bar = measure.bar.map(|bar| bar.to_string()).unwrap_or_default();
            let found = match measure.missed() {
                None => report.in_words(&measure),
                Some(_) => format!("**{}**", report.in_words(&measure)),
            };
            let _ = writeln!(text, "| {} | {bar} | {found} |", measure.name);
        }
    }
    text + "\n"
}

/// As a heading is linked to.
fn anchor(title: &str) -> String {
    let kept = title.to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let page = format!("intro\n{BEGIN}old\n{END}\noutro\n");
        let expected = format!("intro\n{BEGIN}\nnew\n{END}\noutro\n");
        assert_eq!(between_markers(&page, "new\n"), Some(expected));
        assert_eq!(between_markers("no markers", "new"), None);
    }

    #[test]
    fn a_heading_is_linked_to_as_forges_do() {
        assert_eq!(anchor("SIGTERM under load"), "sigterm-under-load");
        assert_eq!(anchor("Everything mixed, for a long time"), "everything-mixed-for-a-long-time");
    }
}
