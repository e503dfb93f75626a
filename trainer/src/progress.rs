//! How far a command is, on standard error: hidden where nobody looks.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Over a known number of things.
pub(crate) fn bar(total: u64, things: &str) -> ProgressBar {
    let template = format!("{{elapsed_precise}} {{wide_bar}} {{human_pos}}/{{human_len}} {things}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
