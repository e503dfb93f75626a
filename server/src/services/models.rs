//! `plumb.v1.Models`: what is served, and changes to it.

use std::sync::Arc;

use plumb_model::checkpoint::Source;
use plumb_proto::v1;
use plumb_proto::v1::models_server::Models;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Context, limits};
use crate::config::check_name;
use crate::error::{Error, Result};
use crate::registry::{MAX_LABELS, Share};

/// The service.
pub(crate) struct ModelsService {
    context: Arc<Context>,
}

impl ModelsService {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl Models for ModelsService {
    type WatchModelsStream = ReceiverStream<Result<v1::WatchModelsResponse, Status>>;

    async fn list_models(&self, _: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse { models: self.context.registry.statuses() }))
    }

    async fn get_model(&self, request: Request<v1::GetModelRequest>) -> Result<Response<v1::GetModelResponse>, Status> {
        let v1::GetModelRequest { model } = request.into_inner();
        limits::spec("model", model.as_ref())?;
        let status = self.context.registry.status(model.as_ref())?;
        Ok(Response::new(v1::GetModelResponse { model: Some(status) }))
    }

    async fn load_version(
        &self,
        request: Request<v1::LoadVersionRequest>,
    ) -> Result<Response<v1::LoadVersionResponse>, Status> {
        let v1::LoadVersionRequest { name, version, source, adapter, revision } = request.into_inner();
        limits::name("name", &name)?;
        check_name(&name).map_err(|message| Error::invalid("name", message))?;
        for (field, text) in [("source", &source), ("adapter", &adapter), ("revision", &revision)] {
            limits::source(field, text)?;
        }
        if version == Some(0) {
            return Err(Error::invalid("version", "versions begin at 1").into());
        }
        if source.is_empty() {
            return Err(Error::invalid("source", "a folder, a .gguf file or a repository is needed").into());
        }
        let unless_empty = |text: String| (!text.is_empty()).then_some(text);
        let source = Source { model: source, adapter: unless_empty(adapter), revision: unless_empty(revision) };
        let registry = &self.context.registry;
        let load = registry.announce(name, version, source)?;
        let status = registry.load(load).await?;
        Ok(Response::new(v1::LoadVersionResponse { model: Some(status) }))
    }

    async fn unload_version(
        &self,
        request: Request<v1::UnloadVersionRequest>,
    ) -> Result<Response<v1::UnloadVersionResponse>, Status> {
        let v1::UnloadVersionRequest { name, version } = request.into_inner();
        limits::name("name", &name)?;
        let status = self.context.registry.unload(&name, version)?;
        Ok(Response::new(v1::UnloadVersionResponse { model: Some(status) }))
    }

    async fn set_label(&self, request: Request<v1::SetLabelRequest>) -> Result<Response<v1::SetLabelResponse>, Status> {
        let v1::SetLabelRequest { name, label, version } = request.into_inner();
        limits::name("name", &name)?;
        limits::name("label", &label)?;
        check_name(&label).map_err(|message| Error::invalid("label", message))?;
        let registry = &self.context.registry;
        registry.set_label(&name, &label, version)?;
        let model = match version {
            None => None,
            Some(version) => {
                let choice = Some(v1::model_spec::Choice::Version(version));
                Some(registry.status(Some(&v1::ModelSpec { name, choice }))?)
            }
        };
        Ok(Response::new(v1::SetLabelResponse { model }))
    }

    async fn set_traffic(
        &self,
        request: Request<v1::SetTrafficRequest>,
    ) -> Result<Response<v1::SetTrafficResponse>, Status> {
        let v1::SetTrafficRequest { name, shares } = request.into_inner();
        limits::name("name", &name)?;
        if shares.len() > MAX_LABELS {
            let message = format!("{} are given, {MAX_LABELS} are allowed", shares.len());
            return Err(Error::invalid("shares", message).into());
        }
        limits::shares(&shares)?;
        let shares = shares.into_iter().map(|v1::TrafficShare { label, weight }| Share { label, weight }).collect();
        let registry = &self.context.registry;
        registry.set_traffic(&name, shares)?;
        let of_model = |status: &v1::ModelStatus| status.model.as_ref().is_some_and(|identity| identity.name == name);
        let models = registry.statuses().into_iter().filter(of_model).collect();
        Ok(Response::new(v1::SetTrafficResponse { models }))
    }

    async fn watch_models(
        &self,
        request: Request<v1::WatchModelsRequest>,
    ) -> Result<Response<Self::WatchModelsStream>, Status> {
        let context = Arc::clone(&self.context);
        let name = request.into_inner().name;
        limits::name("name", &name)?;
        Ok(Response::new(super::stream(context.aborted.clone(), |sender| watch(context, name, sender))))
    }
}

/// Sends every state, then every change, until the server ends or the reader does.
async fn watch(
    context: Arc<Context>,
    name: String,
    sender: mpsc::Sender<Result<v1::WatchModelsResponse, Status>>,
) -> Result<()> {
    let is_wanted = |status: &v1::ModelStatus| {
        name.is_empty() || status.model.as_ref().is_some_and(|identity| identity.name == name)
    };
    let (present, mut changes) = context.registry.watch();
    for status in present.into_iter().filter(is_wanted) {
        let response = v1::WatchModelsResponse { model: Some(status) };
        sender.send(Ok(response)).await.map_err(|_| Error::Cancelled)?;
    }
    loop {
        let change = tokio::select! {
            () = context.draining.cancelled() => return Err(Error::Draining),
            change = changes.recv() => change,
        };
        match change {
            Ok(status) if is_wanted(&status) => {
                let response = v1::WatchModelsResponse { model: Some(status) };
                sender.send(Ok(response)).await.map_err(|_| Error::Cancelled)?;
            }
            Ok(_) => {}
            // What was missed is gone: the watcher has to begin anew.
            Err(RecvError::Lagged(_)) => {
                let message = "the watcher fell behind; watch again".to_owned();
                return Err(Error::Unavailable { message, retry_after: std::time::Duration::ZERO });
            }
            Err(RecvError::Closed) => return Err(Error::Draining),
        }
    }
}
