//! The status page at `/` of the metrics port: what is served, how it goes, and what happened last, for a person with a
//! browser. Its numbers are those of `/metrics`.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::PrometheusHandle;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use plumb_proto::v1;
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::task::spawn_blocking;
use tokio::time::MissedTickBehavior;
use v1::ModelState;

use super::events::{kind_name, state_name};
use super::exporter::Probes;
use super::history::{self, Happening};
use super::metrics::{
    ADMISSION_REFUSALS, ADMISSION_WAIT, GENERATED_TOKENS, INPUT_TOKENS, MODEL_RESIDENT_BYTES, Metric,
    PREFIX_CACHED_TOKENS, QUEUE_SEQUENCES, QUEUE_TOKENS, REQUEST_DURATION, REQUESTS, REQUESTS_IN_FLIGHT,
    RESIDENT_MEMORY, REWARD,
};
use super::reading::{Reading, quantile};
use crate::error::{Error, Result};
use crate::registry::Registry;

/// The page. Everything that is filled in is escaped, because of the ending of its name.
const PAGE: &str = include_str!("status.html");
const NAME: &str = "status.html";
/// A file of its own, so that the page can forbid any other style.
pub(super) const STYLE: &str = include_str!("status.css");

/// Nothing but its own style is loaded, and nothing runs.
pub(super) const POLICY: &str =
    "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Rates are those of the last minute.
const WINDOW: Duration = Duration::from_secs(60);
/// How often a reading is kept to compare with.
const SAMPLED_EVERY: Duration = Duration::from_secs(10);
/// How old a page may be: a hundred browsers cost no more than one.
const KEPT_FOR: Duration = Duration::from_secs(1);
/// What rates are made of.
const RATED: &[Metric] =
    &[REQUESTS, REQUEST_DURATION, ADMISSION_REFUSALS, INPUT_TOKENS, PREFIX_CACHED_TOKENS, GENERATED_TOKENS];
/// Versions of a model that are gone and still shown.
const PAST_VERSIONS: usize = 3;

/// Size of a histogram's drawing, in its own units.
const WIDTH: f64 = 320.0;
const HEIGHT: f64 = 80.0;
/// Fewer bins would be a few wide blocks.
const MIN_BINS: usize = 6;
/// Bounds that have room for a label.
const MAX_TICKS: usize = 9;

const MIB: f64 = (1 << 20) as f64;
/// Where there is no number.
const NONE: &str = "–";

/// Everything that the page is made of.
pub(crate) struct Status {
    metrics: PrometheusHandle,
    registry: Arc<Registry>,
    probes: Probes,
    started: Instant,
    /// The oldest first.
    readings: Mutex<VecDeque<(Instant, Arc<Reading>)>>,
    pages: Environment<'static>,
    kept: Kept,
}

/// What many ask for, made again when it is old. Who asks meanwhile waits for it.
#[derive(Default)]
struct Kept(Mutex<Option<(Instant, String)>>);

impl Kept {
    fn get(&self, kept_for: Duration, make: impl FnOnce() -> Result<String>) -> Result<String> {
        let mut kept = lock(&self.0);
        if let Some((made, page)) = &*kept
            && made.elapsed() < kept_for
        {
            return Ok(page.clone());
        }
        let page = make()?;
        *kept = Some((Instant::now(), page.clone()));
        Ok(page)
    }
}

impl Status {
    /// # Errors
    /// If the template is wrong.
    pub(crate) fn new(metrics: PrometheusHandle, registry: Arc<Registry>, probes: Probes) -> Result<Arc<Self>> {
        let pages = pages().map_err(|error| wrong(&error))?;
        let (started, readings, kept) = (Instant::now(), Mutex::default(), Kept::default());
        Ok(Arc::new(Self { metrics, registry, probes, started, readings, pages, kept }))
    }

    /// Keeps readings to compare with, for as long as it is polled.
    pub(crate) async fn follow(self: Arc<Self>) {
        let mut interval = tokio::time::interval(SAMPLED_EVERY);
        // Readings that are made up for would all be of one time.
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let status = Arc::clone(&self);
            let Ok(reading) = spawn_blocking(move || status.read().only(RATED)).await else { continue };
            let mut readings = lock(&self.readings);
            while readings.front().is_some_and(|(at, _)| at.elapsed() > WINDOW) {
                readings.pop_front();
            }
            readings.push_back((Instant::now(), Arc::new(reading)));
        }
    }

    /// The page as it is now, or was a moment ago. It takes milliseconds, which the threads of calls do not have.
    ///
    /// # Errors
    /// If the template asks for what is not there.
    pub(super) async fn page(self: Arc<Self>) -> Result<String> {
        let page = spawn_blocking(move || self.kept.get(KEPT_FOR, || self.render())).await;
        page.map_err(|_| Error::internal("the status page: not made"))?
    }

    fn render(&self) -> Result<String> {
        let page = self.pages.get_template(NAME).map_err(|error| wrong(&error))?;
        page.render(self.view()).map_err(|error| wrong(&error))
    }

    fn read(&self) -> Reading {
        Reading::parse(&self.metrics.render())
    }

    /// What the template gets.
    fn view(&self) -> Value {
        let now = self.read();
        let (growth, seconds) = self.growth(&now);
        let statuses = self.registry.statuses();
        context! {
            ready => *self.probes.ready.borrow(),
            alive => *self.probes.alive.borrow(),
            build => env!("CARGO_PKG_VERSION"),
            uptime => span(self.started.elapsed()),
            now => clock(OffsetDateTime::now_utc()),
            tiles => tiles(&now, &growth, seconds),
            rpcs => rpcs(&now, &growth, seconds),
            versions => shown(&statuses).map(|status| version(status, &now)).collect::<Vec<_>>(),
            rewards => rewards(&statuses, &now),
            happenings => history::last().into_iter().map(event).collect::<Vec<_>>(),
        }
    }

    /// What was counted in the last minute, or in as much of it as there has been, and its seconds.
    fn growth(&self, now: &Reading) -> (Reading, f64) {
        let oldest = lock(&self.readings).front().cloned();
        match oldest {
            Some((at, before)) => (now.only(RATED).since(&before), at.elapsed().as_secs_f64().max(1.0)),
            None => (Reading::default(), 1.0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pages() -> Result<Environment<'static>, minijinja::Error> {
    let mut pages = Environment::new();
    pages.set_undefined_behavior(UndefinedBehavior::Strict);
    pages.add_template(NAME, PAGE)?;
    Ok(pages)
}

fn wrong(error: &minijinja::Error) -> Error {
    Error::internal(format!("the status page: {error}"))
}

/// Numbers with their names.
fn tiles(now: &Reading, growth: &Reading, seconds: f64) -> Vec<Value> {
    let rate = |metric, suffix| number(growth.sum(metric, suffix, &[]) / seconds);
    let gauge = |metric| number(now.sum(metric, "", &[]));
    let (input, cached) = (growth.sum(&INPUT_TOKENS, "_sum", &[]), growth.sum(&PREFIX_CACHED_TOKENS, "", &[]));
    let cached = if input > 0.0 { number(100.0 * cached / input) } else { NONE.to_owned() };
    let tile = |name: &str, value: String, unit: &str| context! { name, value, unit };
    vec![
        tile("Calls", rate(&REQUESTS, ""), "/s"),
        tile("Refused", rate(&ADMISSION_REFUSALS, ""), "/s"),
        tile("Tokens in", rate(&INPUT_TOKENS, "_sum"), "/s"),
        tile("Found in the cache", cached, "%"),
        tile("Tokens out", rate(&GENERATED_TOKENS, ""), "/s"),
        tile("In flight", gauge(&REQUESTS_IN_FLIGHT), "calls"),
        tile("Queue", gauge(&QUEUE_SEQUENCES), "sequences"),
        tile("Queue", gauge(&QUEUE_TOKENS), "tokens"),
        tile("Admitted work takes", number(now.sum(&ADMISSION_WAIT, "", &[])), "s"),
        tile("Memory", number(now.sum(&RESIDENT_MEMORY, "", &[]) / MIB), "MiB"),
    ]
}

/// The last minute of every rpc that was ever called.
fn rpcs(now: &Reading, growth: &Reading, seconds: f64) -> Vec<Value> {
    let rpc = |name: String| {
        let labels = [("rpc", name.as_str())];
        let calls = growth.sum(&REQUESTS, "", &labels);
        let good = growth.sum(&REQUESTS, "", &[labels[0], ("code", "OK")]);
        let durations = growth.bins(&REQUEST_DURATION, &labels);
        let at = |part| quantile(&durations, part).map_or(NONE.to_owned(), |seconds| number(1e3 * seconds));
        context! {
            name => &name,
            rate => number(calls / seconds),
            failed => number((calls - good) / seconds),
            median => at(0.5),
            p99 => at(0.99),
        }
    };
    now.values(&REQUESTS, "rpc").into_iter().map(rpc).collect()
}

/// A version's row.
fn version(status: &v1::ModelStatus, now: &Reading) -> Value {
    let v1::ModelIdentity { name, version, weights_digest } = status.model.clone().unwrap_or_default();
    let details = status.details.as_ref();
    let bytes = now.sum(&MODEL_RESIDENT_BYTES, "", &[("model", &name), ("version", &version.to_string())]);
    context! {
        model => name,
        number => version,
        state => state_name(status.state()),
        kind => details.map_or("", |details| kind_name(details.kind())),
        is_default => status.is_default,
        labels => status.labels.iter().map(Value::from).collect::<Vec<_>>(),
        // 0 where calls are not split.
        traffic => status.traffic_weight,
        digest => weights_digest.chars().take(12).collect::<String>(),
        dtype => details.map_or("", |details| details.dtype.as_str()),
        parameters => details.map_or(String::new(), |details| number(details.parameters as f64)),
        memory => if bytes > 0.0 { number(bytes / MIB) } else { String::new() },
        error => &status.error,
    }
}

/// All versions but those that have ended long ago, each model's newest first.
fn shown(statuses: &[v1::ModelStatus]) -> impl Iterator<Item = &v1::ModelStatus> {
    statuses.chunk_by(|a, b| name(a) == name(b)).flat_map(|versions| {
        let mut past = 0;
        versions.iter().rev().filter(move |status| {
            let is_past = matches!(status.state(), ModelState::Ended | ModelState::Failed);
            past += usize::from(is_past);
            !is_past || past <= PAST_VERSIONS
        })
    })
}

fn name(status: &v1::ModelStatus) -> Option<&str> {
    Some(&status.model.as_ref()?.name)
}

/// A histogram for each shown version with rewards, of all since the server started; those of a model have one axis.
fn rewards(statuses: &[v1::ModelStatus], now: &Reading) -> Vec<Value> {
    let mut histograms = Vec::new();
    for versions in shown(statuses).collect::<Vec<_>>().chunk_by(|a, b| name(a) == name(b)) {
        let counted = versions.iter().filter_map(|status| {
            let model = status.model.as_ref()?;
            let labels = [("model", model.name.as_str()), ("version", &model.version.to_string())];
            let count = now.sum(&REWARD, "_count", &labels);
            let mean = now.sum(&REWARD, "_sum", &labels) / count;
            (count > 0.0).then(|| (model, count, mean, now.bins(&REWARD, &labels)))
        });
        let counted: Vec<_> = counted.collect();
        let range = occupied(counted.iter().map(|(.., bins)| bins.as_slice()));
        histograms.extend(counted.iter().map(|(model, count, mean, bins)| {
            context! {
                model => &model.name,
                version => model.version,
                count => number(*count),
                mean => number(*mean),
                width => WIDTH,
                height => HEIGHT,
                bars => bars(bins, range.clone()),
                ticks => ticks(bins, range.clone()),
            }
        }));
    }
    histograms
}

/// The bins that hold anything, and some on each side.
fn occupied<'a>(all: impl Iterator<Item = &'a [(f64, f64)]>) -> Range<usize> {
    let (mut start, mut end, mut len) = (usize::MAX, 0, 0);
    for bins in all {
        len = bins.len();
        let mut occupied = bins.iter().enumerate().filter(|(_, (_, count))| *count > 0.0).map(|(at, _)| at);
        if let Some(first) = occupied.next() {
            start = start.min(first);
            end = end.max(occupied.next_back().unwrap_or(first) + 1);
        }
    }
    let missing = MIN_BINS.saturating_sub(end.saturating_sub(start)).div_ceil(2).max(1);
    start.saturating_sub(missing)..(end + missing).min(len)
}

/// Bars of equal width, whatever the bins span.
fn bars(bins: &[(f64, f64)], range: Range<usize>) -> Vec<Value> {
    let width = WIDTH / range.len().max(1) as f64;
    let total: f64 = bins.iter().map(|(_, count)| count).sum();
    let largest = bins.iter().map(|(_, count)| *count).fold(1.0, f64::max);
    let bar = |(place, at): (usize, usize)| {
        let (upper, count) = bins[at];
        let height = HEIGHT * count / largest;
        let share = 100.0 * count / total;
        context! {
            x => place as f64 * width + 1.0,
            y => HEIGHT - height,
            width => width - 2.0,
            height => height,
            title => format!("{} to {upper}: {} ({share:.1} %)", lower(bins, at), number(count)),
        }
    };
    range.enumerate().map(bar).collect()
}

/// Labels at bounds between bars, as many as there is room for.
fn ticks(bins: &[(f64, f64)], range: Range<usize>) -> Vec<Value> {
    let width = WIDTH / range.len().max(1) as f64;
    let every = range.len().div_ceil(MAX_TICKS).max(1);
    let tick =
        |(place, at): (usize, usize)| context! { x => place as f64 * width, label => lower(bins, at).to_string() };
    range.enumerate().skip(1).step_by(every).map(tick).collect()
}

/// The lower bound of a bin.
fn lower(bins: &[(f64, f64)], at: usize) -> f64 {
    at.checked_sub(1).map_or(f64::NEG_INFINITY, |below| bins[below].0)
}

/// A line of what happened.
fn event(happening: Happening) -> Value {
    let Happening { at, model, what, good } = happening;
    context! { at => clock(at), model, what, good }
}

fn clock(at: OffsetDateTime) -> String {
    at.format(format_description!("[year]-[month]-[day] [hour]:[minute]:[second]")).unwrap_or_default()
}

/// The two largest units.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// Three digits and a power of a thousand.
fn number(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, " G"),
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        v if v >= 100.0 || v == v.trunc() => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{scaled:.digits$}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(version: u64, state: ModelState) -> v1::ModelStatus {
        let model = v1::ModelIdentity { name: "pm".into(), version, ..Default::default() };
        v1::ModelStatus { model: Some(model), state: state.into(), ..Default::default() }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (-0.1234, "-0.12"),
            (12.34, "12.3"),
            (123.4, "123"),
            (9999.0, "9999"),
            (12_345.0, "12.3 k"),
            (3e6, "3 M"),
            (1.5e9, "1.50 G"),
        ] {
            assert_eq!(number(value), text);
        }
        for (seconds, text) in
            [(5, "5 s"), (61, "1 min 1 s"), (3660, "1 h 1 min"), (86400, "1 d 0 h"), (90_000, "1 d 1 h")]
        {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_page_is_made_once_for_all_who_ask_at_a_time() {
        let (kept, long) = (Kept::default(), Duration::from_secs(3600));
        let get = |kept_for, page: &str| kept.get(kept_for, || Ok(page.to_owned()));
        assert!(kept.get(long, || Err(Error::internal("why"))).is_err(), "an error is not kept");
        assert_eq!(get(long, "first").unwrap(), "first");
        assert_eq!(get(long, "second").unwrap(), "first");
        assert_eq!(get(Duration::ZERO, "third").unwrap(), "third");
        assert_eq!(get(long, "fourth").unwrap(), "third");
    }

    #[test]
    fn the_past_is_short() {
        let mut statuses: Vec<_> = (1..9).map(|n| of(n, ModelState::Ended)).collect();
        statuses.push(of(9, ModelState::Available));
        let numbers: Vec<_> = shown(&statuses).map(|status| status.model.as_ref().unwrap().version).collect();
        assert_eq!(numbers, [9, 8, 7, 6]);
    }

    #[test]
    fn a_histogram_shows_what_is_occupied() {
        let bins: Vec<_> = (0..20).map(|n| (f64::from(n), if n == 10 { 3.0 } else { 0.0 })).collect();
        let range = occupied([bins.as_slice()].into_iter());
        assert!(range.contains(&10) && range.len() >= MIN_BINS && range.len() < 10, "{range:?}");
        let get = |value: &Value, key: &str| value.get_attr(key).unwrap();
        let bars = bars(&bins, range.clone());
        let tallest = bars.iter().find(|bar| get(bar, "height") == Value::from(HEIGHT)).unwrap();
        assert_eq!(get(tallest, "y"), Value::from(0.0));
        assert_eq!(get(tallest, "title"), Value::from("9 to 10: 3 (100.0 %)"));
        let ticks = ticks(&bins, range);
        assert!(!ticks.is_empty() && ticks.len() < bars.len());
        assert_eq!(occupied(std::iter::empty()).len(), 0);
    }

    #[test]
    fn the_template_escapes_and_needs_nothing_that_is_not_there() {
        let hostile = "<script>alert('x')</script>\"";
        let model = v1::ModelIdentity { name: hostile.into(), version: 1, weights_digest: hostile.into() };
        let status = v1::ModelStatus {
            model: Some(model),
            error: hostile.into(),
            labels: vec![hostile.into()],
            details: Some(v1::ModelDetails { dtype: hostile.into(), ..Default::default() }),
            ..Default::default()
        };
        let metrics = concat!(
            "plumb_requests_total{rpc=\"<script>\",code=\"OK\"} 1\n",
            "plumb_reward_count{model=\"<script>alert('x')</script>\\\"\",version=\"1\"} 2\n",
            "plumb_reward_bucket{model=\"<script>alert('x')</script>\\\"\",version=\"1\",le=\"+Inf\"} 2\n",
        );
        let now = Reading::parse(metrics);
        let rewards = rewards(std::slice::from_ref(&status), &now);
        assert_eq!(rewards.len(), 1);
        let happening =
            Happening { at: OffsetDateTime::UNIX_EPOCH, model: hostile.into(), what: hostile.into(), good: false };
        let view = context! {
            ready => true,
            alive => false,
            build => hostile,
            uptime => hostile,
            now => hostile,
            tiles => tiles(&now, &now, 1.0),
            rpcs => rpcs(&now, &now, 1.0),
            versions => vec![version(&status, &now)],
            rewards => rewards,
            happenings => vec![event(happening)],
        };
        let html = pages().unwrap().get_template(NAME).unwrap().render(view).unwrap();
        assert!(html.contains("&lt;script&gt;") && !html.contains("<script"), "{html}");
        assert!(
            !html.contains("style=") && !html.contains("//"),
            "nothing from elsewhere, no style in the page: {html}"
        );
    }
}
