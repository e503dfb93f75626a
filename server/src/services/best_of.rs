//! Rejection sampling: all samples are drawn to their ends, scored by a preference model, and ordered (Askell et al.
//! 2021, section 3.2).

use std::sync::Arc;

use futures::future::try_join_all;
use plumb_model::text::{RenderOptions, Response, TextInput};
use plumb_proto::v1;

use super::input::Objective;
use super::sample::{Piece, Sample};
use super::scoring::{ScoreCall, Scored};
use super::{Call, Context, rank};
use crate::admission::Permit;
use crate::engine::Priority;
use crate::error::Result;
use crate::record::Origin;
use crate::registry::Served;

/// Who ranks, and what they are told.
pub(super) struct Ranking {
    pub(super) ranker: Arc<Served>,
    /// What the samples answer; the ranker renders it in its own way.
    pub(super) prompt: Arc<TextInput>,
    pub(super) text: RenderOptions,
    pub(super) priority: Priority,
    pub(super) call: Call,
    /// Room that was got together with that for the samples: a call that is let in is not refused half-way.
    pub(super) permit: Permit,
    /// Where the ranking is recorded: the Rank that would be answered the same, without its candidates.
    pub(super) record: Option<(Origin, v1::RankRequest)>,
}

/// Draws all samples and answers them best first. One that the ranker cannot score, because it is too long for it for
/// example, comes last and has no reward.
pub(super) async fn draw(context: &Context, ranking: Ranking, samples: &mut [Sample]) -> Result<Vec<Piece>> {
    let mut drawn = try_join_all(samples.iter_mut().map(complete)).await?;
    let Ranking { ranker, prompt, text, priority, call, permit, record } = ranking;
    let answers = drawn.iter().map(|sample| Response::Text(sample.text.clone()));
    let inputs =
        answers.map(|response| Ok(TextInput::PromptResponse { prompt: Arc::clone(&prompt), response })).collect();
    let call = ScoreCall {
        model: ranker,
        inputs,
        field: "samples",
        text,
        objective: Objective::MeanLogProb,
        per_token: false,
        priority,
        call,
        permit: Some(permit),
    };
    let identity = call.model.identity();
    let Scored { results, timings } = context.score(call).await?;
    let ranked = rank::order(results);
    if let Some((origin, mut request)) = record {
        let texts = drawn.iter().map(|sample| v1::candidate::Candidate::Text(sample.text.clone()));
        request.candidates = texts.map(|text| v1::Candidate { candidate: Some(text) }).collect();
        let request_id = request.request_id.clone();
        let (model, ranked, timings) = (Some(identity), ranked.clone(), Some(timings));
        context.recorder.rank(origin, request, &Ok(v1::RankResponse { model, ranked, timings, request_id }));
    }
    let ordered = ranked.into_iter().map(|ranked| {
        let mut piece = std::mem::take(&mut drawn[ranked.index as usize]);
        if let Some(end) = &mut piece.end {
            end.reward = ranked.score.map(|score: v1::Score| score.reward);
        }
        piece
    });
    Ok(ordered.collect())
}

/// A sample from beginning to end, as one piece.
async fn complete(sample: &mut Sample) -> Result<Piece> {
    let mut whole = Piece::default();
    while whole.end.is_none() {
        let piece = sample.next().await?;
        whole.text.push_str(&piece.text);
        whole.token_ids.extend(piece.token_ids);
        whole.end = piece.end;
    }
    Ok(whole)
}
