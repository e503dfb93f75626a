//! How versions come and go: read, checked, warmed, and only then visible; out of sight first, and gone when the last
//! caller is done.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt as _;
use plumb_model::checkpoint::Source;
use plumb_model::loaded::{LoadOptions, LoadedModel, ModelInfo, ModelKind};
use plumb_proto::v1;
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::catalog::Facts;
use super::local::Local;
use super::{Registry, Served, warm};
use crate::error::{Error, Result};
use crate::telemetry::events::{LoadAsked, ModelLoaded, UnloadAsked};

/// A version that is announced, and still to be loaded.
pub(crate) struct Load {
    name: String,
    version: u64,
    source: Source,
    asked: Instant,
}

impl Registry {
    /// Announces a version: from now on it is listed.
    ///
    /// # Errors
    /// If the version is there already, or too many are.
    pub(crate) fn announce(&self, name: String, version: Option<u64>, source: Source) -> Result<Load> {
        let version = self.change(|catalog| {
            let added = catalog.add(&name, version);
            added.inspect(|&version| LoadAsked { model: &name, version, source: &source }.emit())
        })?;
        Ok(Load { name, version, source, asked: Instant::now() })
    }

    /// Loads an announced version, beside all that is served. Whoever asked for it may go away meanwhile.
    ///
    /// # Errors
    /// Why it failed; the version is then FAILED.
    pub(crate) async fn load(self: &Arc<Self>, load: Load) -> Result<v1::ModelStatus> {
        let registry = Arc::clone(self);
        let work = async move {
            let Load { name, version, source, asked } = load;
            // A version must not be on its way for ever.
            let result = AssertUnwindSafe(registry.bring_in(&name, version, source)).catch_unwind().await;
            let result = result.unwrap_or_else(|_| Err(Error::internal("the load panicked; the log has the details")));
            if let Err(error) = &result {
                registry.change(|catalog| catalog.failed(&name, version, error.to_string()));
            }
            ModelLoaded { model: &name, version, duration: asked.elapsed(), error: result.as_ref().err() }.emit();
            result?;
            registry.status_of(&name, version)
        };
        // The log says of all that comes of it who asked for it.
        let task = tokio::spawn(work.in_current_span());
        task.await.map_err(|error| Error::internal(format!("loading: {error}")))?
    }

    /// Takes a version out of service; its memory is given back when the last caller is done.
    ///
    /// # Errors
    /// If there is no such version, it is still loading, or a label points at it.
    pub(crate) fn unload(self: &Arc<Self>, name: &str, version: u64) -> Result<v1::ModelStatus> {
        self.drain(name, version)?;
        self.status_of(name, version)
    }

    /// As [`Registry::unload`], and answers a task that ends when the memory is given back; none if the version is out
    /// already.
    pub(super) fn drain(self: &Arc<Self>, name: &str, version: u64) -> Result<Option<JoinHandle<()>>> {
        let served = self.change(|catalog| {
            let drained = catalog.drain(name, version);
            drained.inspect(|served| {
                if served.is_some() {
                    UnloadAsked { model: name, version }.emit();
                }
            })
        })?;
        Ok(served.map(|served| self.see_out(served)))
    }

    /// Waits until nobody holds a draining version any more.
    pub(super) fn see_out(self: &Arc<Self>, served: Arc<Served>) -> JoinHandle<()> {
        let (registry, name, version) = (Arc::clone(self), served.name().to_owned(), served.version());
        let gone = served.handle().gone();
        drop(served);
        tokio::spawn(async move {
            gone.wait().await;
            registry.change(|catalog| catalog.ended(&name, version));
        })
    }

    async fn bring_in(self: &Arc<Self>, name: &str, version: u64, source: Source) -> Result<()> {
        // A hub that is slow keeps none waiting that is on this machine.
        let local = blocking(move || Local::new(source)).await?;
        let turn = self.loads.acquire().await.map_err(|_| Error::Draining)?;
        self.change(|catalog| catalog.loading(name, version));
        let place = self.places.of(name);
        let mut options = LoadOptions { device: place.device.clone(), ..self.options.clone() };
        let versions = self.planned.as_ref().map(|models| 2 * self.places.beside(name, models).max(1));
        let largest = self.largest_step;
        // Reads and converts gigabytes.
        let model = blocking(move || {
            if let Some(versions) = versions {
                local.plan_cache(&mut options, largest, versions)?;
            }
            local.load(&options, largest)
        })
        .await?;
        let facts = Facts { weights_digest: model.info.weights_digest.clone(), details: details(&model) };
        let weights_digest = facts.weights_digest.clone();
        self.change(|catalog| catalog.warming(name, version, facts));
        let identity = v1::ModelIdentity { name: name.to_owned(), version, weights_digest };
        let usage = self.usage(name);
        let handle = place.engine.attach(Arc::new(model), name, version).await?;
        if let Err(error) = warm::try_out(&handle, &usage).await {
            // What has failed takes no memory.
            let gone = handle.gone();
            drop(handle);
            gone.wait().await;
            return Err(error);
        }
        let served = Arc::new(Served::new(identity, handle, usage, Arc::downgrade(self)));
        self.change(|catalog| catalog.available(name, version, served));
        self.take_back(name);
        drop(turn);
        Ok(())
    }

    fn status_of(&self, name: &str, version: u64) -> Result<v1::ModelStatus> {
        let choice = Some(v1::model_spec::Choice::Version(version));
        self.status(Some(&v1::ModelSpec { name: name.to_owned(), choice }))
    }
}

/// On a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::internal(format!("loading: {error}")))?
}

fn details(model: &LoadedModel) -> v1::ModelDetails {
    let info: &ModelInfo = &model.info;
    let kind = match info.kind {
        ModelKind::Language => v1::ModelKind::Language,
        ModelKind::Preference => v1::ModelKind::Preference,
    };
    v1::ModelDetails {
        kind: kind.into(),
        architecture: info.architecture.clone(),
        source: info.source.clone(),
        dtype: info.dtype.to_owned(),
        parameters: info.parameters,
        weight_bytes: info.weight_bytes,
        max_input_tokens: u32::try_from(info.max_input_tokens).unwrap_or(u32::MAX),
        vocab_size: u32::try_from(info.vocab_size).unwrap_or(u32::MAX),
        chat_template_sha256: model.text.chat_template_sha256().unwrap_or_default().to_owned(),
        hhh_prompt: model.text.hhh_name().as_str().to_owned(),
        reward_head: info.reward_head.clone().unwrap_or_default(),
        normalization: info.normalization.map(|(mean, std)| v1::RewardNormalization { mean, std }),
        adapter: info.adapter.clone().unwrap_or_default(),
    }
}
