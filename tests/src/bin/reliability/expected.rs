//! What every version must answer, and which version may answer when.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use futures::StreamExt;
use plumb_client::{Client, score, v1};

use crate::dialogues::{Dialogue, RESPONSES};
use crate::server::Launch;

/// The preference model's name.
pub(crate) const PM: &str = "pm";
/// The language model's name.
pub(crate) const LM: &str = "lm";
/// Tokens that a Generate call asks for.
pub(crate) const NEW_TOKENS: u32 = 16;
/// Prompts of Generate calls: the first so many dialogues.
const MAX_PROMPTS: usize = 100;

/// What a model with certain weights answers.
#[derive(Clone, Debug)]
struct Answers<T> {
    digest: String,
    /// By dialogue.
    values: Vec<T>,
}

/// The bits of the rewards of a dialogue's responses.
type Rewards = [u32; RESPONSES];
/// Token ids and the bits of the sum of their log-probabilities.
pub(crate) type Drawn = (Vec<u32>, u32);

/// What every variant of the two checkpoints answers, computed item by item by a server that does nothing else.
#[derive(Debug)]
pub(crate) struct Expected {
    /// What is asked.
    pub(crate) dialogues: Vec<Dialogue>,
    rewards: Vec<Answers<Rewards>>,
    texts: Vec<Answers<Drawn>>,
}

/// How a server is started and what it is asked.
pub(crate) struct Reference<'a> {
    pub(crate) program: &'a Path,
    pub(crate) threads: Option<usize>,
    /// Variants of the preference model.
    pub(crate) preference: &'a [PathBuf],
    /// Variants of the language model.
    pub(crate) language: &'a [PathBuf],
    pub(crate) dialogues: Vec<Dialogue>,
}

impl Expected {
    /// Asks a server of its own, without a prefix cache, one item after another.
    pub(crate) async fn compute(reference: Reference<'_>, folder: &Path, step: impl Fn()) -> Result<Self> {
        let Reference { program, threads, preference, language, dialogues } = reference;
        let mut launch = Launch::of(program).threads(threads).flags("--no-prefix-cache --kv-cache-mib 64");
        let named = |name: &str, i: usize| format!("{name}-{i}");
        for (name, folders) in [(PM, preference), (LM, language)] {
            for (i, folder) in folders.iter().enumerate() {
                launch = launch.model(&named(name, i), folder);
            }
        }
        let server = launch.start(folder).await?;
        let client = server.client()?;
        let (mut rewards, mut texts) = (Vec::new(), Vec::new());
        for i in 0..preference.len() {
            rewards.push(rewards_of(&client, &named(PM, i), &dialogues).await?);
            step();
        }
        for i in 0..language.len() {
            let prompts = &dialogues[..dialogues.len().min(MAX_PROMPTS)];
            texts.push(texts_of(&client, &named(LM, i), prompts).await?);
            step();
        }
        Self { dialogues, rewards, texts }.without_ties()
    }

    /// The dialogues whose prompts are gone on with.
    pub(crate) fn prompts(&self) -> usize {
        self.texts.first().map_or(0, |answers| answers.values.len())
    }

    /// The bits of a reward.
    pub(crate) fn reward(&self, variant: usize, dialogue: usize, response: usize) -> u32 {
        self.rewards[variant].values[dialogue][response]
    }

    /// Leaves out dialogues of which two variants answer the same: such a score says nothing about the version. Of a
    /// million pairs of rewards that are some.
    fn without_ties(mut self) -> Result<Self> {
        let all = self.dialogues.len();
        let tied: Vec<bool> = (0..all).map(|dialogue| self.is_tied(dialogue)).collect();
        retain(&mut self.dialogues, &tied);
        self.rewards.iter_mut().for_each(|answers| retain(&mut answers.values, &tied));
        self.texts.iter_mut().for_each(|answers| retain(&mut answers.values, &tied));
        let left = self.dialogues.len();
        if left * 2 < all || self.texts.iter().any(|answers| answers.values.is_empty()) {
            bail!("two variants of a checkpoint answer the same for {} of {all} dialogues", all - left);
        }
        Ok(self)
    }

    fn is_tied(&self, dialogue: usize) -> bool {
        let rewards = (0..RESPONSES).any(|i| has_twice(self.rewards.iter().map(|answers| answers.values[dialogue][i])));
        rewards || has_twice(self.texts.iter().filter_map(|answers| answers.values.get(dialogue)))
    }
}

fn has_twice<T: PartialEq>(values: impl Iterator<Item = T>) -> bool {
    let values: Vec<T> = values.collect();
    values.iter().enumerate().any(|(i, value)| values[..i].contains(value))
}

/// Leaves out what is marked; there may be more marks than values.
fn retain<T>(values: &mut Vec<T>, leave_out: &[bool]) {
    let mut marks = leave_out.iter();
    values.retain(|_| !marks.next().copied().unwrap_or_default());
}

async fn rewards_of(client: &Client, model: &str, dialogues: &[Dialogue]) -> Result<Answers<Rewards>> {
    let mut answers = Answers { digest: String::new(), values: Vec::new() };
    for dialogue in dialogues {
        let mut rewards = [0; RESPONSES];
        for (response, bits) in rewards.iter_mut().enumerate() {
            let model = Some(v1::ModelSpec { name: model.to_owned(), choice: None });
            let request = v1::ScoreRequest { model, items: vec![dialogue.with(response)], ..Default::default() };
            let answer = client.score(request).await?;
            *bits = score(&answer.results[0])?.reward.to_bits();
            answers.digest = answer.model.context("no model in the answer")?.weights_digest;
        }
        answers.values.push(rewards);
    }
    Ok(answers)
}

async fn texts_of(client: &Client, model: &str, dialogues: &[Dialogue]) -> Result<Answers<Drawn>> {
    let mut answers = Answers { digest: String::new(), values: Vec::new() };
    for dialogue in dialogues {
        let (identity, drawn) = generate(client, model, dialogue).await?;
        answers.digest = identity.weights_digest;
        answers.values.push(drawn);
    }
    Ok(answers)
}

/// Takes the likeliest tokens behind a prompt.
pub(crate) async fn generate(
    client: &Client,
    model: &str,
    dialogue: &Dialogue,
) -> Result<(v1::ModelIdentity, Drawn), plumb_client::Error> {
    let request = v1::GenerateRequest {
        model: Some(v1::ModelSpec { name: model.to_owned(), choice: None }),
        prompt: Some(dialogue.prompt()),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping { max_new_tokens: Some(NEW_TOKENS), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let mut answers = client.generate(request).await?;
    let (mut identity, mut ids, mut end, mut is_complete) = (None, Vec::new(), None, false);
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        identity = identity.or(answer.model);
        ids.extend(answer.token_ids);
        end = end.or(answer.end);
        is_complete |= answer.summary.is_some();
    }
    match (identity, end) {
        (Some(identity), Some(end)) if is_complete => Ok((identity, (ids, end.sum_log_prob.to_bits()))),
        _ => Err(plumb_client::Error::Contract("the stream ended without a model, an end or a summary".to_owned())),
    }
}

/// A version that may answer, until after it no longer is the one that is meant.
#[derive(Clone, Copy, Debug)]
struct Life {
    variant: usize,
    until: Option<Instant>,
}

/// Compares answers with what is expected.
#[derive(Debug)]
pub(crate) struct Judge {
    expected: Expected,
    lives: Mutex<HashMap<(&'static str, u64), Life>>,
}

impl Judge {
    /// Without any version.
    pub(crate) fn new(expected: Expected) -> Self {
        Self { expected, lives: Mutex::default() }
    }

    /// What is expected.
    pub(crate) fn expected(&self) -> &Expected {
        &self.expected
    }

    /// From now on this version may answer. To be told before the server is.
    pub(crate) fn begins(&self, model: &'static str, version: u64, variant: usize) {
        let life = Life { variant, until: None };
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).insert((model, version), life);
    }

    /// From now on a call that begins must get another version. To be told once the server has said so.
    pub(crate) fn ends(&self, model: &'static str, version: u64) {
        let mut lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(life) = lives.get_mut(&(model, version)) {
            life.until = Some(Instant::now());
        }
    }

    /// Forgets all versions: another server begins.
    pub(crate) fn forget(&self) {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Checks the rewards of an answer: for each the dialogue, the response and the bits.
    pub(crate) fn rewards(
        &self,
        identity: Option<&v1::ModelIdentity>,
        began: Instant,
        found: impl Iterator<Item = (usize, usize, u32)>,
    ) -> Result<(), String> {
        let (variant, version) = self.variant(PM, identity, began, |variant| &self.expected.rewards[variant].digest)?;
        for (dialogue, response, bits) in found {
            let of = |variant: usize| self.expected.reward(variant, dialogue, response);
            if of(variant) != bits {
                let whose = (0..self.expected.rewards.len()).find(|other| of(*other) == bits);
                return Err(format!(
                    "version {version} (variant {variant}) answers {bits:#010x} for response {response} of dialogue \
                     {dialogue}, {:#010x} is right; it is that of variant {whose:?}",
                    of(variant)
                ));
            }
        }
        Ok(())
    }

    /// Checks what was generated behind the prompt of a dialogue.
    pub(crate) fn text(
        &self,
        identity: &v1::ModelIdentity,
        began: Instant,
        dialogue: usize,
        drawn: &Drawn,
    ) -> Result<(), String> {
        let digest = |variant: usize| &self.expected.texts[variant].digest;
        let (variant, version) = self.variant(LM, Some(identity), began, digest)?;
        match &self.expected.texts[variant].values[dialogue] {
            right if right == drawn => Ok(()),
            right => {
                Err(format!("version {version} goes on with {drawn:?} behind dialogue {dialogue}, {right:?} is right"))
            }
        }
    }

    /// The variant that has to have answered, if the version that says it has may have.
    fn variant<'a>(
        &'a self,
        model: &'static str,
        identity: Option<&v1::ModelIdentity>,
        began: Instant,
        digest: impl Fn(usize) -> &'a String,
    ) -> Result<(usize, u64), String> {
        let identity = identity.ok_or("the answer names no model")?;
        let version = identity.version;
        let lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        let life = lives.get(&(model, version)).filter(|_| identity.name == model);
        let life = life.ok_or_else(|| format!("{} {version} answers, which never was", identity.name))?;
        if life.until.is_some_and(|until| until < began) {
            return Err(format!("version {version} answers a call that began when another one was meant"));
        }
        if identity.weights_digest != *digest(life.variant) {
            return Err(format!("version {version} has the digest {}", identity.weights_digest));
        }
        Ok((life.variant, version))
    }
}
