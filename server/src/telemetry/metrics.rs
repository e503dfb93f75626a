//! Every metric: its name, type, unit, buckets and help. Labels are `model`, `version`, `rpc`, `code`, `reason` and
//! `device`, and for the constant info metrics what they inform about.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::Unit;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;

use crate::error::{Error, Result};
use crate::telemetry::events::process::MemorySampled;
use crate::telemetry::gauges::{KEPT, Keeper};

/// How often samples are folded into histograms, gauges are kept and memory is measured.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What stands still for so long leaves the exposition, but for gauges that are [kept](super::gauges): where an RL loop
/// loads a version at every step, metrics of past versions would fill it.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A metric's type.
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values in buckets with these upper bounds.
    Histogram(&'static [f64]),
}

/// A metric's description.
pub(crate) struct Metric {
    /// Its name in the exposition.
    pub(crate) name: &'static str,
    kind: Kind,
    unit: Unit,
    help: &'static str,
}

/// From a tokenized word to a full queue: 0.25 ms to 2 minutes, three buckets a decade where most calls fall.
const SECONDS: &[f64] =
    &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// A fixture loads in milliseconds, a large checkpoint from a slow disk in an hour.
const LOAD_SECONDS: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// Powers of two up to several times the largest batch that is usual.
const TOKENS: &[f64] =
    &[1.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0];
const SEQUENCES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
/// Rewards are unbounded logits around zero; a drift between versions has to show in the middle.
const REWARDS: &[f64] = &[
    -50.0, -20.0, -10.0, -7.5, -5.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0,
    50.0,
];

macro_rules! metrics {
    ($($constant:ident = $name:literal, $kind:expr, $unit:ident, $help:literal;)*) => {
        $(pub(crate) const $constant: Metric =
            Metric { name: $name, kind: $kind, unit: Unit::$unit, help: $help };)*
        /// All of them, to describe.
        const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    REQUESTS = "plumb_requests_total", Kind::Counter, Count, "Calls that ended, by rpc and status code.";
    REQUESTS_IN_FLIGHT = "plumb_requests_in_flight", Kind::Gauge, Count, "Calls that are being worked on, by rpc.";
    REQUEST_DURATION = "plumb_request_duration_seconds", Kind::Histogram(SECONDS), Seconds, "From the arrival of a call to the end of its answer.";
    TOKENIZE_DURATION = "plumb_tokenize_duration_seconds", Kind::Histogram(SECONDS), Seconds, "Rendering and tokenizing of a call's items.";
    QUEUE_DURATION = "plumb_queue_duration_seconds", Kind::Histogram(SECONDS), Seconds, "The longest wait of a call's items for a batch.";
    INFERENCE_DURATION = "plumb_inference_duration_seconds", Kind::Histogram(SECONDS), Seconds, "From the first batch that held an item of a call to the end of the last.";
    QUEUE_SEQUENCES = "plumb_queue_sequences", Kind::Gauge, Count, "Sequences that wait for a batch.";
    QUEUE_TOKENS = "plumb_queue_tokens", Kind::Gauge, Count, "Tokens that wait for a batch.";
    ADMITTED_TOKENS = "plumb_admitted_tokens", Kind::Gauge, Count, "Tokens of work that are admitted and not yet done.";
    ADMITTED_PROMPT_TOKENS = "plumb_admitted_prompt_tokens", Kind::Gauge, Count, "Tokens of prompts that are admitted and not yet computed; plumb_admission_limit_tokens is their limit.";
    ADMISSION_LIMIT = "plumb_admission_limit_tokens", Kind::Gauge, Count, "Tokens of prompts that may be admitted and not yet computed: --max-queue-tokens, or what the server does in about a second.";
    ADMISSION_CLIENTS = "plumb_admission_clients", Kind::Gauge, Count, "Clients with admitted work, or that were told to come back.";
    ADMISSION_WAIT = "plumb_admission_wait_seconds", Kind::Gauge, Seconds, "How long the prompts that are admitted take at the pace of late.";
    ADMISSION_REFUSALS = "plumb_admission_refusals_total", Kind::Counter, Count, "Calls and requests of streams that were turned away, also after they had waited, by reason: queue, share, late, hopeless, too_large, calls, client_calls, memory.";
    REJECTIONS = "plumb_rejections_total", Kind::Counter, Count, "Calls that were turned away before any work was done on them, by reason.";
    BATCHES = "plumb_batches_total", Kind::Counter, Count, "Batches that ran.";
    BATCH_SEQUENCES = "plumb_batch_sequences", Kind::Histogram(SEQUENCES), Count, "Sequences in a batch.";
    BATCH_TOKENS = "plumb_batch_tokens", Kind::Histogram(TOKENS), Count, "Tokens that a batch computed.";
    BATCH_DURATION = "plumb_batch_duration_seconds", Kind::Histogram(SECONDS), Seconds, "Time that a batch took.";
    BATCH_FAILURES = "plumb_batch_failures_total", Kind::Counter, Count, "Batches that failed as a whole; their sequences began again in smaller ones.";
    BATCH_RERUNS = "plumb_batch_reruns_total", Kind::Counter, Count, "Batches that ran to find out which sequence made another one fail.";
    ISOLATED_INPUTS = "plumb_isolated_inputs_total", Kind::Counter, Count, "Inputs that were found to make batches fail; each is answered as an error.";
    ENGINE_LOSSES = "plumb_engine_losses_total", Kind::Counter, Count, "1 once the engine cannot compute any more, by reason: died, broken or stuck.";
    INPUT_TOKENS = "plumb_input_tokens", Kind::Histogram(TOKENS), Count, "Tokens of an item or a prompt; the sum counts all input tokens.";
    PREFIX_LOOKUPS = "plumb_prefix_lookups_total", Kind::Counter, Count, "Sequences that looked for their beginning in the cache.";
    PREFIX_HITS = "plumb_prefix_hits_total", Kind::Counter, Count, "Sequences that found a part of their beginning in the cache.";
    PREFIX_CACHED_TOKENS = "plumb_prefix_cached_tokens_total", Kind::Counter, Count, "Input tokens whose state was already computed.";
    PREFIX_EVICTIONS = "plumb_prefix_evictions_total", Kind::Counter, Count, "Pages of cached keys and values that were given up for others.";
    TRUNCATED = "plumb_truncated_total", Kind::Counter, Count, "Inputs that were cut because truncation was asked for.";
    ITEM_FAILURES = "plumb_item_failures_total", Kind::Counter, Count, "Items of a call that failed, by status code.";
    GENERATED_TOKENS = "plumb_generated_tokens_total", Kind::Counter, Count, "Tokens that were sampled.";
    REWARD = "plumb_reward", Kind::Histogram(REWARDS), Count, "Rewards of a preference model; compare versions to see drift.";
    NON_FINITE = "plumb_non_finite_total", Kind::Counter, Count, "NaN and infinite values that a model computed; each is answered as an error.";
    MODEL_STATE = "plumb_model_state", Kind::Gauge, Count, "State of a version, as numbered in plumb.v1.ModelState: 4 is available, 7 failed.";
    MODEL_TROUBLE = "plumb_model_trouble_timestamp_seconds", Kind::Gauge, Seconds, "When a version last was in trouble, in seconds since 1970, by reason: non_finite, batch_failed, failed, rolled_back.";
    MODEL_INFO = "plumb_model_info", Kind::Gauge, Count, "1 for every version in memory, with its digest, dtype and kind.";
    MODEL_WEIGHT_BYTES = "plumb_model_weight_bytes", Kind::Gauge, Bytes, "Memory of a version's weights.";
    MODEL_CACHE_BYTES = "plumb_model_cache_bytes", Kind::Gauge, Bytes, "Memory of a version's keys and values, taken when it is loaded, on the CPU or GPUs.";
    MODEL_RESIDENT_BYTES = "plumb_model_resident_bytes", Kind::Gauge, Bytes, "Memory of a version, on the CPU or GPUs: weights, keys and values, buffers of a batch.";
    MODEL_ACTIVE_VERSION = "plumb_model_active_version", Kind::Gauge, Count, "The version that a call gets which names none.";
    MODEL_SWAPS = "plumb_model_swaps_total", Kind::Counter, Count, "Times that a call which names no version began to get another one.";
    MODEL_ROLLBACKS = "plumb_model_rollbacks_total", Kind::Counter, Count, "Versions that were taken out of service because they were bad.";
    MODEL_LOADS = "plumb_model_loads_total", Kind::Counter, Count, "Loads that ended, by status code.";
    MODEL_LOAD_DURATION = "plumb_model_load_duration_seconds", Kind::Histogram(LOAD_SECONDS), Seconds, "From the request for a version until it was available.";
    CONNECTIONS = "plumb_connections", Kind::Gauge, Count, "Connections that are open; --max-connections is the limit of each listener.";
    CONNECTIONS_REFUSED = "plumb_connections_refused_total", Kind::Counter, Count, "Connections that were not let in, by reason.";
    CERTIFICATE_EXPIRY = "plumb_tls_certificate_expiry_timestamp_seconds", Kind::Gauge, Seconds, "When the server's certificate ends, in seconds since 1970.";
    CERTIFICATE_LOADS = "plumb_tls_certificate_loads_total", Kind::Counter, Count, "Times that the certificate was read, by status code; after anything but OK the one before stays.";
    KEY_LOADS = "plumb_key_loads_total", Kind::Counter, Count, "Times that the files of keys and tokens were read, by status code; after anything but OK the keys from before stay.";
    RECORDS = "plumb_records_total", Kind::Counter, Count, "Calls that were written to --record-dir.";
    RECORD_DROPPED = "plumb_record_dropped_total", Kind::Counter, Count, "Calls that were to be recorded and were not, by reason: queue_full, disk, too_long, closed.";
    READY = "plumb_ready", Kind::Gauge, Count, "1 while the server as a whole is SERVING.";
    RESIDENT_MEMORY = "plumb_resident_memory_bytes", Kind::Gauge, Bytes, "Physical memory of the process.";
    START_TIME = "plumb_start_time_seconds", Kind::Gauge, Seconds, "When the process began, in seconds since 1970.";
    BUILD_INFO = "plumb_build_info", Kind::Gauge, Count, "1, with the version of the server.";
}

/// The process's metrics. They are the process's and not a server's, so that events need no handle: several servers in
/// one process, as in tests, share them.
///
/// # Errors
/// If another recorder is installed.
pub fn install() -> Result<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Result<PrometheusHandle>> = OnceLock::new();
    let handle = HANDLE.get_or_init(recorder);
    handle.as_ref().map_err(Clone::clone)
}

fn recorder() -> Result<PrometheusHandle> {
    let wrong = |error: &dyn std::fmt::Display| Error::internal(format!("metrics: {error}"));
    let mut builder = PrometheusBuilder::new().idle_timeout(MetricKindMask::ALL, Some(FORGOTTEN_AFTER));
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            let matcher = Matcher::Full(metric.name.to_owned());
            builder = builder.set_buckets_for_metric(matcher, buckets).map_err(|error| wrong(&error))?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    let keeper = Keeper { recorder, kept: Arc::clone(&KEPT) };
    metrics::set_global_recorder(keeper).map_err(|error| wrong(&error))?;
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.help),
            Kind::Histogram(_) => metrics::describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
    metrics::gauge!(BUILD_INFO.name, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    metrics::gauge!(START_TIME.name).set(now());
    Ok(handle)
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    // A clock that is before that tells nothing.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Keeps histograms small, gauges from being forgotten and that of memory fresh, for as long as it is polled.
pub async fn upkeep(handle: &PrometheusHandle) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        handle.run_upkeep();
        KEPT.touch();
        if let Some(bytes) = resident_memory() {
            MemorySampled { bytes }.emit();
        }
    }
}

/// Physical memory of this process; `None` where there is no procfs.
fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        let mut names = std::collections::BTreeSet::new();
        for metric in ALL {
            let name = metric.name;
            assert!(names.insert(name), "{name} is there twice");
            assert!(name.starts_with("plumb_"), "{name}");
            assert!(metric.help.ends_with('.'), "the help of {name} is a sentence");
            assert_eq!(name.ends_with("_total"), matches!(metric.kind, Kind::Counter), "{name}");
            assert_eq!(name.ends_with("_seconds"), metric.unit == Unit::Seconds, "{name}");
            assert_eq!(name.ends_with("_bytes"), metric.unit == Unit::Bytes, "{name}");
            if let Kind::Histogram(buckets) = metric.kind {
                assert!(buckets.is_sorted(), "buckets of {name}");
            }
        }
    }

    #[test]
    fn dashboard_and_rules_name_metrics_that_are_there() {
        let dashboard = include_str!("../../../deploy/grafana/plumb.json");
        let rules = include_str!("../../../deploy/prometheus/rules.yml");
        let is_known = |word: &str| {
            ALL.iter().any(|metric| match (word.strip_prefix(metric.name), &metric.kind) {
                (Some("_bucket" | "_sum" | "_count"), Kind::Histogram(_)) => true,
                (Some(rest), kind) => rest.is_empty() && !matches!(kind, Kind::Histogram(_)),
                (None, _) => false,
            })
        };
        // Recorded series have a colon after the first word.
        let words = [dashboard, rules].map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
        let unknown: Vec<_> =
            words.into_iter().flatten().filter(|word| word.starts_with("plumb_") && !is_known(word)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn memory_is_measured() {
        assert!(resident_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
