//! Where scores go, and what is known of their rows: lines, tables and manifests are told the same.

use plumb_client::{Code, ItemFailure, v1};

use super::table::Table;
use crate::cli::output::{Lines, Model};

/// Where the scores go.
#[derive(Default)]
pub(super) enum Sink {
    /// In the report itself.
    #[default]
    Shown,
    Lines(Lines),
    Table(Box<Table>),
}

/// A sink and what has gone there.
#[derive(Default)]
pub(super) struct Target {
    pub(super) sink: Sink,
    pub(super) totals: Totals,
    /// The reward of a pair's first side, until the other is there.
    pub(super) chosen: Option<f32>,
}

/// What is known of the rows.
#[derive(Default)]
pub(super) struct Totals {
    pub(super) models: Vec<Model>,
    pub(super) rows: u64,
    /// Rows in which something has no score.
    pub(super) errors: u64,
    pub(super) tokens: u64,
    /// Whether an item of the row that is not complete has failed.
    has_failed: bool,
}

impl Target {
    pub(super) fn new(sink: Sink) -> Self {
        Self { sink, ..Self::default() }
    }

    /// Counts the next item, and answers what has become of it: a row of a table has one version's scores.
    pub(super) fn count(
        &mut self,
        outcome: Result<v1::Score, ItemFailure>,
        model: Option<&v1::ModelIdentity>,
        is_last: bool,
    ) -> Result<v1::Score, ItemFailure> {
        let outcome = match &self.sink {
            Sink::Table(table) if outcome.is_ok() && !table.row_takes(model) => {
                Err(ItemFailure { code: Code::Aborted, message: "scored by another version than the row".to_owned() })
            }
            _ => outcome,
        };
        self.totals.has_failed |= outcome.is_err();
        self.totals.tokens += outcome.as_ref().map_or(0, |score| u64::from(score.input_tokens));
        if is_last {
            self.totals.end_row();
        }
        outcome
    }

    /// Counts the next row, which cannot be understood.
    pub(super) fn count_broken(&mut self) {
        self.totals.has_failed = true;
        self.totals.end_row();
    }
}

impl Totals {
    /// Takes note of who answered.
    pub(super) fn answered_by(&mut self, model: Option<&v1::ModelIdentity>) {
        if let Some(model) = model.map(Model::from)
            && !self.models.contains(&model)
        {
            self.models.push(model);
        }
    }

    fn end_row(&mut self) {
        self.rows += 1;
        self.errors += u64::from(std::mem::take(&mut self.has_failed));
    }
}
