//! All that the experiments rely on beyond the wire contract: flags, metadata, metrics and faults of a server, and how
//! a version comes and goes. What changes there changes here, and nowhere else.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures::StreamExt;
use plumb_client::v1::{self, ModelState};
use plumb_client::{Client, Code, Error};
use plumb_proto::v1::preference_client::PreferenceClient;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic_types::StatusExt;

use crate::expected::{Judge, PM};
use crate::load::{End, check_score};

/// The cargo feature of a server that has faults on demand.
pub(crate) const FAULTS_FEATURE: &str = "faults";
/// The metadata by which callers are told apart where there are no keys.
pub(crate) const CLIENT_ID: &str = "x-client-id";
/// The label that decides which version is meant by none.
pub(crate) const STABLE: &str = "stable";
/// Batches that ran, and the time that they took.
pub(crate) const BATCHES: &str = "plumb_batches_total";
/// Seconds that all batches took together.
pub(crate) const BATCH_SECONDS: &str = "plumb_batch_duration_seconds_sum";
/// A flag with which the gate has room for whatever a load asks, so that a refusal is a failure.
pub(crate) const ROOMY: &str = "--max-queue-tokens 1048576";
/// The name of the manifest of a published version.
pub(crate) const MANIFEST: &str = "manifest.json";

/// How long something that has to happen may take.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// Flags with which a server serves the newest version of every model under a root, and takes up what is published. The
/// version before goes at once instead of being kept for a while, in case that the new one has to be taken back.
pub(crate) fn watching(root: &Path) -> String {
    format!("--model-root {} --version-policy latest:1 --rollback-window-secs 0", root.display())
}

/// The file in which faults are asked for.
#[derive(Clone, Debug)]
pub(crate) struct Faults(pub(crate) PathBuf);

impl Faults {
    /// The variable that names the file.
    pub(crate) const VARIABLE: &str = "PLUMB_FAULTS";

    /// In a folder; none are asked for.
    pub(crate) fn in_folder(folder: &Path) -> Result<Self> {
        let faults = Self(folder.join("faults"));
        faults.ask("")?;
        Ok(faults)
    }

    /// Asks for faults, a line each, instead of those before.
    pub(crate) fn ask(&self, lines: &str) -> Result<()> {
        // A rename: a reader sees the old lines or the new ones.
        let draft = self.0.with_extension("draft");
        std::fs::write(&draft, lines).and_then(|()| std::fs::rename(&draft, &self.0)).context("the file of faults")
    }
}

/// A request for a version.
pub(crate) fn version_request(name: &str, version: u64, source: &Path) -> v1::LoadVersionRequest {
    let source = source.display().to_string();
    v1::LoadVersionRequest { name: name.to_owned(), version: Some(version), source, ..Default::default() }
}

/// Loads a version by rpc and points the label at it.
pub(crate) async fn bring_in(client: &Client, name: &str, version: u64, source: &Path) -> Result<()> {
    let patient = client.with_call_timeout(Some(PATIENCE));
    let status = patient.load_version(version_request(name, version, source)).await?;
    if status.state() != ModelState::Available {
        bail!("version {version} of {name} is {} after it was loaded", status.state().as_str_name());
    }
    client.set_label(name, STABLE, Some(version)).await?;
    Ok(())
}

/// Takes a version out of service by rpc and waits until its memory has been given back.
pub(crate) async fn take_out(client: &Client, name: &str, version: u64) -> Result<()> {
    client.unload_version(name, version).await?;
    until_ended(client, name, version).await
}

/// Waits until a version has ended; one that nobody remembers has.
pub(crate) async fn until_ended(client: &Client, name: &str, version: u64) -> Result<()> {
    let began = Instant::now();
    loop {
        match state(client, name, version).await? {
            None | Some(ModelState::Ended) => return Ok(()),
            other if began.elapsed() > PATIENCE => bail!("version {version} of {name} does not end: {other:?}"),
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

/// The state of a version; `None` if the server does not know it.
pub(crate) async fn state(client: &Client, name: &str, version: u64) -> Result<Option<ModelState>> {
    let choice = Some(v1::model_spec::Choice::Version(version));
    match client.get_model(v1::ModelSpec { name: name.to_owned(), choice }).await {
        Ok(status) => Ok(Some(status.state())),
        Err(error) if error.code() == Code::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a version that was published is available.
pub(crate) async fn until_available(client: &Client, name: &str, version: u64) -> Result<()> {
    let wait = async {
        let mut changes = client.watch_models(name).await?;
        while let Some(change) = changes.next().await {
            let status = change?.model.context("a change without a model")?;
            match (status.model.as_ref().map(|model| model.version), status.state()) {
                (Some(found), ModelState::Available) if found == version => return Ok(()),
                (Some(found), ModelState::Failed) if found == version => bail!("it failed: {}", status.error),
                _ => {}
            }
        }
        bail!("the watch ended")
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.unwrap_or_else(|_| bail!("not in {PATIENCE:?}")).with_context(|| format!("version {version} of {name}"))
}

/// Asks for a load that has to fail, and answers what is said of it; `None` if it did not fail.
pub(crate) async fn refused(client: &Client, request: v1::LoadVersionRequest) -> Result<Option<Refused>> {
    let (name, version) = (request.name.clone(), request.version.unwrap_or_default());
    let error = match client.with_call_timeout(Some(PATIENCE)).load_version(request).await {
        Err(Error::Call(error)) => *error,
        Err(other) => return Err(other.into()),
        Ok(_) => return Ok(None),
    };
    let choice = Some(v1::model_spec::Choice::Version(version));
    let status = client.get_model(v1::ModelSpec { name, choice }).await?;
    let is_listed = status.state() == ModelState::Failed && status.error == error.message;
    Ok(Some(Refused { said: error.to_string(), is_listed }))
}

/// A load that failed.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    /// What the caller was told.
    pub(crate) said: String,
    /// Whether it is listed as FAILED, with the same words.
    pub(crate) is_listed: bool,
}

/// A client with an id, by which the server shares its time fairly.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    channel: Channel,
    id: MetadataValue<Ascii>,
}

impl Caller {
    /// On a connection.
    pub(crate) fn new(channel: Channel, id: &str) -> Result<Self> {
        Ok(Self { channel, id: id.parse().context("the id of a client")? })
    }

    /// Scores responses to dialogues in one call, tried once.
    pub(crate) async fn score(&self, judge: &Judge, items: Vec<(usize, usize)>, deadline: Duration) -> End {
        let inputs = items.iter().map(|&(dialogue, response)| judge.expected().dialogues[dialogue].with(response));
        let model = Some(v1::ModelSpec { name: PM.to_owned(), choice: None });
        let mut request = Request::new(v1::ScoreRequest { model, items: inputs.collect(), ..Default::default() });
        request.set_timeout(deadline);
        request.metadata_mut().insert(CLIENT_ID, self.id.clone());
        let began = Instant::now();
        match PreferenceClient::new(self.channel.clone()).score(request).await {
            Ok(answer) => check_score(answer.get_ref(), judge, began, &items),
            Err(status) => {
                // A deadline that passed here is reported by tonic as a cancellation.
                let code = if status.code() == Code::Cancelled { Code::DeadlineExceeded } else { status.code() };
                let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
                End::Failed { code, retry_after, message: status.to_string() }
            }
        }
    }
}
