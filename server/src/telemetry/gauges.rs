//! Keeps gauges in the exposition for as long as what they tell of is there.
//!
//! The exporter forgets whatever nobody touches for a day, which suits counters and histograms: those of past versions
//! would fill the exposition where an RL loop loads a version at every step. A gauge may be right for longer than that,
//! so all of them are touched now and then; only those of versions that are no longer listed are left to be forgotten.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit};

/// Those of the process.
pub(super) static KEPT: LazyLock<Arc<Kept>> = LazyLock::new(Arc::default);

/// Gauges that are touched.
#[derive(Default)]
pub(super) struct Kept(RwLock<HashMap<Key, Gauge>>);

impl Kept {
    /// Says of all of them that they are still right.
    pub(super) fn touch(&self) {
        for gauge in self.0.read().unwrap_or_else(PoisonError::into_inner).values() {
            gauge.increment(0.0);
        }
    }

    /// Leaves those of a version to be forgotten.
    pub(super) fn release(&self, model: &str, version: &str) {
        let is_of_it = |key: &Key| {
            let has = |name: &str, value: &str| {
                key.labels().any(|label: &Label| label.key() == name && label.value() == value)
            };
            has("model", model) && has("version", version)
        };
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|key, _| !is_of_it(key));
    }
}

/// A recorder whose gauges are kept.
pub(super) struct Keeper<R> {
    pub(super) recorder: R,
    pub(super) kept: Arc<Kept>,
}

impl<R: Recorder> Recorder for Keeper<R> {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_counter(key, unit, description);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_gauge(key, unit, description);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, description: SharedString) {
        self.recorder.describe_histogram(key, unit, description);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.recorder.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        // One that is touched is never forgotten, so what is kept is what the recorder has.
        if let Some(gauge) = self.kept.0.read().unwrap_or_else(PoisonError::into_inner).get(key) {
            return gauge.clone();
        }
        let gauge = self.recorder.register_gauge(key, metadata);
        self.kept.0.write().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), gauge.clone());
        gauge
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.recorder.register_histogram(key, metadata)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use metrics::{counter, gauge};
    use metrics_exporter_prometheus::PrometheusBuilder;
    use metrics_util::MetricKindMask;

    use super::*;

    #[test]
    fn a_version_that_is_no_longer_listed_is_forgotten_and_nothing_else() {
        // What was not touched since the exposition before is forgotten.
        let builder = PrometheusBuilder::new().idle_timeout(MetricKindMask::ALL, Some(Duration::ZERO));
        let recorder = builder.build_recorder();
        let (handle, kept) = (recorder.handle(), Arc::new(Kept::default()));
        let keeper = Keeper { recorder, kept: Arc::clone(&kept) };
        let set = |version: &'static str| gauge!("state", "model" => "pm", "version" => version).set(4.0);
        metrics::with_local_recorder(&keeper, || {
            gauge!("ready").set(1.0);
            gauge!("in_flight", "rpc" => "watch").increment(2.0);
            gauge!("info", "version" => "1").set(1.0);
            counter!("calls").increment(1);
            gauge!("state", "model" => "lm", "version" => "1").set(4.0);
            set("1");
            set("2");
        });
        let lines = || {
            kept.touch();
            let exposition = handle.render();
            let mut samples: Vec<_> = exposition
                .lines()
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned)
                .collect();
            samples.sort();
            samples
        };
        let others =
            ["in_flight{rpc=\"watch\"} 2", "info{version=\"1\"} 1", "ready 1", "state{model=\"lm\",version=\"1\"} 4"];
        let (one, two) = ("state{model=\"pm\",version=\"1\"} 4", "state{model=\"pm\",version=\"2\"} 4");
        assert_eq!(lines(), [&["calls 1"], &others[..], &[one, two]].concat());
        assert_eq!(lines(), [&others[..], &[one, two]].concat(), "a counter is not kept");
        kept.release("pm", "1");
        assert_eq!(lines(), [&others[..], &[two]].concat());
        // It may come again.
        metrics::with_local_recorder(&keeper, || set("1"));
        for _ in 0..3 {
            assert_eq!(lines(), [&others[..], &[one, two]].concat());
        }
        metrics::with_local_recorder(&keeper, || gauge!("in_flight", "rpc" => "watch").decrement(2.0));
        assert!(lines().contains(&"in_flight{rpc=\"watch\"} 0".to_owned()));
    }
}
