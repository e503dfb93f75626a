//! Samples of a language model that a server has loaded: as the worse sides of pairs (human-model pairs, Askell et al.
//! 2021, section 4.4), or to be ranked.
//!
//! A line of the output depends on its line of the input, the options and the model, and on nothing else: what was written
//! before an interruption is kept, and the rest follows.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use plumb_client::{ApiKey, Client, ClientOptions, conversation, text, v1};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::input::{BadLines, Lines};
use crate::progress;
use crate::{Error, Result};

/// What is sampled, from whom.
#[derive(Clone, Debug, Serialize, clap::Args)]
pub struct Sampling {
    /// Address of the server; several, separated by commas, are used in turn
    #[arg(
        long,
        env = "PLUMB_SERVER",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:50051"
    )]
    #[serde(skip)]
    pub server: Vec<String>,
    /// Bearer token
    #[arg(long, env = "PLUMB_API_KEY", hide_env_values = true, value_name = "KEY")]
    #[serde(skip)]
    pub api_key: Option<String>,
    /// Name of the language model [default: the server's]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub model: String,
    /// Write so many samples of every prompt, rather than pairs with a sample as the rejected side
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub samples: Option<u32>,
    /// Of the model's distribution; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub temperature: f32,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Most tokens of a sample
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: u32,
    /// End a sample before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Of all samples; each has its own, from this and its prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Calls in flight: the server makes batches of them
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    #[serde(skip)]
    pub concurrency: u32,
    /// Bad lines after which to stop
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_bad_lines: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// Lines of the output.
    pub lines: u64,
    /// Of those, lines that an interrupted call had left.
    pub kept: u64,
}

/// A line of the input. Other keys are the data's own.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "task_id")]
    id: Option<Value>,
    prompt: Option<Words>,
    chosen: Option<Words>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(untagged)]
enum Words {
    Text(String),
    Turns(Vec<Turn>),
}

#[derive(Clone, Deserialize, Serialize)]
struct Turn {
    role: String,
    content: String,
}

/// A line of the output, but for the sample.
struct Job {
    prompt: Words,
    /// Of the sample among those of its prompt.
    seed: u64,
    to: To,
}

enum To {
    /// The rejected side beside this one.
    Pair { chosen: Words },
    /// A response of a prompt with this id.
    Row { id: Value },
}

/// Samples from the prompts of files and writes JSONL: pairs, whose rejected sides are samples, or rows of `id`, `prompt`
/// and `response`. An output that was interrupted is gone on with, if nothing has changed.
///
/// # Errors
/// If a file cannot be read or written, more lines are bad than allowed, or the server cannot answer.
pub fn sample(files: &[PathBuf], output: &Path, sampling: &Sampling, warn: &mut dyn FnMut(&str)) -> Result<Sampled> {
    if output.exists() {
        return Err(Error::Recipe(format!("{} exists: name another file", output.display())));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::io(output))?;
    runtime.block_on(async {
        let options = ClientOptions {
            endpoints: sampling.server.clone(),
            api_key: sampling.api_key.clone().map(ApiKey::new),
            // A call waits behind all others that are in flight.
            call_timeout: None,
            ..ClientOptions::default()
        };
        let client = Client::connect(options).await?;
        let model = client.get_model(spec(sampling)).await?.model.unwrap_or_default();
        let mut total = 0;
        for job in Jobs::new(files, sampling, &mut |_| ()) {
            job?;
            total += 1;
        }
        let unfinished = unfinished(files, output, sampling, &model)?;
        let (mut file, kept) = resume(&unfinished).map_err(Error::io(&unfinished))?;
        let bar = progress::bar(total, "samples").with_position(kept);
        // The version that answers may change meanwhile; the one that began goes on.
        let version = v1::ModelSpec { name: model.name, choice: Some(v1::model_spec::Choice::Version(model.version)) };
        let jobs = Jobs::new(files, sampling, warn).skip(kept as usize);
        let mut lines = stream::iter(jobs)
            .map(|job| async { job?.line(&client, &version, sampling).await })
            .buffered(sampling.concurrency as usize);
        while let Some(line) = lines.try_next().await? {
            writeln!(file, "{line}").map_err(Error::io(&unfinished))?;
            bar.inc(1);
        }
        let written = file.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        written.map_err(Error::io(&unfinished))?;
        fs::rename(&unfinished, output).map_err(Error::io(output))?;
        bar.finish_and_clear();
        Ok(Sampled { lines: total, kept })
    })
}

fn spec(sampling: &Sampling) -> v1::ModelSpec {
    v1::ModelSpec { name: sampling.model.clone(), choice: None }
}

/// The name of an output that is not finished: another one for other options, files or weights.
fn unfinished(files: &[PathBuf], output: &Path, sampling: &Sampling, model: &v1::ModelIdentity) -> Result<PathBuf> {
    let mut inputs = Vec::new();
    for path in files {
        let about = fs::metadata(path).map_err(Error::io(path))?;
        inputs.push(json!([path, about.len()]));
    }
    let work = json!([inputs, sampling, model.name, model.version, model.weights_digest]);
    let digest = hex::encode(&Sha256::digest(work.to_string())[..8]);
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    Ok(output.with_file_name(format!(".{name}.{digest}.unfinished")))
}

/// What an interrupted call has written, up to the last whole line, and how many lines that is.
fn resume(path: &Path) -> std::io::Result<(BufWriter<File>, u64)> {
    let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    // Two calls at once would write each other's lines.
    file.try_lock().map_err(std::io::Error::from)?;
    let (mut lines, mut end) = (0, 0);
    let mut reader = BufReader::new(&mut file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        (lines, end) = (lines + 1, end + line.len() as u64);
        line.clear();
    }
    file.set_len(end)?;
    file.seek(std::io::SeekFrom::End(0))?;
    Ok((BufWriter::new(file), lines))
}

/// Jobs, in the order of the lines.
struct Jobs<'a> {
    files: std::slice::Iter<'a, PathBuf>,
    open: Option<(&'a Path, Lines)>,
    sampling: &'a Sampling,
    bad: BadLines,
    warn: &'a mut dyn FnMut(&str),
    /// Prompts that have been sampled from, where pairs share them.
    seen: HashSet<[u8; 32]>,
    /// Of the present prompt, the last first.
    left: Vec<Job>,
}

impl<'a> Jobs<'a> {
    fn new(files: &'a [PathBuf], sampling: &'a Sampling, warn: &'a mut dyn FnMut(&str)) -> Self {
        let bad = BadLines::at_most(sampling.max_bad_lines);
        Self { files: files.iter(), open: None, sampling, bad, warn, seen: HashSet::new(), left: Vec::new() }
    }

    /// The next job, unless there is none.
    fn job(&mut self) -> Result<Option<Job>> {
        loop {
            if let Some(job) = self.left.pop() {
                return Ok(Some(job));
            }
            let Some((path, lines)) = &mut self.open else {
                let Some(path) = self.files.next() else { return Ok(None) };
                self.open = Some((path, Lines::open(path)?));
                continue;
            };
            let Some((number, line)) = lines.next()? else {
                self.open = None;
                continue;
            };
            let jobs = serde_json::from_slice(&line).map_err(|error| error.to_string());
            match jobs.and_then(|line: Line| jobs_of(line, self.sampling, &mut self.seen)) {
                Ok(jobs) => self.left = jobs,
                Err(reason) => self.bad.skip(path, number, &reason, self.warn)?,
            }
        }
    }
}

impl Iterator for Jobs<'_> {
    type Item = Result<Job>;

    fn next(&mut self) -> Option<Result<Job>> {
        self.job().transpose()
    }
}

/// What a line asks for, the last job first.
fn jobs_of(line: Line, sampling: &Sampling, seen: &mut HashSet<[u8; 32]>) -> std::result::Result<Vec<Job>, String> {
    let Line { id, prompt, chosen } = line;
    let (prompt, chosen) = match (prompt, chosen) {
        // A whole dialogue: all but its last turn is the prompt.
        (None, Some(Words::Turns(mut turns))) if turns.len() > 1 => {
            let last = turns.split_off(turns.len() - 1);
            (Words::Turns(turns), Some(Words::Turns(last)))
        }
        (Some(prompt), chosen) => (prompt, chosen),
        (None, _) => return Err("no prompt".to_owned()),
    };
    let empty = match &prompt {
        Words::Text(text) => text.is_empty(),
        Words::Turns(turns) => turns.is_empty(),
    };
    if empty {
        return Err("an empty prompt".to_owned());
    }
    let key: [u8; 32] = Sha256::digest(json!(prompt).to_string()).into();
    let seed = |part: &str, number: u32| {
        let hash = Sha256::new()
            .chain_update(sampling.seed.to_le_bytes())
            .chain_update(key)
            .chain_update(number.to_le_bytes())
            .chain_update(part);
        hash.finalize().iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte))
    };
    match (sampling.samples, chosen) {
        (None, Some(chosen)) => {
            let seed = seed(&json!(chosen).to_string(), 0);
            Ok(vec![Job { prompt, seed, to: To::Pair { chosen } }])
        }
        (None, None) => Err("no chosen side; --samples asks for samples without one".to_owned()),
        // Each prompt once, whoever shares it.
        (Some(_), _) if !seen.insert(key) => Ok(Vec::new()),
        (Some(count), _) => {
            let id = id.unwrap_or_else(|| json!(hex::encode(&key[..8])));
            let job = |i| Job { prompt: prompt.clone(), seed: seed("", i), to: To::Row { id: id.clone() } };
            Ok((0..count).rev().map(job).collect())
        }
    }
}

impl Job {
    /// Asks the server, and writes what it says as a line.
    async fn line(self, client: &Client, model: &v1::ModelSpec, sampling: &Sampling) -> Result<Value> {
        let input = match &self.prompt {
            Words::Text(prompt) => text(prompt.clone()),
            Words::Turns(turns) => conversation(turns.iter().map(|turn| (turn.role.clone(), turn.content.clone()))),
        };
        let request = v1::GenerateRequest {
            model: Some(model.clone()),
            prompt: Some(input),
            // As training cuts what is too long.
            text: Some(v1::TextOptions { truncation: v1::Truncation::Left as i32, ..Default::default() }),
            sampling: Some(v1::Sampling {
                temperature: Some(sampling.temperature),
                top_p: Some(sampling.top_p),
                seed: Some(self.seed),
                ..Default::default()
            }),
            stopping: Some(v1::Stopping {
                max_new_tokens: Some(sampling.max_new_tokens),
                stop_strings: sampling.stop.clone(),
                ignore_eos: false,
            }),
            priority: v1::Priority::Low as i32,
            ..Default::default()
        };
        let mut pieces = client.generate(request).await?;
        let (mut sample, mut ended) = (String::new(), false);
        while let Some(piece) = pieces.try_next().await? {
            sample += &piece.text;
            ended |= piece.end.is_some();
        }
        if !ended {
            return Err(plumb_client::Error::Contract("a sample without an end".into()).into());
        }
        let prompt = json!(self.prompt);
        Ok(match self.to {
            To::Row { id } => json!({"id": id, "prompt": prompt, "response": sample}),
            To::Pair { chosen: Words::Text(chosen) } => json!({"prompt": prompt, "chosen": chosen, "rejected": sample}),
            To::Pair { chosen } => {
                json!({"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": sample}]})
            }
        })
    }
}
