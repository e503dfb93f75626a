//! An axis: a range of numbers, and round ones among them that are written beside it.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// A range, and what is written beside it where.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    range: (f64, f64),
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// For numbers between these.
    pub(super) fn linear(low: f64, high: f64) -> Self {
        let ticks = round_numbers(low, high);
        let name = |x: &f64| (*x, number(*x, &ticks));
        Self { range: (low, high), ticks: ticks.iter().map(name).collect() }
    }

    /// For logarithms to base 10 between these.
    pub(super) fn logarithmic(low: f64, high: f64) -> Self {
        let name = |x: f64| (x, number(10f64.powf(x), &[]));
        Self { range: (low, high), ticks: decades(low, high).into_iter().map(name).collect() }
    }

    /// For rows of height 1, the first on top.
    pub(super) fn rows(names: impl ExactSizeIterator<Item = String>) -> Self {
        let height = names.len() as f64;
        let ticks = names.enumerate().map(|(row, name)| (height - row as f64 - 0.5, name)).collect();
        Self { range: (0.0, height), ticks }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let (low, high) = self.range;
        first.saturating_add((f64::from(last - first) * (value - low) / (high - low)).round() as i32)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(x, _)| *x).collect()
    }

    fn range(&self) -> Range<f64> {
        self.range.0..self.range.1
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.ticks.iter().find(|(x, _)| x == value).map(|(_, name)| name.clone()).unwrap_or_default()
    }
}

/// Some four to eight multiples of 1, 2 or 5 times a power of ten.
fn round_numbers(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Logarithms of powers of ten; of their multiples by 2 and 5 too, where there are few.
fn decades(low: f64, high: f64) -> Vec<f64> {
    let factors: &[f64] = if high - low < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let every = (((high - low) / 8.0).ceil() as usize).max(1);
    let powers = (low.floor() as i64..=high.ceil() as i64).step_by(every);
    let all = powers.flat_map(|power| factors.iter().map(move |factor| power as f64 + factor.log10()));
    all.filter(|x| (low - 1e-9..=high + 1e-9).contains(x)).collect()
}

/// A number with as many digits as tell it from its neighbours; alone, with its first one.
fn number(value: f64, neighbours: &[f64]) -> String {
    let step = match neighbours {
        [first, second, ..] => second - first,
        _ => value.abs(),
    };
    // 0, and what rounding left of it.
    if value.abs() <= 1e-9 * step {
        return "0".to_owned();
    }
    // A step of 0.1 is a little less or more than that.
    let power = (step * (1.0 + 1e-9)).log10().floor();
    if step < 1e-4 || value.abs() >= 1e7 {
        let digits = (value.abs() * (1.0 + 1e-9)).log10().floor() - power;
        return format!("{value:.*e}", digits.clamp(0.0, 6.0) as usize);
    }
    let decimals = (-power).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    if decimals == 0 && value.abs() >= 1e4 { separated(&text) } else { text }
}

/// With thousands apart.
fn separated(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let parts = digits.as_bytes().rchunks(3).rev().map(|part| String::from_utf8_lossy(part).into_owned());
    format!("{sign}{}", parts.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_numbers_stand_beside_an_axis() {
        let check = |axis: Axis, expected: &[&str]| {
            assert_eq!(axis.ticks.iter().map(|(_, name)| name).collect::<Vec<_>>(), expected, "{axis:?}");
        };
        check(Axis::linear(0.0, 1.0), &["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        check(Axis::linear(-0.13, 0.31), &["-0.1", "0", "0.1", "0.2", "0.3"]);
        check(Axis::linear(0.0, 3.5e-5), &["0", "5e-6", "1.0e-5", "1.5e-5", "2.0e-5", "2.5e-5", "3.0e-5", "3.5e-5"]);
        check(Axis::linear(0.0, 52_000.0), &["0", "10,000", "20,000", "30,000", "40,000", "50,000"]);
        check(Axis::linear(999.0, 1001.0), &["999.0", "999.5", "1000.0", "1000.5", "1001.0"]);
        check(Axis::linear(-1.5e9, 0.0), &["-1.4e9", "-1.2e9", "-1.0e9", "-8e8", "-6e8", "-4e8", "-2e8", "0"]);
        check(Axis::logarithmic(2.0, 4.0), &["100", "200", "500", "1000", "2000", "5000", "10,000"]);
        check(Axis::logarithmic(-3.0, 0.0), &["0.001", "0.01", "0.1", "1"]);
        check(Axis::rows(["a".to_owned(), "b".to_owned()].into_iter()), &["a", "b"]);
    }
}
