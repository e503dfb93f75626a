//! What was measured: histograms and sums, as a table or a line of JSON.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;
use plumb_client::{Error, code_name};
use serde::Serialize;
use tokio::time::Instant;

use super::drive::Pace;
use super::workload::Answer;
use crate::cli::output::table;

/// Gathers answers from many tasks.
pub(super) struct Recorder(Mutex<Sums>);

struct Sums {
    /// Latency in microseconds, of requests that were answered.
    latency: Histogram<u64>,
    /// Time to the first token in microseconds.
    first_token: Histogram<u64>,
    /// Tokens/s of a stream after its first token, times 100.
    stream_rate: Histogram<u64>,
    answered: u64,
    sequences: u64,
    input_tokens: u64,
    cached_tokens: u64,
    new_tokens: u64,
    /// Requests and, apart from them, items that failed.
    errors: BTreeMap<String, u64>,
    example: Option<String>,
}

impl Recorder {
    pub(super) fn new() -> anyhow::Result<Arc<Self>> {
        // Three significant digits; grows as needed.
        let histogram = || Histogram::new(3);
        Ok(Arc::new(Self(Mutex::new(Sums {
            latency: histogram()?,
            first_token: histogram()?,
            stream_rate: histogram()?,
            answered: 0,
            sequences: 0,
            input_tokens: 0,
            cached_tokens: 0,
            new_tokens: 0,
            errors: BTreeMap::new(),
            example: None,
        }))))
    }

    /// Counts an answer to a request that began, or should have begun, at `begun`.
    pub(super) fn record(&self, begun: Instant, answer: Result<Answer, Error>) {
        let latency = begun.elapsed();
        // A panic elsewhere does not make the counts wrong.
        let mut sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                *sums.errors.entry(code_name(error.code()).into()).or_default() += 1;
                sums.example.get_or_insert_with(|| error.to_string());
                return;
            }
        };
        sums.answered += 1;
        add(&mut sums.latency, latency.as_micros() as u64);
        sums.sequences += answer.sequences;
        sums.input_tokens += answer.input_tokens;
        sums.cached_tokens += answer.cached_tokens;
        sums.new_tokens += answer.new_tokens;
        for code in answer.failures {
            *sums.errors.entry(format!("item {}", code_name(code))).or_default() += 1;
        }
        if let (Some(first), Some(last)) = (answer.first_token, answer.last_token) {
            let wait = first.saturating_duration_since(begun.into_std());
            add(&mut sums.first_token, wait.as_micros() as u64);
            let seconds = last.saturating_duration_since(first).as_secs_f64();
            if answer.new_tokens > 1 && seconds > 0.0 {
                let rate = (answer.new_tokens - 1) as f64 / seconds;
                add(&mut sums.stream_rate, (rate * 100.0) as u64);
            }
        }
    }

    /// What a failure said, if nothing succeeded.
    pub(super) fn hopeless(&self) -> Option<String> {
        let sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sums.answered == 0 { sums.example.clone() } else { None }
    }

    pub(super) fn report(&self, workload: String, pace: Pace, seconds: f64) -> Report {
        let sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let per_second = |n: u64| n as f64 / seconds;
        Report {
            workload,
            pace: pace.to_string(),
            seconds,
            requests: sums.answered,
            sequences: sums.sequences,
            input_tokens: sums.input_tokens,
            cached_tokens: sums.cached_tokens,
            requests_per_s: per_second(sums.answered),
            sequences_per_s: per_second(sums.sequences),
            input_tokens_per_s: per_second(sums.input_tokens),
            latency_ms: Percentiles::of(&sums.latency, 1e-3),
            generation: (!sums.first_token.is_empty()).then(|| Generation {
                new_tokens: sums.new_tokens,
                new_tokens_per_s: per_second(sums.new_tokens),
                first_token_ms: Percentiles::of(&sums.first_token, 1e-3),
                stream_tokens_per_s: Percentiles::of(&sums.stream_rate, 1e-2),
            }),
            errors: sums.errors.clone(),
            example: sums.example.clone(),
        }
    }
}

fn add(histogram: &mut Histogram<u64>, value: u64) {
    // A histogram that grows takes every value; `saturating_record` alone would not let it grow.
    if histogram.record(value).is_err() {
        histogram.saturating_record(value);
    }
}

/// The result of a measurement.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    workload: String,
    pace: String,
    seconds: f64,
    requests: u64,
    sequences: u64,
    input_tokens: u64,
    cached_tokens: u64,
    requests_per_s: f64,
    sequences_per_s: f64,
    input_tokens_per_s: f64,
    latency_ms: Option<Percentiles>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<Generation>,
    errors: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    example: Option<String>,
}

#[derive(Debug, Serialize)]
struct Generation {
    new_tokens: u64,
    new_tokens_per_s: f64,
    first_token_ms: Option<Percentiles>,
    stream_tokens_per_s: Option<Percentiles>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Percentiles {
    min: f64,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>, unit: f64) -> Option<Self> {
        if histogram.is_empty() {
            return None;
        }
        let at = |q| histogram.value_at_quantile(q) as f64 * unit;
        Some(Self {
            min: histogram.min() as f64 * unit,
            mean: histogram.mean() * unit,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: histogram.max() as f64 * unit,
        })
    }

    fn row(name: &str, values: Option<Self>) -> Option<[String; 7]> {
        let v = values?;
        let number = |x: f64| format!("{x:.1}");
        Some([name.into(), number(v.min), number(v.mean), number(v.p50), number(v.p90), number(v.p99), number(v.max)])
    }
}

impl Report {
    pub(super) fn failed(&self) -> bool {
        !self.errors.is_empty()
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{}\n{}, {:.1} s\n\n{} requests, {:.2} requests/s, {:.2} seq/s, {:.0} tok/s in ({} of {} tokens cached)\n",
            self.workload,
            self.pace,
            self.seconds,
            self.requests,
            self.requests_per_s,
            self.sequences_per_s,
            self.input_tokens_per_s,
            self.cached_tokens,
            self.input_tokens,
        );
        let mut rows = vec![Percentiles::row("latency, ms", self.latency_ms)];
        if let Some(generation) = &self.generation {
            text += &format!("{} new tokens, {:.1} tok/s out\n", generation.new_tokens, generation.new_tokens_per_s);
            rows.push(Percentiles::row("first token, ms", generation.first_token_ms));
            rows.push(Percentiles::row("stream, tok/s", generation.stream_tokens_per_s));
        }
        text += "\n";
        text += &table(["", "min", "mean", "p50", "p90", "p99", "max"], rows.into_iter().flatten());
        for (code, n) in &self.errors {
            text += &format!("\nfailed: {n} {code}");
        }
        if let Some(example) = &self.example {
            text += &format!("\nfor example: {example}");
        }
        text + if self.failed() { "\n" } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn numbers_of_a_measurement() {
        let recorder = Recorder::new().unwrap();
        let begun = Instant::now();
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(1)).await;
            let answer = Answer { sequences: 2, input_tokens: 10, cached_tokens: 4, ..Answer::default() };
            recorder.record(begun, Ok(answer));
        }
        recorder.record(begun, Err(Error::Contract("odd".into())));
        let report = recorder.report("w".into(), Pace::Closed { concurrency: 1 }, 0.1);
        let latency = report.latency_ms.unwrap();
        for (value, expect) in [(latency.p50, 50.0), (latency.p90, 90.0), (latency.p99, 99.0), (latency.max, 100.0)] {
            assert!((value / expect - 1.0).abs() < 2e-3, "{value}, expected {expect}");
        }
        assert_eq!(
            (report.requests, report.sequences, report.input_tokens, report.cached_tokens),
            (100, 200, 1000, 400)
        );
        assert!((report.sequences_per_s - 2000.0).abs() < 1e-6 && (report.input_tokens_per_s - 10_000.0).abs() < 1e-6);
        assert_eq!(report.errors, BTreeMap::from([("INTERNAL".into(), 1)]));
        assert!(report.failed() && report.generation.is_none() && report.table().contains("failed: 1 INTERNAL"));
        assert_eq!(recorder.hopeless(), None);
    }
}
