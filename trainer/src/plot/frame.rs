//! What stands around the data: axes with round numbers, labels, and a legend above rather than on top of it.

use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::prelude::Cartesian2d;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{BLACK, Color as _, IntoFont as _, RGBColor, TextStyle, WHITE};

use super::Labels;
use super::axis::Axis;
use crate::{Error, Result};

/// Coordinates are whole numbers; two for every pixel make slopes smooth.
const SCALE: u32 = 2;

const GREY: RGBColor = RGBColor(90, 90, 90);
const ROW: u32 = 22;

/// Characters of a name.
const LONGEST: usize = 40;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Where data is drawn.
pub(super) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// What drawing into a text may fail with.
pub(super) type Failed = DrawingAreaErrorKind<std::io::Error>;

/// How the legend shows a colour.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    Line,
    Dot,
    Area,
}

/// A line of the legend.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) colour: RGBColor,
    pub(super) mark: Mark,
    pub(super) name: String,
}

/// A plot without its data.
pub(super) struct Frame<'a> {
    labels: Labels<'a>,
    x: Option<(f64, f64)>,
    y: Option<(f64, f64)>,
    /// Positions on the x axis are logarithms to base 10.
    pub(super) log_x: bool,
    /// The y axis begins at 0.
    pub(super) from_zero: bool,
    /// As wide as high, with the ends of both axes where they are.
    pub(super) square: bool,
    /// Names of rows, from top to bottom, in place of a y axis.
    pub(super) rows: Option<&'a [String]>,
    pub(super) legend: Vec<Entry>,
}

impl<'a> Frame<'a> {
    /// Around all of these numbers.
    pub(super) fn new(labels: &Labels<'a>, xs: impl Iterator<Item = f64>, ys: impl Iterator<Item = f64>) -> Self {
        let (x, y) = (range(xs), range(ys));
        Self { labels: *labels, x, y, log_x: false, from_zero: false, square: false, rows: None, legend: Vec::new() }
    }

    /// The plot as a text, with the data that `data` draws, if there is any.
    pub(super) fn draw(
        &self,
        data: impl FnOnce(&mut Chart<'_, '_>) -> std::result::Result<(), Failed>,
    ) -> Result<String> {
        let (width, mut height) = if self.square { (440, 400) } else { (640, 300) };
        if let Some(rows) = self.rows {
            height = 90 + ROW * (rows.len() as u32 * self.legend.len().max(1) as u32).clamp(2, 100);
        }
        let mut text = String::new();
        self.draw_into(&SVGBackend::with_string(&mut text, (SCALE * width, SCALE * height)).into_drawing_area(), data)
            .map_err(|error| Error::Plot(error.to_string()))?;
        let shown = format!("<svg role=\"img\" width=\"{width}\" height=\"{height}\"");
        let drawn = format!("<svg width=\"{}\" height=\"{}\"", SCALE * width, SCALE * height);
        let title = html_escape::encode_text(self.labels.title);
        let text = text.replacen(&drawn, &shown, 1);
        Ok(text.replacen(">\n", &format!(">\n<title>{}</title>\n", printable(&title)), 1))
    }

    fn draw_into(
        &self,
        root: &Area<'_>,
        data: impl FnOnce(&mut Chart<'_, '_>) -> std::result::Result<(), Failed>,
    ) -> std::result::Result<(), Failed> {
        root.fill(&WHITE)?;
        let area = root.margin(8, 8, 16, 28);
        let area = area.titled(&printable(self.labels.title), font(15, BLACK))?;
        let (Some(x), Some(y)) = (self.x, self.y) else {
            area.draw(&Text::new("no data", (20, 60), font(13, GREY)))?;
            return root.present();
        };
        let (above, below) = area.split_vertically(SCALE * ROW * self.legend_rows(&area).len() as u32);
        self.draw_legend(&above)?;
        let left = match self.rows {
            Some(rows) => {
                rows.iter().map(|name| name.chars().count()).max().unwrap_or(0).clamp(4, LONGEST) as u32 * 7 + 8
            }
            None => 44,
        };
        let left = left + if self.labels.y.is_empty() { 0 } else { 22 };
        let mut builder = ChartBuilder::on(&below);
        builder.x_label_area_size(SCALE * 40).y_label_area_size(SCALE * left);
        let (x, y) = self.axes(x, y);
        let mut chart = builder.build_cartesian_2d(x, y)?;
        let mut mesh = chart.configure_mesh();
        mesh.axis_style(GREY.stroke_width(2))
            .bold_line_style(BLACK.mix(0.12).stroke_width(2))
            .label_style(font(12, GREY))
            .axis_desc_style(font(13, BLACK))
            .x_desc(printable(self.labels.x))
            .y_desc(printable(self.labels.y))
            .draw()?;
        data(&mut chart)?;
        root.present()
    }

    /// Axes a little longer than the data.
    fn axes(&self, x: (f64, f64), y: (f64, f64)) -> (Axis, Axis) {
        let wider = |(low, high): (f64, f64)| {
            // What differs by rounding only is drawn as if it were equal.
            let equal = high - low <= 1e-9 * high.abs().max(low.abs()).max(1e-100);
            let room = if equal { (0.1 * high.abs()).max(1e-3) } else { 0.04 * (high - low) };
            (low - room, high + room)
        };
        let ((left, right), (bottom, top)) = (wider(x), wider(y));
        if self.square {
            return (Axis::linear(x.0, x.1), Axis::linear(y.0, y.1));
        }
        let x = if self.log_x { Axis::logarithmic(left, right) } else { Axis::linear(left, right) };
        let y = match self.rows {
            Some(rows) => Axis::rows(rows.iter().map(|name| shortened(name))),
            None => Axis::linear(if self.from_zero { y.0 } else { bottom }, top),
        };
        (x, y)
    }

    /// Entries of the legend with where they begin, as many in a row as fit.
    fn legend_rows(&self, area: &Area<'_>) -> Vec<Vec<(i32, &Entry)>> {
        let width = area.dim_in_pixel().0 as i32;
        let mut rows: Vec<Vec<_>> = Vec::new();
        let mut at = i32::MAX;
        for entry in &self.legend {
            let needed = SCALE as i32 * (44 + 7 * shortened(&entry.name).chars().count() as i32);
            if at.saturating_add(needed) > width {
                rows.push(Vec::new());
                at = SCALE as i32 * 76;
            }
            rows.last_mut().into_iter().for_each(|row| row.push((at, entry)));
            at += needed;
        }
        rows
    }

    fn draw_legend(&self, area: &Area<'_>) -> std::result::Result<(), Failed> {
        for (row, entries) in self.legend_rows(area).iter().enumerate() {
            let y = (SCALE * (row as u32 * ROW + ROW / 2)) as i32;
            for (x, Entry { colour, mark, name }) in entries {
                match mark {
                    Mark::Line => area.draw(&PathElement::new(vec![(*x, y), (x + 36, y)], colour.stroke_width(5)))?,
                    Mark::Dot => area.draw(&Circle::new((x + 18, y), 9, colour.filled()))?,
                    Mark::Area => {
                        area.draw(&Rectangle::new([(x + 6, y - 10), (x + 30, y + 10)], colour.mix(0.6).filled()))?
                    }
                }
                let style = font(12, BLACK).pos(Pos::new(HPos::Left, VPos::Center));
                area.draw(&Text::new(shortened(name), (x + 46, y), style))?;
            }
        }
        Ok(())
    }
}

/// Text of so many pixels.
fn font(pixels: u32, colour: RGBColor) -> TextStyle<'static> {
    // Plotters takes the size for that of a box around the text.
    ("sans-serif", f64::from(SCALE * pixels) * 1.24).into_font().color(&colour)
}

/// Without what XML has no place for.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')).collect()
}

fn shortened(name: &str) -> String {
    let name = printable(name);
    match name.char_indices().nth(LONGEST) {
        Some(_) => name.chars().take(LONGEST - 1).chain(['…']).collect(),
        None => name,
    }
}

fn range(numbers: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let wider = |range: Option<(f64, f64)>, x: f64| range.map_or((x, x), |(low, high)| (low.min(x), high.max(x)));
    // Beyond, differences are no numbers any more.
    numbers.filter(|x| x.abs() < 1e300).fold(None, |range, x| Some(wider(range, x)))
}
