//! One version after another, by rpc or by publishing, with the judge told what may answer when.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use plumb_client::Client;

use crate::context::{Cast, Context};
use crate::expected::{Judge, LM, PM};
use crate::latency::Window;
use crate::server::{Launch, Server};
use crate::surface::{self, Faults};

/// How versions come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// LoadVersion, SetLabel, UnloadVersion.
    Rpc,
    /// A published version is moved into the root that the server watches, which is the last step of publishing.
    Publish {
        /// The watched root.
        root: PathBuf,
        /// Where every variant was published, by number.
        published: PathBuf,
    },
}

/// The versions of both models on a server.
pub(crate) struct Rollout {
    way: Way,
    judge: Arc<Judge>,
    models: [Model; 2],
}

struct Model {
    name: &'static str,
    variants: Vec<PathBuf>,
    version: u64,
}

impl Rollout {
    /// A server with the first variants as version 1, and how its versions go on.
    pub(crate) async fn start(
        context: &Context,
        cast: &Cast,
        way: Way,
        flags: &str,
        faults: Option<&Faults>,
    ) -> Result<(Self, Server)> {
        let model = |name, variants: &[PathBuf]| Model { name, variants: variants.to_vec(), version: 1 };
        let models = [model(PM, &cast.preference), model(LM, &cast.language)];
        let rollout = Self { way, judge: Arc::clone(&cast.judge), models };
        rollout.judge.forget();
        let launch = faults.map_or_else(|| Ok(context.launch()), |faults| context.launch_faulty(faults))?;
        let mut launch = launch.flags("--kv-cache-mib 64").flags(flags);
        for model in &rollout.models {
            rollout.judge.begins(model.name, 1, 0);
            launch = rollout.with_first(launch, model)?;
        }
        let server = launch.start(context.folder()).await?;
        let client = server.client()?;
        for model in rollout.models.iter().filter(|_| rollout.way == Way::Rpc) {
            client.set_label(model.name, surface::STABLE, Some(1)).await?;
        }
        Ok((rollout, server))
    }

    fn with_first(&self, launch: Launch, model: &Model) -> Result<Launch> {
        match &self.way {
            Way::Rpc => Ok(launch.model(model.name, &model.variants[0])),
            Way::Publish { .. } => {
                self.publish(model, 1)?;
                Ok(launch)
            }
        }
    }

    /// Swaps a model, 0 the preference and 1 the language model, for its next variant; answers the time from the request for the new version to the end of the old.
    pub(crate) async fn swap(&mut self, client: &Client, index: usize) -> Result<Window> {
        let from = Instant::now();
        let model = &self.models[index];
        let (name, old, new) = (model.name, model.version, model.version + 1);
        let variant = self.variant(index, new);
        self.judge.begins(name, new, variant);
        match &self.way {
            Way::Rpc => {
                surface::bring_in(client, name, new, &model.variants[variant]).await?;
                self.judge.ends(name, old);
                surface::take_out(client, name, old).await?;
            }
            Way::Publish { .. } => {
                self.publish(model, new)?;
                surface::until_available(client, name, new).await?;
                self.judge.ends(name, old);
                surface::until_ended(client, name, old).await?;
            }
        }
        self.models[index].version = new;
        Ok(Window { from, to: Instant::now() })
    }

    /// Which variant a version is.
    fn variant(&self, index: usize, version: u64) -> usize {
        (version as usize - 1) % self.models[index].variants.len()
    }

    /// Makes a version appear in the root, whole.
    fn publish(&self, model: &Model, version: u64) -> Result<()> {
        let Way::Publish { root, published } = &self.way else { bail!("there is no root") };
        let variant = (version as usize - 1) % model.variants.len();
        let from = published.join(model.name).join((variant + 1).to_string());
        let draft = published.join(format!("{}-{version}", model.name));
        fs::create_dir_all(&draft)?;
        for entry in fs::read_dir(&from).with_context(|| from.display().to_string())? {
            let path = entry?.path();
            if let Some(name) = path.file_name() {
                // The content stays where it is.
                fs::hard_link(&path, draft.join(name))?;
            }
        }
        let versions = root.join(model.name);
        fs::create_dir_all(&versions)?;
        Ok(fs::rename(&draft, versions.join(version.to_string()))?)
    }
}

/// Publishes a checkpoint with the trainer's command.
pub(crate) fn publish(context: &Context, checkpoint: &Path, root: &Path, name: &str) -> Result<()> {
    let output = publish_command(context, checkpoint, root, name).output()?;
    ensure!(output.status.success(), "publish: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Begins to publish a checkpoint, and says nothing.
pub(crate) fn begin_to_publish(context: &Context, checkpoint: &Path, root: &Path, name: &str) -> Result<Child> {
    let mut command = publish_command(context, checkpoint, root, name);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("plumb-train publish")
}

fn publish_command(context: &Context, checkpoint: &Path, root: &Path, name: &str) -> Command {
    let mut command = Command::new(&context.programs.train);
    command.arg("publish").arg(checkpoint).arg(root).args(["--name", name]);
    command
}

/// Publishes all variants, so that they can be moved into a root, and answers the flags with which a server watches it.
pub(crate) fn publishing(context: &Context, cast: &Cast) -> Result<(Way, String)> {
    let root = context.folder().join("root");
    fs::create_dir_all(&root)?;
    let published = context.folder().join("published");
    for (name, variants) in [(PM, &cast.preference), (LM, &cast.language)] {
        for variant in variants {
            publish(context, variant, &published, name)?;
        }
    }
    let flags = surface::watching(&root);
    Ok((Way::Publish { root, published }, flags))
}
