//! A progress bar on standard error, for people: hidden where nobody looks.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::source::count_lines;

/// Progress over lines, with rates over items and tokens.
pub(crate) struct Progress {
    bar: ProgressBar,
    items: u64,
    tokens: u64,
    start: Instant,
}

impl Progress {
    /// Over a known number of things.
    pub(crate) fn over(total: u64) -> Self {
        let progress = Self::new();
        progress.bar.set_length(total);
        progress.bar.set_style(style(BAR));
        progress
    }

    /// Over the lines of files, which are counted while the work goes on.
    pub(crate) fn files(files: &[PathBuf], limit: Option<u64>) -> Self {
        let progress = Self::new();
        if !progress.bar.is_hidden() {
            let (bar, files) = (progress.bar.clone(), files.to_vec());
            tokio::task::spawn_blocking(move || {
                if let Some(lines) = count_lines(&files) {
                    bar.set_length(lines.min(limit.unwrap_or(u64::MAX)));
                    bar.set_style(style(BAR));
                }
            });
        }
        progress
    }

    /// Nothing to show.
    pub(crate) fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), items: 0, tokens: 0, start: Instant::now() }
    }

    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style(SPINNER));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, items: 0, tokens: 0, start: Instant::now() }
    }

    /// Counts what was done.
    pub(crate) fn advance(&mut self, lines: u64, items: u64, tokens: u64) {
        self.items += items;
        self.tokens += tokens;
        self.bar.inc(lines);
        if !self.bar.is_hidden() {
            let seconds = self.start.elapsed().as_secs_f64().max(1e-3);
            let (items, tokens) = (self.items as f64 / seconds, self.tokens as f64 / seconds);
            self.bar.set_message(format!("{items:.1} items/s, {} tok/s", HumanCount(tokens as u64)));
        }
    }

    /// Writes a line without tearing the bar.
    pub(crate) fn note(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Takes the bar away; answers items, tokens and seconds.
    pub(crate) fn finish(self) -> (u64, u64, f64) {
        self.bar.finish_and_clear();
        (self.items, self.tokens, self.start.elapsed().as_secs_f64())
    }
}

const BAR: &str = "{elapsed_precise} {wide_bar} {human_pos}/{human_len} {msg}, {eta} left";
const SPINNER: &str = "{elapsed_precise} {spinner} {human_pos} lines, {msg}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
