//! Plots of an evaluation: calibration, what was measured by category, and the best of k samples.

use super::Evaluation;
use super::measure::{Bin, Calibration, Measurement};
use super::options::Task;
use crate::Result;
use crate::plot::{self, Estimate, Group, Labels, Point, Series};

/// Names and texts of the plots that an evaluation is good for.
pub(super) fn draw(evaluation: &Evaluation) -> Result<Vec<(String, String)>> {
    let mut plots = Vec::new();
    let several = evaluation.calibration.len() > 1;
    for curve in &evaluation.calibration {
        let score = curve.score.as_deref().unwrap_or_default();
        let title = format!("Calibration by {score}, expected error {:.3}", curve.error);
        let name = if several { format!("calibration {score}") } else { "calibration".to_owned() };
        plots.push((file_name(&name), calibration_plot(&title, curve)?));
    }
    for metric in ["accuracy", "group accuracy", "section score", "elo"] {
        plots.extend(by_category(evaluation, metric)?.map(|text| (file_name(metric), text)));
    }
    plots.extend(best_of(evaluation)?.map(|text| ("best-of-k.svg".to_owned(), text)));
    if evaluation.task == Task::BestOfN {
        let over = [
            ("best-of-n.svg", "samples k", true, (|k, _| k) as fn(f64, f64) -> f64),
            ("best-of-n-kl.svg", "KL bound, log k - (k-1)/k (nats)", false, |_, kl_bound| kl_bound),
        ];
        for (name, x, logarithmic, place) in over {
            plots.extend(best_rewards(evaluation, x, logarithmic, place)?.map(|text| (name.to_owned(), text)));
        }
    }
    Ok(plots)
}

fn file_name(name: &str) -> String {
    let dashed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.chars().map(dashed).collect::<String>().replace("--", "-") + ".svg"
}

/// A calibration curve, with intervals.
pub(crate) fn calibration_plot(title: &str, curve: &Calibration) -> Result<String> {
    let bin = |bin: &Bin| {
        // Pairs of a bin are taken for independent.
        let interval = plumb_client::stats::wilson(bin.observed * bin.n as f64, bin.n);
        plot::Bin { predicted: bin.predicted, observed: Estimate { value: bin.observed, interval }, count: bin.n }
    };
    plot::calibration(title, &curve.bins.iter().map(bin).collect::<Vec<_>>())
}

fn estimate(measured: &Measurement) -> Estimate {
    Estimate { value: measured.value, interval: measured.low.zip(measured.high) }
}

/// Scores, in the order of their appearance.
fn scores<'a>(measured: &[&'a Measurement]) -> Vec<Option<&'a str>> {
    let mut scores = Vec::new();
    for score in measured.iter().map(|m| m.score.as_deref()) {
        if !scores.contains(&score) {
            scores.push(score);
        }
    }
    scores
}

/// A metric of every category, a colour for each score. None if there is one category only.
fn by_category(evaluation: &Evaluation, metric: &str) -> Result<Option<String>> {
    let measured: Vec<&Measurement> = evaluation.results.iter().filter(|m| m.metric == metric).collect();
    let mut names: Vec<String> = Vec::new();
    for name in measured.iter().map(|m| &m.name) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    if names.len() < 2 {
        return Ok(None);
    }
    let group = |score: Option<&str>| {
        let of = |name: &String| measured.iter().find(|m| m.name == *name && m.score.as_deref() == score);
        let values = names.iter().map(|name| of(name).map(|m| estimate(m))).collect();
        Group { name: score.unwrap_or_default().to_owned(), values }
    };
    let groups: Vec<Group> = scores(&measured).into_iter().map(group).collect();
    let title = format!("{metric} with 95 % intervals");
    plot::categories(&Labels { title: &title, x: metric, y: "" }, &names, &groups, None).map(Some)
}

/// The k of a metric such as `acc@k`.
fn at_k(measured: &Measurement, kind: &str) -> Option<f64> {
    measured.metric.strip_prefix(kind)?.strip_prefix('@')?.parse().ok()
}

/// What was measured in the largest scope there is.
fn widest(evaluation: &Evaluation) -> Vec<&Measurement> {
    let widest = evaluation.results.last().map(|m| &m.name);
    evaluation.results.iter().filter(|m| Some(&m.name) == widest).collect()
}

/// Reward of the best of k, a curve for each score, over what k and its KL bound say.
fn best_rewards(
    evaluation: &Evaluation,
    x: &str,
    logarithmic: bool,
    place: impl Fn(f64, f64) -> f64,
) -> Result<Option<String>> {
    let measured = widest(evaluation);
    let curve = |score: Option<&str>| {
        let own = measured.iter().filter(|m| m.score.as_deref() == score);
        let point = |m: &&Measurement| Some(Point { x: place(at_k(m, "best")?, m.kl_bound?), y: estimate(m) });
        let name = score.unwrap_or_default().to_owned();
        Series { name, points: own.filter_map(point).collect(), band: true, ..Series::default() }
    };
    let curves: Vec<Series> = scores(&measured).into_iter().map(curve).collect();
    if curves.iter().all(|curve| curve.points.len() < 2) {
        return Ok(None);
    }
    let title = "Expected reward of the best of k samples, with 95 % intervals";
    plot::lines(&Labels { title, x, y: "reward" }, logarithmic, &curves).map(Some)
}

/// Accuracy of the best of k, and of a choice that knows, over k; the largest scope there is.
fn best_of(evaluation: &Evaluation) -> Result<Option<String>> {
    let measured = widest(evaluation);
    let curve = |name: String, kind: &str, score: Option<&str>| {
        let own = measured.iter().filter(|m| m.score.as_deref() == score);
        let points = own.filter_map(|m| Some(Point { x: at_k(m, kind)?, y: estimate(m) })).collect();
        Series { name, points, band: true, ..Series::default() }
    };
    let scores = scores(&measured);
    let ranked = scores.iter().map(|&score| curve(format!("ranked by {}", score.unwrap_or_default()), "acc", score));
    // What a choice that knows would reach is the same whatever ranks.
    let oracle = scores.first().map(|&score| curve("oracle".to_owned(), "pass", score));
    let curves: Vec<Series> = ranked.chain(oracle).collect();
    if curves.iter().all(|curve| curve.points.len() < 2) {
        return Ok(None);
    }
    let labels = Labels { title: "Accuracy of the best of k samples", x: "samples k", y: "accuracy" };
    plot::lines(&labels, true, &curves).map(Some)
}
