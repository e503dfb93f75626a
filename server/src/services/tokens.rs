//! `plumb.v1.Tokens`: what a model would be fed.

use std::sync::Arc;

use plumb_model::text::{RenderMode, Rendered, TokenSpan};
use plumb_proto::v1;
use plumb_proto::v1::tokens_server::Tokens;
use rayon::prelude::*;
use tonic::{Request, Response, Status};

use super::scoring::count;
use super::{Context, input, limits, split_hash};
use crate::error::{Error, Result};
use crate::registry::Need;

/// The service.
pub(crate) struct TokensService {
    context: Arc<Context>,
}

impl TokensService {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl Tokens for TokensService {
    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        self.context.check_count("texts", request.texts.len())?;
        limits::texts(&request.texts)?;
        limits::spec("model", request.model.as_ref())?;
        let hash = || split_hash("", &request);
        let model = self.context.registry.resolve(request.model.as_ref(), Need::Any, hash)?;
        let v1::TokenizeRequest { model: _, texts, add_special_tokens } = request;
        let identity = model.identity();
        let add_special = add_special_tokens.unwrap_or(true);
        let tokenized = self
            .context
            .pool
            .run(move || {
                let tokenize = |(i, text): (usize, &String)| match model.text.tokenize(text, add_special) {
                    Ok(spans) => Ok(v1::Tokenized { tokens: spans.into_iter().map(token).collect() }),
                    Err(error) => Err(Error::from(error).within(&format!("texts[{i}]"))),
                };
                texts.par_iter().enumerate().map(tokenize).collect::<Result<Vec<_>>>()
            })
            .await??;
        Ok(Response::new(v1::TokenizeResponse { model: Some(identity), tokenized }))
    }

    async fn render(&self, request: Request<v1::RenderRequest>) -> Result<Response<v1::RenderResponse>, Status> {
        let request = request.into_inner();
        limits::spec("model", request.model.as_ref())?;
        let hash = || split_hash("", &request);
        let model = self.context.registry.resolve(request.model.as_ref(), Need::Any, hash)?;
        let v1::RenderRequest { model: _, input, text, add_generation_prompt } = request;
        let input = input::text_input(&input.unwrap_or_default()).map_err(|error| error.within("input"))?;
        let longest = model.info.max_input_tokens;
        let options = input::render_options(text.as_ref(), longest, self.context.limits.auto_truncate)?;
        let mode = if add_generation_prompt { RenderMode::Generate } else { RenderMode::Score };
        let identity = model.identity();
        let rendered = self.context.pool.run(move || model.text.render(&input, &options, mode)).await?;
        let rendered = rendered.map_err(|error| Error::from(error).within("input"))?;
        let Rendered { text, ids, response, template_sha256, truncated, .. } = rendered;
        Ok(Response::new(v1::RenderResponse {
            model: Some(identity),
            text,
            token_ids: ids,
            response_start: count(response.start),
            response_end: count(response.end),
            template_sha256,
            truncated,
        }))
    }
}

fn token(span: TokenSpan) -> v1::Token {
    let TokenSpan { id, text, special, start, stop } = span;
    v1::Token { id, text, special, start: count(start), stop: count(stop) }
}
