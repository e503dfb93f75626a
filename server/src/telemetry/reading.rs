//! The metrics, read back from the exposition: the recorder is the only place that counts.

use std::collections::BTreeMap;

use super::metrics::Metric;

/// Values of the samples of an exposition, by name and labels as they are written there.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading(BTreeMap<String, f64>);

impl Reading {
    /// Reads what `/metrics` answers.
    pub(super) fn parse(exposition: &str) -> Self {
        let samples = exposition.lines().filter(|line| !line.starts_with('#'));
        Self(samples.filter_map(|line| line.rsplit_once(' ')).filter_map(value).collect())
    }

    /// Only these metrics.
    pub(super) fn only(&self, metrics: &[Metric]) -> Self {
        let is_wanted = |key: &str| {
            let name = split(key).0;
            metrics.iter().any(|metric| name.strip_prefix(metric.name).is_some_and(is_suffix))
        };
        Self(self.0.iter().filter(|(key, _)| is_wanted(key)).map(|(key, value)| (key.clone(), *value)).collect())
    }

    /// What counters have counted since another reading; nothing where one was forgotten and began anew.
    pub(super) fn since(&self, before: &Self) -> Self {
        let growth =
            |(key, value): (&String, &f64)| (key.clone(), (value - before.0.get(key).unwrap_or(&0.0)).max(0.0));
        Self(self.0.iter().map(growth).collect())
    }

    /// The sum of a metric's samples that have these labels; of a histogram, `suffix` is `_sum` or `_count`.
    pub(super) fn sum(&self, metric: &Metric, suffix: &str, wanted: &[(&str, &str)]) -> f64 {
        // Of no numbers, `sum` is -0.
        self.samples(metric, suffix, wanted).fold(0.0, |sum, (_, value)| sum + value)
    }

    /// The values of a label that a metric has samples of.
    pub(super) fn values(&self, metric: &Metric, label: &str) -> Vec<String> {
        let samples = self.samples(metric, "", &[]);
        let mut values: Vec<_> = samples.filter_map(|(key, _)| get(split(key).1, label)).map(str::to_owned).collect();
        values.sort();
        values.dedup();
        values
    }

    /// A histogram: upper bounds and how many values lie between a bound and the one before, summed up over the samples
    /// that have these labels.
    pub(super) fn bins(&self, metric: &Metric, wanted: &[(&str, &str)]) -> Vec<(f64, f64)> {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for (key, count) in self.samples(metric, "_bucket", wanted) {
            let Some(bound) = get(split(key).1, "le").and_then(|bound| bound.parse::<f64>().ok()) else { continue };
            match buckets.iter_mut().find(|(other, _)| *other == bound) {
                Some((_, sum)) => *sum += count,
                None => buckets.push((bound, count)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let below = std::iter::once(0.0).chain(buckets.iter().map(|(_, count)| *count)).collect::<Vec<_>>();
        buckets.iter().zip(below).map(|((bound, count), below)| (*bound, count - below)).collect()
    }

    fn samples<'a>(
        &'a self,
        metric: &Metric,
        suffix: &str,
        wanted: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = (&'a str, f64)> {
        let name = format!("{}{suffix}", metric.name);
        let from = self.0.range(name.clone()..).take_while({
            let name = name.clone();
            move |(key, _)| key.starts_with(&name)
        });
        let has = |key: &str| wanted.iter().all(|(label, value)| get(split(key).1, label) == Some(&escaped(value)));
        from.filter(move |(key, _)| split(key).0 == name && has(key)).map(|(key, value)| (key.as_str(), *value))
    }
}

/// The value in `bins` below which there is this part of them, evenly spread within a bin.
pub(super) fn quantile(bins: &[(f64, f64)], part: f64) -> Option<f64> {
    let total: f64 = bins.iter().map(|(_, count)| count).sum();
    let mut rest = part * total;
    let mut lower = 0.0;
    for &(bound, count) in bins.iter().filter(|_| total > 0.0) {
        if rest <= count && bound.is_finite() {
            return Some(if count > 0.0 { lower + (bound - lower) * rest / count } else { lower });
        }
        if bound.is_finite() {
            lower = bound;
        }
        rest -= count;
    }
    (total > 0.0).then_some(lower)
}

fn value((key, value): (&str, &str)) -> Option<(String, f64)> {
    Some((key.to_owned(), value.parse().ok()?))
}

fn is_suffix(rest: &str) -> bool {
    ["", "_bucket", "_sum", "_count"].contains(&rest)
}

/// A sample's name and labels.
fn split(key: &str) -> (&str, &str) {
    key.split_once('{').unwrap_or((key, ""))
}

/// A label's value, escapes and all.
fn get<'a>(mut labels: &'a str, label: &str) -> Option<&'a str> {
    loop {
        let (name, rest) = labels.split_once("=\"")?;
        let mut is_escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
            ends
        })?;
        if name == label {
            return Some(&rest[..end]);
        }
        labels = rest[end + 1..].trim_start_matches(',');
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{QUEUE_TOKENS, REQUESTS, REWARD};
    use super::*;

    const EXPOSITION: &str = r#"# HELP plumb_queue_tokens Tokens.
# TYPE plumb_queue_tokens gauge
plumb_queue_tokens 7

plumb_requests_total{rpc="A",code="OK"} 5
plumb_requests_total{rpc="A",code="INTERNAL"} 2
plumb_requests_total{rpc="B \"},code=\"",code="OK"} 1
plumb_reward_bucket{model="pm",version="1",le="-1"} 1
plumb_reward_bucket{model="pm",version="1",le="0"} 1
plumb_reward_bucket{model="pm",version="1",le="10"} 4
plumb_reward_bucket{model="pm",version="1",le="+Inf"} 5
plumb_reward_bucket{model="pm",version="2",le="-1"} 3
plumb_reward_sum{model="pm",version="1"} -2.5
plumb_reward_count{model="pm",version="1"} 5
"#;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let reading = Reading::parse(EXPOSITION);
        assert_eq!(reading.sum(&QUEUE_TOKENS, "", &[]), 7.0);
        assert_eq!(reading.sum(&REQUESTS, "", &[]), 8.0);
        assert_eq!(reading.sum(&REQUESTS, "", &[("rpc", "A")]), 7.0);
        assert_eq!(reading.sum(&REQUESTS, "", &[("rpc", "A"), ("code", "OK")]), 5.0);
        assert_eq!(reading.sum(&REQUESTS, "", &[("rpc", "B \"},code=\"")]), 1.0);
        assert_eq!(reading.sum(&REQUESTS, "", &[("rpc", "C")]).to_string(), "0");
        assert_eq!(reading.sum(&REWARD, "_sum", &[("version", "1")]), -2.5);
        assert_eq!(reading.values(&REQUESTS, "code"), ["INTERNAL", "OK"]);
        assert_eq!(reading.only(&[REWARD]).sum(&REWARD, "_count", &[]), 5.0);
        assert_eq!(reading.only(&[REWARD]).sum(&REQUESTS, "", &[]), 0.0);
    }

    #[test]
    fn buckets_become_bins_and_quantiles() {
        let reading = Reading::parse(EXPOSITION);
        let bins = reading.bins(&REWARD, &[("version", "1")]);
        assert_eq!(bins, [(-1.0, 1.0), (0.0, 0.0), (10.0, 3.0), (f64::INFINITY, 1.0)]);
        assert_eq!(reading.bins(&REWARD, &[("version", "3")]), []);
        assert_eq!(quantile(&bins, 0.5), Some(5.0));
        // Nothing is known beyond the last bound.
        assert_eq!(quantile(&bins, 0.99), Some(10.0));
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[(1.0, 0.0)], 0.5), None);
    }

    #[test]
    fn growth_is_what_was_counted_since() {
        let before = Reading::parse("plumb_requests_total{rpc=\"A\",code=\"OK\"} 3\n");
        assert_eq!(Reading::parse(EXPOSITION).since(&before).sum(&REQUESTS, "", &[("code", "OK")]), 3.0);
    }
}
