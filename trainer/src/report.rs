//! `report.html`: what became of a run, on one page that needs nothing but a browser.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use html_escape::encode_safe;
use serde_json::Value;

use crate::Result;
use crate::evaluate::{calibration, calibration_plot};
use crate::history::History;
use crate::output::write_file;
use crate::plot::{Labels, Series, histograms, lines};
use crate::record::Pair;

/// What is known of a curve by its name: title, and label of its axis. Others are shown too, after these.
const CURVES: [(&str, &str, &str); 8] = [
    ("loss", "Loss", "loss (nats)"),
    ("preference_loss", "Preference loss", "loss (nats a pair)"),
    ("language_loss", "Language loss", "loss (nats a token)"),
    ("accuracy", "Accuracy", "share of pairs"),
    ("margin", "Margin", "chosen less rejected"),
    ("lr", "Learning rate", "learning rate"),
    ("gradient_norm", "Gradient norm", "norm before clipping"),
    ("tokens_per_second", "Speed", "tokens a second"),
];

const STYLE: &str = "\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1340px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots figure { margin: 0; border: 1px solid #ddd }
svg { max-width: 100%; height: auto; display: block }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } tr + tr { border-top: 1px solid #ddd } td { font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto } footer, .note { color: #666 }
";

/// Writes `report.html` into the folder of a run, from the files that are there, and tells where it is.
///
/// # Errors
/// If the folder holds no run, or a file of it makes no sense.
pub fn report(folder: &Path) -> Result<PathBuf> {
    let history = History::read(folder)?;
    let path = folder.join("report.html");
    write_file(&path, &page(&history)?)?;
    Ok(path)
}

fn page(history: &History) -> Result<String> {
    let name = encode_safe(&history.name);
    let text = |key: &str| history.recipe.get(key).and_then(Value::as_str).unwrap_or_default();
    let (objective, init) = (encode_safe(text("objective")), encode_safe(text("init")));
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{name}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n\
         <p>Objective {objective}, begun with {init}; {} steps.</p>\n",
        history.steps()
    );
    if history.bad_lines > 0 {
        let count = history.bad_lines;
        html += &format!("<p class=\"note\">Lines of the run's files that could not be read: {count}.</p>\n");
    }
    section(&mut html, "On the dev data", &measured(history)?);
    section(&mut html, "Step by step", &figures(&curves(history)?));
    section(&mut html, "Data", &data(history));
    section(&mut html, "Recipe", &format!("<pre>{}</pre>\n", encode_safe(&history.recipe_text)));
    html += &format!("<footer>Written by plumb-train {}.</footer>\n</body>\n</html>\n", env!("CARGO_PKG_VERSION"));
    Ok(html)
}

fn section(html: &mut String, title: &str, content: &str) {
    if !content.is_empty() {
        *html += &format!("<section>\n<h2>{title}</h2>\n{content}</section>\n");
    }
}

fn figures(plots: &[String]) -> String {
    let figures: String = plots.iter().map(|svg| format!("<figure>{svg}</figure>\n")).collect();
    if figures.is_empty() { figures } else { format!("<div class=\"plots\">\n{figures}</div>\n") }
}

/// The last measurement on the dev data, and what the pairs got.
fn measured(history: &History) -> Result<String> {
    let Some(measured) = history.measured() else { return Ok(String::new()) };
    let mut html = format!("<table>\n<tr><th>after step</th><td>{}</td></tr>\n", measured.step);
    for (name, value) in measured.rows() {
        html += &format!("<tr><th>{}</th><td>{}</td></tr>\n", encode_safe(&name), encode_safe(&value));
    }
    html += "</table>\n";
    if history.pairs.is_empty() {
        return Ok(html);
    }
    let preference = history.recipe.get("objective").is_none_or(|objective| objective == "preference");
    let what = if preference { "reward" } else { "mean log-likelihood (nats a token)" };
    let [chosen, rejected]: [Vec<f64>; 2] =
        [|pair: &Pair| pair.chosen, |pair: &Pair| pair.rejected].map(|side| history.pairs.iter().map(side).collect());
    let title = if preference { "Rewards" } else { "Log-likelihoods" };
    let labels = Labels { title, x: what, y: "share of the sides" };
    let mut plots = vec![histograms(&labels, &[("chosen", &chosen), ("rejected", &rejected)])?];
    // The margin of log-likelihoods is not that of a probability.
    if preference {
        let margins: Vec<f64> = history.pairs.iter().map(|pair| pair.chosen - pair.rejected).collect();
        if let Some(curve) = calibration(&margins, 0) {
            plots.push(calibration_plot("Calibration of sigmoid(margin)", &curve)?);
        }
    }
    Ok(html + "<p></p>\n" + &figures(&plots))
}

fn curves(history: &History) -> Result<Vec<String>> {
    let named = |tag: &String| tag.split_once('/').map_or(tag.clone(), |(_, name)| name.to_owned());
    let mut others: Vec<String> = history.curves.keys().map(named).collect();
    others.retain(|name| CURVES.iter().all(|(known, ..)| known != name));
    others.sort();
    others.dedup();
    let others = others.iter().map(|name| (&name[..], &name[..], &name[..]));
    // Of a language model they are the same.
    let language = history.recipe.get("objective").is_some_and(|objective| objective != "preference");
    let all = CURVES.into_iter().filter(|(name, ..)| !(language && *name == "language_loss")).chain(others);
    let mut plots = Vec::new();
    for (name, title, y) in all {
        let mut series = Vec::new();
        if let Some(points) = history.curves.get(&format!("train/{name}")) {
            // The learning rate has nothing to be smoothed.
            series.push(if name == "lr" { Series::new("train", points.iter().copied()) } else { smoothed(points) });
        }
        // Measuring is faster than learning, and is not waited for.
        if let Some(points) = history.curves.get(&format!("dev/{name}")).filter(|_| name != "tokens_per_second") {
            series.push(Series::new("dev", points.iter().copied()));
        }
        if !series.is_empty() {
            plots.push(lines(&Labels { title, x: "step", y }, false, &series)?);
        }
    }
    Ok(plots)
}

/// Means over neighbours, so many that about fifty differ, with the points themselves behind.
fn smoothed(points: &[(f64, f64)]) -> Series {
    let half = points.len() / 100;
    if half == 0 {
        return Series::new("train", points.iter().copied());
    }
    let mut sums = vec![0.0];
    for (_, y) in points {
        sums.push(sums[sums.len() - 1] + y);
    }
    let mean = |i: usize| {
        let (first, last) = (i.saturating_sub(half), (i + half + 1).min(points.len()));
        (points[i].0, (sums[last] - sums[first]) / (last - first) as f64)
    };
    let series = Series::new(format!("train, mean of {} steps", 2 * half + 1), (0..points.len()).map(mean));
    Series { behind: points.to_vec(), ..series }
}

/// What was read, and what was not.
fn data(history: &History) -> String {
    if history.data.is_empty() {
        return String::new();
    }
    let mut html =
        "<table>\n<tr><th></th><th>lines</th><th>examples</th><th>tokens</th><th>cut</th><th>left out</th></tr>\n"
            .to_owned();
    for (split, counts) in &history.data {
        let dropped = counts["dropped"].as_object().into_iter().flatten();
        let dropped: Vec<String> = dropped.map(|(reason, count)| format!("{count} {reason}")).collect();
        let mut cells = ["lines", "examples", "tokens", "cut"].map(|key| counts[key].to_string()).to_vec();
        cells.push(if dropped.is_empty() { "nothing".to_owned() } else { dropped.join(", ") });
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", encode_safe(cell))).collect();
        html += &format!("<tr><th>{}</th>{cells}</tr>\n", encode_safe(split));
    }
    html += "</table>\n";
    for set in &history.prepared {
        let dataset = set.dataset.as_deref().unwrap_or_default();
        let _ =
            writeln!(html, "<p>Prepared from {}: {}.</p>", encode_safe(dataset), encode_safe(&set.files.join(", ")));
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_the_level_and_the_ends() {
        let points: Vec<(f64, f64)> = (0..500).map(|i| (f64::from(i), if i % 2 == 0 { 1.0 } else { 3.0 })).collect();
        let series = smoothed(&points);
        assert_eq!((series.points.len(), series.behind.len(), &series.name[..]), (500, 500, "train, mean of 11 steps"));
        let y = |i: usize| series.points[i].y.value;
        // Eleven in a row have five or six of a kind; the first has itself and five to its right.
        assert!((y(250) - (5.0 + 18.0) / 11.0).abs() < 1e-12 && (y(251) - (6.0 + 15.0) / 11.0).abs() < 1e-12);
        assert!((y(0) - 2.0).abs() < 1e-12 && (y(499) - 2.0).abs() < 1e-12);
        assert!(smoothed(&points[..50]).behind.is_empty());
    }
}
