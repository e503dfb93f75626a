//! Checkpoints from the Hugging Face hub, by way of the cache that Python's `huggingface_hub` uses too.
//!
//! A revision is first resolved to a commit, and all files are taken from that commit, so that what is opened was
//! published together. `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` have their usual
//! meanings.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{lora, safetensors, tokenizer};
use crate::{Error, Result};

/// Files that are fetched where the repository has them. What has to be there is found out on opening the folder.
const FILES: [&str; 8] = [
    "config.json",
    tokenizer::TOKENIZER,
    tokenizer::TOKENIZER_CONFIG,
    tokenizer::SPECIAL_TOKENS,
    tokenizer::CHAT_TEMPLATE,
    tokenizer::GENERATION_CONFIG,
    lora::CONFIG,
    lora::WEIGHTS,
];

/// Held while a repository is fetched: two that fetch the same file make each other fail, because hf-hub waits for the
/// lock of a file for seconds only.
static TURN: Mutex<()> = Mutex::new(());

/// Where the hub and its cache are.
#[derive(Clone, Debug)]
pub(super) struct Hub {
    pub(super) endpoint: String,
    pub(super) cache: PathBuf,
    pub(super) token: Option<String>,
    /// Never use the network.
    pub(super) offline: bool,
}

impl Hub {
    pub(super) fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = || Some(std::env::home_dir()?.join(".cache").join("huggingface"));
        let home = variable("HF_HOME").map(PathBuf::from).or_else(home);
        let cache = variable("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home?.join("hub")));
        let no_home = || Error::Hub("there is no home folder to keep the cache in: set HF_HOME".to_owned());
        let cache = cache.ok_or_else(no_home)?;
        Ok(Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            token: variable("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            cache,
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| !matches!(value.as_str(), "0" | "false" | "no")),
        })
    }

    /// Brings the files of a repository into the cache and returns the folder they lie in.
    pub(super) fn fetch(&self, id: &str, revision: Option<&str>) -> Result<PathBuf> {
        let revision = revision.unwrap_or("main");
        let cache = Cache::new(self.cache.clone());
        let repo = |revision: &str| Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        if self.offline {
            return cached(&cache.repo(repo(revision)), revision).ok_or_else(|| {
                Error::Hub(format!(
                    "there is no folder `{id}`; as a repository, at `{revision}`, it is not in the cache \
                     {}, and HF_HUB_OFFLINE forbids fetching it: unset it once",
                    self.cache.display()
                ))
            });
        }
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error: ApiError| self.explain(id, revision, &error);
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .build()
            .map_err(failed)?;
        let info = api.repo(repo(revision)).info().map_err(failed)?;
        if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::Hub(format!("{} answered with the commit `{}`", self.endpoint, info.sha)));
        }
        let commit = api.repo(repo(&info.sha));
        let folder = cache.repo(repo(&info.sha)).pointer_path(&info.sha);
        // Shows a progress bar where there is a terminal.
        let fetch_one = |file: &str| match folder.join(file).exists() {
            true => Ok(()),
            false => commit.download(file).map(|_| ()).map_err(failed),
        };

        let remote: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        for file in FILES.into_iter().filter(|file| remote.contains(file)) {
            fetch_one(file)?;
        }
        if remote.contains(&safetensors::SINGLE) {
            fetch_one(safetensors::SINGLE)?;
        } else if remote.contains(&safetensors::INDEX) {
            fetch_one(safetensors::INDEX)?;
            for shard in safetensors::weight_files(&folder)? {
                fetch_one(&shard)?;
            }
        } else if !remote.contains(&lora::WEIGHTS) {
            return Err(no_weights(id, &remote));
        }
        // So that the revision is found when offline.
        let remembered = cache.repo(repo(revision)).create_ref(&info.sha);
        remembered.map_err(|source| Error::Io { path: self.cache.clone(), source })?;
        Ok(folder)
    }

    fn explain(&self, id: &str, revision: &str, error: &ApiError) -> Error {
        let error = error.to_string();
        let status = |status: &str| error.contains(&format!("http status: {status}"));
        let advice = if status("401") || status("403") {
            "set HF_TOKEN to a token that may read it; a gated model has to be asked for first"
        } else if status("404") {
            "check the id and the revision; without HF_TOKEN a private repository looks like a missing one"
        } else {
            "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"
        };
        // A mistyped path ends up here too.
        Error::Hub(format!(
            "there is no folder `{id}`; as a repository, at `{revision}` of {}: {error}; {advice}",
            self.endpoint
        ))
    }
}

/// Where a revision lies in the cache: by its reference, or by its folder if it is a commit.
fn cached(repo: &CacheRepo, revision: &str) -> Option<PathBuf> {
    let known = ["config.json", lora::CONFIG].into_iter().find_map(|file| repo.get(file));
    let folder = match known {
        Some(file) => file.parent()?.to_owned(),
        None => repo.pointer_path(revision),
    };
    folder.is_dir().then_some(folder)
}

fn no_weights(id: &str, remote: &[&str]) -> Error {
    let advice = if remote.iter().any(|file| file.ends_with(".gguf")) {
        "it has GGUF files: download one and name it as the model"
    } else if remote.iter().any(|file| file.ends_with(".bin")) {
        "it has pickles only, which can run code and are not read: convert it to safetensors"
    } else {
        "is it a model?"
    };
    Error::Hub(format!("`{id}` has no safetensors; {advice}"))
}

#[cfg(test)]
mod tests;
