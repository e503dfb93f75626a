//! A strict reader of the Prometheus text format, version 0.0.4: what a lenient one passes over is an error here.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::time::UNIX_EPOCH;

/// What `/metrics` says.
#[derive(Debug)]
pub struct Exposition {
    /// The families, in their order.
    pub families: Vec<Family>,
}

/// A metric: all series of one name.
#[derive(Debug)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// Its help.
    pub help: String,
    /// Its type.
    pub kind: Kind,
    /// Its samples, in their order.
    pub samples: Vec<Sample>,
}

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values in buckets.
    Histogram,
}

/// A line with a value.
#[derive(Debug)]
pub struct Sample {
    /// The family's name; of a histogram, with `_bucket`, `_sum` or `_count`.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

impl Exposition {
    /// Reads it.
    ///
    /// # Errors
    /// What the format or the type of a metric does not allow.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.is_empty() && !text.ends_with('\n') {
            return Err("the last line is not complete".to_owned());
        }
        let mut families: Vec<Family> = Vec::new();
        let mut lines = text.lines().filter(|line| !line.is_empty()).peekable();
        while let Some(line) = lines.next() {
            let (name, help) = comment(line, "HELP")?;
            let next = lines.next().unwrap_or_default();
            let (typed, kind) = comment(next, "TYPE")?;
            if typed != name {
                return Err(format!("`{next}` follows the help of {name}"));
            }
            if families.iter().any(|family| family.name == name) {
                return Err(format!("{name} is there twice"));
            }
            let mut samples = Vec::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                samples.push(sample(line).map_err(|error| format!("{error} in `{line}`"))?);
            }
            let family = Family { name: name.to_owned(), help: help.to_owned(), kind: kind.parse()?, samples };
            family.check().map_err(|error| format!("{name}: {error}"))?;
            families.push(family);
        }
        Ok(Self { families })
    }

    /// The sum of all samples of a name that have these labels; 0 if there is none.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has =
            |sample: &Sample| labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value));
        let samples = self.families.iter().flat_map(|family| &family.samples);
        samples.filter(|sample| sample.name == name && has(sample)).fold(0.0, |sum, sample| sum + sample.value)
    }

    /// Whether a version was in trouble within the last hour, for a reason.
    pub fn trouble(&self, model: &str, version: &str, reason: &str) -> bool {
        let labels = [("model", model), ("version", version), ("reason", reason)];
        let at = self.value("plumb_model_trouble_timestamp_seconds", &labels);
        UNIX_EPOCH.elapsed().is_ok_and(|now| (0.0..3600.0).contains(&(now.as_secs_f64() - at)))
    }
}

impl Family {
    fn check(&self) -> Result<(), String> {
        if self.help.is_empty() {
            return Err("has no help".to_owned());
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.samples.iter().find(|sample| !seen.insert((&sample.name, &sample.labels))) {
            return Err(format!("{twice:?} is there twice"));
        }
        match self.kind {
            Kind::Histogram => self.check_histogram(),
            _ => match self.samples.iter().find(|sample| sample.name != self.name || sample.value.is_nan()) {
                Some(sample) => Err(format!("{sample:?} does not belong")),
                None if self.kind == Kind::Gauge => Ok(()),
                None if !self.name.ends_with("_total") => Err("a counter's name ends with _total".to_owned()),
                None if self.samples.iter().any(|sample| sample.value < 0.0) => Err("a counter is negative".to_owned()),
                None => Ok(()),
            },
        }
    }

    /// Each series: buckets with rising bounds and counts up to +Inf, then a sum and a count.
    fn check_histogram(&self) -> Result<(), String> {
        let mut series: BTreeMap<BTreeMap<String, String>, Vec<&Sample>> = BTreeMap::new();
        for sample in &self.samples {
            let mut labels = sample.labels.clone();
            labels.remove("le");
            series.entry(labels).or_default().push(sample);
        }
        for (labels, samples) in series {
            let [buckets @ .., sum, count] = &samples[..] else { return Err(format!("{labels:?} is not complete")) };
            let is = |sample: &Sample, part: &str| {
                sample.name.strip_prefix(&self.name) == Some(part)
                    && sample.labels.contains_key("le") == (part == "_bucket")
            };
            if !buckets.iter().all(|sample| is(sample, "_bucket")) || !is(sum, "_sum") || !is(count, "_count") {
                return Err(format!("{labels:?} has samples that do not belong"));
            }
            let bounds = buckets.iter().map(|sample| number(&sample.labels["le"])).collect::<Result<Vec<_>, _>>()?;
            if !bounds.windows(2).all(|pair| pair[0] < pair[1]) || bounds.last() != Some(&f64::INFINITY) {
                return Err(format!("the bounds of {labels:?} are {bounds:?}"));
            }
            let counts: Vec<f64> = buckets.iter().map(|sample| sample.value).collect();
            if !counts.is_sorted() || counts.last() != Some(&count.value) || counts.iter().any(|n| n.fract() != 0.0) {
                return Err(format!("{labels:?} counts {counts:?}, {} in all", count.value));
            }
        }
        Ok(())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "counter" => Ok(Self::Counter),
            "gauge" => Ok(Self::Gauge),
            "histogram" => Ok(Self::Histogram),
            other => Err(format!("`{other}` is no type that is served")),
        }
    }
}

/// `# WORD name text`.
fn comment<'a>(line: &'a str, word: &str) -> Result<(&'a str, &'a str), String> {
    let rest = line.strip_prefix("# ").and_then(|line| line.strip_prefix(word)).and_then(|line| line.strip_prefix(' '));
    let (name, text) = rest.and_then(|rest| rest.split_once(' ')).ok_or(format!("`{line}` is no {word}"))?;
    if is_name(name) { Ok((name, text)) } else { Err(format!("`{name}` is no name")) }
}

/// `name{key="value",...} value`, without a time.
fn sample(line: &str) -> Result<Sample, String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let (name, mut rest) = line.split_at(end);
    if !is_name(name) {
        return Err(format!("`{name}` is no name"));
    }
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (key, after) = rest.split_once("=\"").ok_or("a label without a value")?;
            if !is_name(key) || key.contains(':') {
                return Err(format!("`{key}` is no label"));
            }
            let (value, after) = quoted(after)?;
            if labels.insert(key.to_owned(), value).is_some() {
                return Err(format!("label `{key}` is there twice"));
            }
            match (after.strip_prefix(','), after.strip_prefix('}')) {
                (Some(more), _) => rest = more,
                (_, Some(end)) => break rest = end,
                _ => return Err("labels without an end".to_owned()),
            }
        }
    }
    let value = rest.strip_prefix(' ').ok_or("no value")?;
    Ok(Sample { name: name.to_owned(), labels, value: number(value)? })
}

/// The value of a label up to its quotation mark, and what follows.
fn quoted(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, '\\')) => value.push('\\'),
                Some((_, '"')) => value.push('"'),
                Some((_, 'n')) => value.push('\n'),
                _ => return Err("an unknown escape".to_owned()),
            },
            c => value.push(c),
        }
    }
    Err("a label's value without an end".to_owned())
}

fn number(text: &str) -> Result<f64, String> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        // Rust reads more spellings of infinity than the format has.
        _ if text.contains(|c: char| !c.is_ascii_digit() && !"+-.eE".contains(c)) => {
            Err(format!("`{text}` is no number"))
        }
        _ => text.parse().map_err(|_| format!("`{text}` is no number")),
    }
}

fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.chars().all(fits) && text.starts_with(|c: char| fits(c) && !c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_labels() {
        let text =
            "# HELP a_total Why.\n# TYPE a_total counter\na_total{x=\"1\",y=\"a\\\"b\"} 2\na_total{x=\"2\"} 3e1\n\n";
        let exposition = Exposition::parse(text).unwrap();
        assert_eq!(exposition.value("a_total", &[]), 32.0);
        assert_eq!(exposition.value("a_total", &[("y", "a\"b")]), 2.0);
        assert_eq!(exposition.value("a_total", &[("x", "3")]), 0.0);
    }

    #[test]
    fn what_is_not_exact_is_refused() {
        let head = |kind: &str| format!("# HELP a Why.\n# TYPE a {kind}\n");
        let check = |text: String, words: &str| {
            let error = Exposition::parse(&text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        };
        check(head("gauge") + "a 1", "not complete");
        check("a 1\n".to_owned(), "no HELP");
        check("# HELP a Why.\na 1\n".to_owned(), "no TYPE");
        check("# HELP a Why.\n# TYPE b gauge\n".to_owned(), "follows");
        check(head("summary"), "no type");
        check(head("gauge") + &head("gauge"), "twice");
        check(head("gauge") + "b 1\n", "does not belong");
        check(head("gauge") + "a{x=\"1\"} 1\na{x=\"1\"} 2\n", "twice");
        check(head("gauge") + "a{x=\"1\" 1\n", "without an end");
        check(head("gauge") + "a{0x=\"1\"} 1\n", "no label");
        check(head("gauge") + "a infinity\n", "no number");
        check(head("gauge") + "a 1 1700000000\n", "no number");
        check(head("counter") + "a 1\n", "_total");
        let histogram = |lines: &str| head("histogram") + lines;
        check(histogram("a_bucket{le=\"1\"} 1\na_sum 1\na_count 1\n"), "bounds");
        check(
            histogram("a_bucket{le=\"2\"} 1\na_bucket{le=\"1\"} 1\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n"),
            "bounds",
        );
        check(histogram("a_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n"), "counts");
        check(histogram("a_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 2\n"), "counts");
        check(histogram("a_bucket{le=\"+Inf\"} 1\na_count 1\n"), "belong");
    }
}
