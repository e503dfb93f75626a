//! A text that is being generated: from the engine's tokens to pieces of text.

use std::sync::Arc;
use std::time::Duration;

use plumb_model::text::StreamDecoder;
use plumb_proto::v1;
use tokio::sync::mpsc;

use super::scoring::count;
use super::stop::StopStrings;
use crate::engine::{Finish, GenerateEvent};
use crate::error::{Error, Result};
use crate::registry::Served;
use crate::telemetry::events::SampleGenerated;

/// Events that become one piece if the reader is slower than the engine.
const MAX_EVENTS: usize = 16;

/// One sample. Dropping it stops the engine's work on it.
pub(super) struct Sample {
    model: Arc<Served>,
    events: mpsc::Receiver<Result<GenerateEvent>>,
    decoder: StreamDecoder,
    stops: StopStrings,
    /// End-of-text tokens, which are not part of the text; none if they do not end it.
    eos: Vec<u32>,
    tokens: usize,
    sum_log_prob: f64,
    cached_tokens: usize,
    queued: Duration,
}

/// What has come since the last piece.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) token_ids: Vec<u32>,
    /// The sample is complete.
    pub(super) end: Option<v1::SampleEnd>,
}

impl Sample {
    pub(super) fn new(
        model: Arc<Served>,
        events: mpsc::Receiver<Result<GenerateEvent>>,
        decoder: StreamDecoder,
        stops: StopStrings,
        eos: Vec<u32>,
    ) -> Self {
        Self {
            model,
            events,
            decoder,
            stops,
            eos,
            tokens: 0,
            sum_log_prob: 0.0,
            cached_tokens: 0,
            queued: Duration::ZERO,
        }
    }

    /// Tokens of the prompt whose state was there before.
    pub(super) fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// How long the sample waited for its first step.
    pub(super) fn queued(&self) -> Duration {
        self.queued
    }

    /// The next piece. After one with an end no other may be asked for.
    pub(super) async fn next(&mut self) -> Result<Piece> {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        if self.events.recv_many(&mut events, MAX_EVENTS).await == 0 {
            return Err(Error::DeviceLost);
        }
        let mut piece = Piece::default();
        for event in events {
            if event.is_err() {
                self.model.observe(&event);
            }
            match event? {
                GenerateEvent::Started { cached_tokens, queued } => {
                    self.cached_tokens = cached_tokens;
                    self.queued = queued;
                }
                GenerateEvent::Token { id, log_prob } => {
                    piece.token_ids.push(id);
                    self.tokens += 1;
                    self.sum_log_prob += f64::from(log_prob);
                    if self.eos.contains(&id) {
                        continue;
                    }
                    let Some(text) = self.decoder.push(id)? else { continue };
                    let released = self.stops.push(&text);
                    piece.text.push_str(&released.text);
                    if released.stopped {
                        self.events.close();
                        return Ok(self.ended(piece, v1::FinishReason::StopString));
                    }
                }
                GenerateEvent::Finished(finish) => {
                    let mut reason = match finish {
                        Finish::Eos => v1::FinishReason::Eos,
                        Finish::Length => v1::FinishReason::Length,
                    };
                    // What was an incomplete character until now is no character; it may still complete a stop string.
                    if let Some(text) = self.decoder.clone().finish()? {
                        let released = self.stops.push(&text);
                        piece.text.push_str(&released.text);
                        if released.stopped {
                            reason = v1::FinishReason::StopString;
                        }
                    }
                    piece.text.push_str(&self.stops.finish());
                    return Ok(self.ended(piece, reason));
                }
            }
        }
        Ok(piece)
    }

    fn ended(&self, piece: Piece, reason: v1::FinishReason) -> Piece {
        self.model.observe(&Ok(()));
        let end = v1::SampleEnd {
            finish_reason: reason.into(),
            new_tokens: count(self.tokens),
            sum_log_prob: self.sum_log_prob as f32,
            reward: None,
        };
        Piece { end: Some(end), ..piece }
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // Also for one that nobody wanted to the end: its tokens were drawn.
        SampleGenerated { model: self.model.name(), version: self.model.version(), tokens: self.tokens }.emit();
    }
}
