//! Plots as SVG texts, for reports and for whoever looks at an evaluation.
//!
//! A plot is data in, text out: it needs no fonts, no display and no scripts where it is made, and a browser shows it
//! as it is. Values that are not finite are left out.

mod axis;
mod frame;

use plotters::element::{Circle, PathElement, Polygon, Rectangle};
use plotters::prelude::IntoDynElement as _;
use plotters::series::LineSeries;
use plotters::style::{BLACK, Color as _, RGBColor};

use self::frame::{Chart, Entry, Failed, Frame, Mark};
use crate::Result;

/// Told apart by people who see few colours too (Okabe and Ito 2008).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// Points up to which a curve shows each of them.
const MARKED: usize = 40;

/// Points of a curve beyond which only the least and the greatest of neighbours are drawn: no screen shows more.
const DRAWN: usize = 1500;

/// What stands around a plot. A unit stands in the label, in parentheses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Labels<'a> {
    /// Above it.
    pub title: &'a str,
    /// Below it.
    pub x: &'a str,
    /// Left of it.
    pub y: &'a str,
}

/// A curve.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// Its points, from left to right.
    pub points: Vec<Point>,
    /// What it was smoothed from, drawn thin and pale.
    pub behind: Vec<(f64, f64)>,
    /// Draws intervals as a band rather than as bars.
    pub band: bool,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// To the right.
    pub x: f64,
    /// Upwards, with its interval.
    pub y: Estimate,
}

/// A value, and how sure it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its interval, lower end first.
    pub interval: Option<(f64, f64)>,
}

/// Values of one colour, one for each category.
#[derive(Clone, Debug)]
pub struct Group {
    /// What the legend calls it.
    pub name: String,
    /// In the order of the categories; a category may have none.
    pub values: Vec<Option<Estimate>>,
}

/// Predictions that are alike, and what came of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    /// Mean of the predicted probabilities.
    pub predicted: f64,
    /// Share that came true.
    pub observed: Estimate,
    /// Predictions.
    pub count: u64,
}

impl Series {
    /// A curve through points without intervals.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let points = points.into_iter().map(|(x, y)| Point { x, y: Estimate { value: y, interval: None } }).collect();
        Self { name: name.into(), points, ..Self::default() }
    }
}

/// Curves over a linear or, with `log_x`, a logarithmic axis, on which only what is greater than 0 has a place.
///
/// # Errors
/// If the plot cannot be drawn.
pub fn lines(labels: &Labels<'_>, log_x: bool, series: &[Series]) -> Result<String> {
    let place = |x: f64| if log_x { x.log10() } else { x };
    let shown = |series: &Series| {
        let points = series.points.iter().map(|point| Point { x: place(point.x), ..*point });
        let behind = series.behind.iter().map(|(x, y)| (place(*x), *y));
        Series {
            name: series.name.clone(),
            points: points.filter(|point| point.x.is_finite() && point.y.value.is_finite()).collect(),
            behind: thinned(behind.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()),
            band: series.band,
        }
    };
    let shown: Vec<Series> = series.iter().map(shown).collect();
    let points = || shown.iter().flat_map(|series| &series.points);
    let behind = || shown.iter().flat_map(|series| series.behind.iter().copied());
    let xs = points().map(|point| point.x).chain(behind().map(|(x, _)| x));
    let ys = points().flat_map(|point| ends(&point.y)).chain(behind().map(|(_, y)| y));
    let mut frame = Frame::new(labels, xs, ys);
    frame.log_x = log_x;
    frame.legend = legend(series.iter().map(|series| &series.name), Mark::Line);
    frame.draw(|chart| {
        for (i, series) in shown.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            chart.draw_series(LineSeries::new(series.behind.iter().copied(), colour.mix(0.3).stroke_width(2)))?;
            if series.band {
                let with = || series.points.iter().filter_map(|point| Some((point.x, finite(point.y.interval)?)));
                let mut outline: Vec<(f64, f64)> = with().map(|(x, (low, _))| (x, low)).collect();
                let start = outline.len();
                outline.extend(with().map(|(x, (_, high))| (x, high)));
                outline[start..].reverse();
                chart.draw_series([Polygon::new(outline, colour.mix(0.2).filled())])?;
            }
        }
        for (i, Series { points, band, .. }) in shown.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let curve = thinned(points.iter().map(|point| (point.x, point.y.value)).collect());
            chart.draw_series(LineSeries::new(curve, colour.stroke_width(4)))?;
            for point in points.iter().filter(|_| !band) {
                interval(chart, colour, point.y.interval, |y| (point.x, y))?;
            }
            if points.len() <= MARKED {
                chart.draw_series(points.iter().map(|p| Circle::new((p.x, p.y.value), 6, colour.filled())))?;
            }
        }
        Ok(())
    })
}

/// Histograms of sets of values with the same bins, over each other. Heights are shares of each set.
///
/// # Errors
/// If the plot cannot be drawn.
pub fn histograms(labels: &Labels<'_>, sets: &[(&str, &[f64])]) -> Result<String> {
    let values = || sets.iter().flat_map(|(_, values)| values.iter().copied()).filter(|value| value.is_finite());
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    let largest = sets.iter().map(|(_, values)| values.len()).max().unwrap_or(0);
    // Rice's rule, within what can be read.
    let bins = ((2.0 * (largest as f64).cbrt()).ceil() as usize).clamp(8, 50);
    let width = if high > low { (high - low) / bins as f64 } else { 1.0 };
    let low = if high > low { low } else { low - 0.5 * bins as f64 * width };
    let shares: Vec<Vec<f64>> = sets
        .iter()
        .map(|(_, values)| {
            let mut shares = vec![0.0; bins];
            for value in values.iter().filter(|value| value.is_finite()) {
                shares[(((value - low) / width) as usize).min(bins - 1)] += 1.0 / values.len() as f64;
            }
            shares
        })
        .collect();
    let edge = |bin: usize| low + bin as f64 * width;
    let xs = [edge(0), edge(bins)].into_iter().filter(|_| values().next().is_some());
    let ys = shares.iter().flatten().copied().chain([0.0]);
    let mut frame = Frame::new(labels, xs, ys);
    frame.from_zero = true;
    frame.legend = legend(sets.iter().map(|(name, _)| name), Mark::Area);
    frame.draw(|chart| {
        for (i, shares) in shares.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let bars = shares.iter().enumerate().filter(|(_, share)| **share > 0.0);
            let bar = |(bin, share): (usize, &f64)| [(edge(bin), 0.0), (edge(bin + 1), *share)];
            chart.draw_series(bars.map(bar).map(|corners| Rectangle::new(corners, colour.mix(0.35).filled())))?;
            // An outline, because where areas overlap their colours are neither's.
            let tops =
                shares.iter().enumerate().flat_map(|(bin, share)| [(edge(bin), *share), (edge(bin + 1), *share)]);
            let outline = [(edge(0), 0.0)].into_iter().chain(tops).chain([(edge(bins), 0.0)]);
            chart.draw_series(LineSeries::new(outline, colour.stroke_width(3)))?;
        }
        Ok(())
    })
}

/// Values with intervals, a row for each category from top to bottom; `reference`, such as what chance would give, is a
/// line through all of them. `x` is what the values are.
///
/// # Errors
/// If the plot cannot be drawn.
pub fn categories(labels: &Labels<'_>, names: &[String], groups: &[Group], reference: Option<f64>) -> Result<String> {
    let values = || groups.iter().flat_map(|group| group.values.iter().flatten());
    let xs = values().flat_map(ends).chain(reference).filter(|value| value.is_finite());
    let mut frame = Frame::new(labels, xs, [0.0, names.len() as f64].into_iter().filter(|_| !names.is_empty()));
    frame.rows = Some(names);
    frame.legend = legend(groups.iter().map(|group| &group.name), Mark::Dot);
    frame.draw(|chart| {
        if let Some(x) = reference {
            let line = vec![(x, 0.0), (x, names.len() as f64)];
            chart.draw_series([PathElement::new(line, BLACK.mix(0.5).stroke_width(3))])?;
        }
        for (i, group) in groups.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let offset = (i + 1) as f64 / (groups.len() + 1) as f64;
            for (row, estimate) in group.values.iter().enumerate().take(names.len()) {
                let Some(estimate) = estimate.filter(|estimate| estimate.value.is_finite()) else { continue };
                let y = names.len() as f64 - row as f64 - offset;
                interval(chart, colour, estimate.interval, |x| (x, y))?;
                chart.draw_series([Circle::new((estimate.value, y), 9, colour.filled())])?;
            }
        }
        Ok(())
    })
}

/// Predicted probabilities against how often they came true; the area of a point grows with its number of predictions.
///
/// # Errors
/// If the plot cannot be drawn.
pub fn calibration(title: &str, bins: &[Bin]) -> Result<String> {
    let labels = Labels { title, x: "predicted probability", y: "observed frequency" };
    let largest = bins.iter().map(|bin| bin.count).max().unwrap_or(0).max(1) as f64;
    let total: u64 = bins.iter().map(|bin| bin.count).sum();
    let mut frame = Frame::new(&labels, [0.0, 1.0].into_iter(), [0.0, 1.0].into_iter());
    frame.square = true;
    frame.legend = legend([format!("bins of {total} predictions, area by count")].iter(), Mark::Dot);
    frame.draw(|chart| {
        chart.draw_series([PathElement::new(vec![(0.0, 0.0), (1.0, 1.0)], BLACK.mix(0.5).stroke_width(3))])?;
        for bin in bins.iter().filter(|bin| bin.count > 0 && bin.observed.value.is_finite()) {
            interval(chart, COLOURS[0], bin.observed.interval, |y| (bin.predicted, y))?;
            let radius = (16.0 * (bin.count as f64 / largest).sqrt()).max(3.0) as i32;
            let point = (bin.predicted, bin.observed.value);
            chart.draw_series([Circle::new(point, radius, COLOURS[0].mix(0.8).filled())])?;
        }
        Ok(())
    })
}

/// Colours and names, unless there is only one without a name.
fn legend<T: ToString>(names: impl Iterator<Item = T>, mark: Mark) -> Vec<Entry> {
    let entry = |(i, name): (usize, T)| Entry { colour: COLOURS[i % COLOURS.len()], mark, name: name.to_string() };
    names.enumerate().map(entry).filter(|entry| !entry.name.is_empty()).collect()
}

fn finite(interval: Option<(f64, f64)>) -> Option<(f64, f64)> {
    interval.filter(|(low, high)| low.is_finite() && high.is_finite())
}

/// All that has to be seen of a value.
fn ends(estimate: &Estimate) -> impl Iterator<Item = f64> + use<> {
    let interval = finite(estimate.interval).into_iter().flat_map(|(low, high)| [low, high]);
    [estimate.value].into_iter().chain(interval)
}

/// A bar between the ends of an interval; `at` puts a number of its axis on the plot.
fn interval(
    chart: &mut Chart<'_, '_>,
    colour: RGBColor,
    interval: Option<(f64, f64)>,
    at: impl Fn(f64) -> (f64, f64),
) -> std::result::Result<(), Failed> {
    if let Some((low, high)) = finite(interval) {
        let bar = PathElement::new(vec![at(low), at(high)], colour.stroke_width(3));
        chart.draw_series([bar.into_dyn()])?;
    }
    Ok(())
}

/// At most [`DRAWN`] points: of neighbours, the least and the greatest.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= DRAWN {
        return points;
    }
    let ends = |part: &[(f64, f64)]| {
        let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut ends: Vec<_> = part.iter().min_by(by_y).into_iter().chain(part.iter().max_by(by_y)).copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends
    };
    points.chunks(points.len().div_ceil(DRAWN / 2)).flat_map(ends).collect()
}

#[cfg(test)]
mod tests;
