//! What is scored: dialogues from files, or made-up ones.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use flate2::read::MultiGzDecoder;
use plumb_client::{transcript, v1};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// Responses to every prompt: two of its own where it comes from a file, the rest are those of the next dialogues.
pub(crate) const RESPONSES: usize = 4;

/// So that every text fits into 1,024 tokens of a small vocabulary.
const MAX_CHARACTERS: usize = 1200;

/// Words of made-up dialogues.
const WORDS: &str = "the a some of to in and that it is was for on are with as at be this have from or had by what \
    water river bread morning letter garden window answer question number music table city winter story doctor paper \
    light train friend market engine island forest kettle ladder pocket bridge candle how why please could would \
    explain write describe compare find list choose better different quick small old green quiet careful";

/// A prompt and responses to it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dialogue {
    /// Turns up to and including the last one of the user.
    pub(crate) prompt: v1::Conversation,
    /// What might follow; [`RESPONSES`] of them.
    pub(crate) responses: Vec<String>,
}

impl Dialogue {
    /// The prompt with a response, as it is scored.
    pub(crate) fn with(&self, response: usize) -> v1::Input {
        let mut conversation = self.prompt.clone();
        let content = self.responses[response].clone();
        conversation.messages.push(v1::Message { role: "assistant".to_owned(), content });
        v1::Input { input: Some(v1::input::Input::Conversation(conversation)) }
    }

    /// The prompt as an input.
    pub(crate) fn prompt(&self) -> v1::Input {
        v1::Input { input: Some(v1::input::Input::Conversation(self.prompt.clone())) }
    }
}

/// So many dialogues; all different.
pub(crate) fn dialogues(files: &[PathBuf], count: usize, seed: u64) -> Result<Vec<Dialogue>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    if files.is_empty() {
        return Ok((0..count).map(|_| made_up(&mut rng)).collect());
    }
    let mut pairs = Vec::new();
    for file in files {
        read(file, &mut pairs).with_context(|| file.display().to_string())?;
    }
    if pairs.len() < count {
        bail!("the files hold {} dialogues that are short enough, {count} are needed; see --dialogues", pairs.len());
    }
    // Files are often sorted.
    pairs.shuffle(&mut rng);
    pairs.truncate(count);
    let own: Vec<Vec<String>> = pairs.iter().map(|pair| pair.responses.clone()).collect();
    for (i, pair) in pairs.iter_mut().enumerate() {
        let others = (1..).map(|next| &own[(i + next) % own.len()][0]);
        pair.responses.extend(others.take(RESPONSES - 2).cloned());
    }
    Ok(pairs)
}

fn made_up(rng: &mut ChaCha8Rng) -> Dialogue {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut text = |least: usize, most: usize| {
        let count = rng.random_range(least..=most);
        let words: Vec<&str> = (0..count).filter_map(|_| words.choose(rng).copied()).collect();
        words.join(" ") + "."
    };
    let message = |role: &str, content| v1::Message { role: role.to_owned(), content };
    let prompt = vec![message("user", text(4, 60)), message("assistant", text(4, 60)), message("user", text(4, 20))];
    let responses = (0..RESPONSES).map(|_| text(4, 80)).collect();
    Dialogue { prompt: v1::Conversation { messages: prompt }, responses }
}

#[derive(Deserialize)]
struct Pair {
    chosen: String,
    rejected: String,
}

fn read(file: &Path, into: &mut Vec<Dialogue>) -> Result<()> {
    let packed = file.extension().is_some_and(|extension| extension == "gz");
    let open = File::open(file)?;
    let reader: Box<dyn Read> = if packed { Box::new(MultiGzDecoder::new(open)) } else { Box::new(open) };
    for line in BufReader::new(reader).lines() {
        let pair: Pair = serde_json::from_str(&line?).context("a line without `chosen` and `rejected`")?;
        let longest = pair.chosen.chars().count().max(pair.rejected.chars().count());
        let (mut chosen, mut rejected) = (transcript::turns(&pair.chosen), transcript::turns(&pair.rejected));
        let (Some(first), Some(second)) = (chosen.pop(), rejected.pop()) else { continue };
        let is_usable = chosen == rejected
            && chosen.last().is_some_and(|turn| turn.role == "user")
            && first.content != second.content
            && first.role == "assistant"
            && longest <= MAX_CHARACTERS;
        if is_usable {
            let responses = vec![first.content, second.content];
            into.push(Dialogue { prompt: v1::Conversation { messages: chosen }, responses });
        }
    }
    Ok(())
}
