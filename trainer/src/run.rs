//! A run: from a recipe to a checkpoint.
//!
//! The same recipe on the same kind of device gives the same bits, on any number of threads, and also where a run was
//! interrupted and went on: the order of the data and the sums of gradients depend on the recipe alone. So do several
//! processes, of which the first writes all files.
//!
//! On a GPU, weights, gradient and the optimiser's memory stay there from step to step. They come to the process where it
//! saves a state, where gradients of several processes are added up whose GPUs cannot meet, and where an adapter's are made
//! of them. Rewards and losses come once a shard, when all of its parts have been asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use plumb_kernels::gradient::AdamW;
use plumb_model::decoder::gradient::{Group, Numbers, Parameter, TrainOptions, Trainable};
use plumb_model::decoder::{DType, Device, DeviceChoice};
use serde_json::json;

use crate::card;
use crate::data::{Counts, Reader};
use crate::draft::Draft;
use crate::examples::{Example, Examples, Side};
use crate::objective::{Measures, Sums, Weights, scores};
use crate::order::{Order, micro_batches};
use crate::processes::{Processes, digest, digest_examples};
use crate::recipe::{ComputeType, Objective, Recipe};
use crate::record::{Record, Recorder};
use crate::report::report;
use crate::shards::Shards;
use crate::state::State;
use crate::{Error, Result, teach};

/// Examples of the dev data that are in memory at a time.
const DEV_PART: usize = 4096;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Steps that were taken, those before an interruption among them.
    pub steps: u64,
    /// Measures on the dev data, if there is any.
    pub dev: Option<Measures>,
    /// Folder of the checkpoint, in Hugging Face layout.
    pub checkpoint: PathBuf,
}

/// Trains, or goes on with the run that the output folder holds. Of several processes that were started together, all but
/// the first have nothing to tell.
///
/// # Errors
/// If the recipe, its checkpoint or its data make no sense, or a loss is not a number.
pub fn run(recipe: &Recipe) -> Result<Option<Finished>> {
    let processes = Processes::join()?;
    let result = run_with(recipe, &processes);
    let first = processes.is_first();
    Ok(Some(processes.leave(result)?).filter(|_| first))
}

fn run_with(recipe: &Recipe, processes: &Processes) -> Result<Finished> {
    processes.agree(recipe.check().and_then(|()| Shards::check(processes, recipe.shards)))?;
    let same = Recipe { threads: None, device: DeviceChoice::Auto, ..recipe.clone() };
    let text = toml::to_string(&same).map_err(|error| Error::Recipe(error.to_string()))?;
    processes.compare("options", || digest(text.as_bytes()), "give all the same")?;
    let threads = processes.threads(recipe.threads);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| Error::Recipe(format!("{threads} threads: {error}")))?;
    pool.install(|| {
        let mut run = processes.agree(Run::begin(recipe, processes))?;
        run.compare()?;
        run.shards.meet(&run.state.weights);
        run.finish()
    })
}

struct Run<'a> {
    recipe: &'a Recipe,
    processes: &'a Processes,
    shards: Shards<'a>,
    draft: Draft,
    device: Device,
    train: Examples,
    dev: Examples,
    model: Trainable,
    state: State,
    /// In the first process.
    recorder: Option<Recorder>,
    bar: ProgressBar,
}

impl<'a> Run<'a> {
    fn begin(recipe: &'a Recipe, processes: &'a Processes) -> Result<Self> {
        fs::create_dir_all(&recipe.output).map_err(Error::io(&recipe.output))?;
        let first = processes.is_first();
        let target = if first { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let mut draft = Draft::new(recipe)?;
        let reader = Reader {
            text: &draft.text,
            end_of_context: draft.end_of_context,
            beginning: draft.beginning,
            max_tokens: recipe.max_tokens.min(draft.config.max_position_embeddings),
            split_texts: recipe.objective == Objective::Language,
            max_bad_lines: recipe.max_bad_lines,
        };
        let mut warn = |line: &str| {
            if first {
                bar.suspend(|| eprintln!("{line}"));
            }
        };
        let mut read = |files: &[PathBuf]| match recipe.objective {
            Objective::Distillation => teach::examples(files, &draft.text, reader.max_tokens),
            _ => reader.read(files, &recipe.output, &mut warn),
        };
        let (train, train_counts) = read(&recipe.train)?;
        let (dev, dev_counts) = read(&recipe.dev)?;
        check_examples(recipe, &train_counts)?;
        let counts = [("train", &train_counts), ("dev", &dev_counts)];
        counts.iter().for_each(|(split, counts)| warn(&format!("{split}: {counts}")));

        let dtype = if recipe.dtype == ComputeType::F32 { DType::F32 } else { DType::Bf16 };
        let options = TrainOptions {
            language_head: recipe.objective == Objective::Preference && recipe.language_weight > 0.0,
            checkpointing: recipe.checkpointing,
        };
        if first {
            keep_recipe(recipe, &counts)?;
        }
        let (device, reason) = recipe.device.open(processes.rank_here(), env!("CARGO_PKG_NAME"))?;
        let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
        warn(&format!("computes on {}{reason}", device.name()));
        let state = match State::last(&recipe.output.join("states"), draft.values.len())? {
            Some(state) => {
                warn(&format!("goes on after step {}", state.step));
                state
            }
            None => State::new(std::mem::take(&mut draft.values))?,
        };
        draft.values = Vec::new();
        let shards = Shards::new(processes, recipe.shards, state.weights.len());
        let weights = draft.trained.weights(&state.weights)?.to_host()?;
        let model = Trainable::new(&draft.config, &weights, dtype, reader.max_tokens, options, &device)?;
        drop(weights);
        // What is trained of a decoder that is trained as a whole never leaves its device.
        let state = if draft.trained.is_adapter() { state } else { state.on(&device)? };
        draft.trained.compute_on(&device)?;
        let recorder = first.then(|| Recorder::open(&recipe.output, state.step)).transpose()?;
        Ok(Self { recipe, processes, shards, draft, device, train, dev, model, state, recorder, bar })
    }

    /// All processes have to begin alike, or they would learn something else than one.
    fn compare(&self) -> Result<()> {
        let Self { processes, state, .. } = self;
        if processes.count() == 1 {
            return Ok(());
        }
        let copies = "give all the same files";
        for (what, examples) in [("training data", &self.train), ("dev data", &self.dev)] {
            let digest = processes.agree(digest_examples(examples))?;
            processes.compare(what, || digest, copies)?;
        }
        let device = self.device.name();
        processes.compare("device", || digest(device.as_bytes()), "give each one of the same kind, see --device")?;
        let shared = "the output folder has to be one that all machines share";
        processes.compare("states to go on from", || digest(&state.step.to_le_bytes()), shared)?;
        let weights = processes.agree(state.weights.to_host().map_err(Error::from))?;
        processes.compare("weights", || digest(bytemuck::cast_slice(&weights)), copies)
    }

    fn finish(mut self) -> Result<Finished> {
        let recipe = self.recipe;
        let mut order = Order::new(recipe.seed, self.train.len(), recipe.batch);
        let all = order.steps_per_epoch() * recipe.epochs;
        let total = recipe.max_steps.map_or(all, |most| most.min(all));
        self.bar.set_length(total);
        self.bar.set_position(self.state.step);
        self.bar.set_style(style());
        self.bar.enable_steady_tick(Duration::from_millis(200));
        let mut gradient = self.state.weights.zeros()?;
        let states = recipe.output.join("states");
        while self.state.step < total {
            let step = self.state.step + 1;
            let indices = order.batch(step);
            self.step(step, total, &indices, &mut gradient)?;
            if step.is_multiple_of(recipe.save_every) || step == total {
                self.save(&states)?;
            }
            if recipe.evaluate_every > 0 && step.is_multiple_of(recipe.evaluate_every) && step < total {
                self.evaluate()?;
            }
        }
        let dev = self.evaluate()?;
        let checkpoint = recipe.output.join("checkpoint");
        if self.processes.is_first() {
            // Of an adapter, the card would have to be that of what it is merged into.
            if recipe.lora_rank == 0 {
                card::describe(&recipe.output, &mut self.draft)?;
            }
            self.draft.save(&self.state.weights.to_host()?, &checkpoint)?;
            report(&recipe.output)?;
        }
        self.bar.finish_and_clear();
        Ok(Finished { steps: self.state.step, dev, checkpoint })
    }

    fn save(&self, states: &Path) -> Result<()> {
        if self.processes.count() > 1 {
            let weights = self.processes.agree(self.state.weights.to_host().map_err(Error::from))?;
            let digest = || digest(bytemuck::cast_slice(&weights));
            // Each takes the optimiser's step by itself; where a device rounds otherwise, they drift apart.
            self.processes.compare("weights", digest, "all have to run on the same kind of device")?;
        }
        if self.processes.is_first() { self.state.save(states) } else { Ok(()) }
    }

    fn step(&mut self, step: u64, total: u64, indices: &[usize], gradient: &mut Numbers) -> Result<()> {
        let (recipe, start) = (self.recipe, Instant::now());
        let examples = indices.iter().map(|i| self.train.get(*i)).collect::<Result<Vec<Example>>>()?;
        let batch: Vec<&Example> = examples.iter().collect();
        let weights = Weights::new(recipe, &batch);
        let trained = &mut self.draft.trained;
        let sums = self.shards.gradient(&batch, gradient, |shard, gradient| {
            let mut groups = Vec::new();
            trained.gradient(&self.state.weights, gradient, |gradient| {
                for part in micro_batches(&shard, recipe.micro_batch_tokens) {
                    let before = groups.len();
                    groups.extend(part.iter().map(|i| weights.group(shard[*i])));
                    self.model.gradient(&groups[before..], weights.pair, gradient)?;
                }
                Ok(())
            })?;
            // Of all parts at once: a GPU has not been waited for until now.
            let mut sums = Sums::default();
            sums.add(recipe.objective, &groups, &self.model.outcomes()?);
            Ok(sums)
        })?;
        let measures = sums.means(recipe);
        let norm = gradient.sum_of_squares()?.sqrt();
        for (what, value) in [("loss", measures.loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                let saved = self.save_batch(step, indices);
                let failed = saved.and_then(|saved| Err(Error::NonFinite { step, what, value, saved }));
                return self.processes.agree(failed);
            }
        }
        let clip = f64::from(recipe.clip);
        let lr = recipe.lr_at(step, total);
        let how = |parameter: &Parameter| AdamW {
            lr,
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            eps: recipe.eps,
            // Norms and biases are not drawn to zero.
            weight_decay: if parameter.shape.len() > 1 { recipe.weight_decay } else { 0.0 },
            step: step as u32,
            scale: if clip > 0.0 && norm > clip { (clip / norm) as f32 } else { 1.0 },
        };
        let State { weights, mean, square, .. } = &mut self.state;
        self.draft.trained.step(&mut self.model, weights, gradient, [mean, square], how)?;
        self.state.step = step;

        let (seconds, tokens) = (start.elapsed().as_secs_f64(), sums.tokens);
        let (lr, gradient_norm) = (Some(lr), Some(norm));
        if let Some(recorder) = &mut self.recorder {
            recorder.record(&Record { split: "train", step, measures, lr, gradient_norm, tokens, seconds })?;
        }
        let accuracy = measures.accuracy.map(|share| format!(", {:.0} % right", 100.0 * share)).unwrap_or_default();
        let rate = HumanCount((tokens as f64 / seconds) as u64);
        self.bar.set_message(format!("loss {:.4}{accuracy}, {rate} tok/s", measures.loss));
        self.bar.inc(1);
        Ok(())
    }

    /// Measures on the dev data.
    fn evaluate(&mut self) -> Result<Option<Measures>> {
        if self.dev.is_empty() {
            return Ok(None);
        }
        let (recipe, start) = (self.recipe, Instant::now());
        let mut sums = Sums::default();
        let mut pairs = Vec::new();
        for first in (0..self.dev.len()).step_by(DEV_PART) {
            let numbers = first..(first + DEV_PART).min(self.dev.len());
            let examples = numbers.map(|i| self.dev.get(i)).collect::<Result<Vec<Example>>>()?;
            let all: Vec<&Example> = examples.iter().collect();
            let weights = Weights::new(recipe, &all);
            let (found, own) = self.shards.measure(&all, |shard| {
                let mut sums = Sums::default();
                let mut pairs = vec![None; shard.len()];
                for part in micro_batches(&shard, recipe.micro_batch_tokens) {
                    let groups: Vec<Group<'_>> = part.iter().map(|i| weights.measured(shard[*i])).collect();
                    let outcomes = self.model.evaluate(&groups)?;
                    sums.add(recipe.objective, &groups, &outcomes);
                    let mut rest = &outcomes[..];
                    for (i, group) in part.iter().zip(&groups) {
                        let (own, others) = rest.split_at(group.sequences.len());
                        (pairs[*i], rest) = (scores(recipe.objective, own), others);
                    }
                }
                Ok((sums, pairs.into_iter().flatten().collect()))
            })?;
            sums.add_all(&[found.to_numbers()]);
            pairs.extend(own);
        }
        let (step, tokens, measures) = (self.state.step, sums.tokens, sums.means(recipe));
        let seconds = start.elapsed().as_secs_f64();
        let Some(recorder) = &mut self.recorder else { return Ok(Some(measures)) };
        recorder.pairs(step, recipe.objective, &pairs)?;
        recorder.record(&Record { split: "dev", step, measures, lr: None, gradient_norm: None, tokens, seconds })?;
        Ok(Some(measures))
    }

    /// Writes what a step was given, for whoever looks for the reason of a bad number.
    fn save_batch(&self, step: u64, indices: &[usize]) -> Result<PathBuf> {
        let path = self.recipe.output.join(format!("bad-batch-{step}.jsonl"));
        if !self.processes.is_first() {
            return Ok(path);
        }
        let mut text = String::new();
        for i in indices {
            let side = |side: &Side| {
                let decoded = self.draft.text.decode(&side.tokens).unwrap_or_default();
                json!({"tokens": side.tokens, "response": side.response, "text": decoded})
            };
            let sides: Vec<_> = self.train.get(*i)?.sides().map(side).collect();
            text += &format!("{}\n", json!({"example": i, "sides": sides}));
        }
        fs::write(&path, text).map_err(Error::io(&path))?;
        Ok(path)
    }
}

fn check_examples(recipe: &Recipe, train: &Counts) -> Result<()> {
    if train.examples == 0 {
        return Err(Error::Recipe("there is nothing to learn from: no line of the train files is an example".into()));
    }
    let needs_pairs = matches!(recipe.objective, Objective::Preference | Objective::Imitation);
    if needs_pairs && train.texts > 0 {
        let message = "the train files hold texts; this objective needs chosen and rejected sides";
        return Err(Error::Recipe(message.into()));
    }
    Ok(())
}

/// Writes the recipe and the counts of its data into the folder, or compares the recipe with the one that is there.
fn keep_recipe(recipe: &Recipe, counts: &[(&str, &Counts)]) -> Result<()> {
    let path = recipe.output.join("recipe.toml");
    let text = toml::to_string(recipe).map_err(|error| Error::Recipe(error.to_string()))?;
    // What may change from one part of a run to the next without a change of what is learned.
    let free = |line: &&str| {
        !["output", "threads", "device", "save-every", "evaluate-every"].iter().any(|key| line.starts_with(key))
    };
    if path.exists() {
        let before = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let differs = before.lines().filter(free).find(|line| !text.lines().any(|other| other == *line));
        let differs =
            differs.or_else(|| text.lines().filter(free).find(|line| !before.lines().any(|other| other == *line)));
        if let Some(line) = differs {
            let message = format!(
                "{} holds a run with another recipe (`{line}` in one of them): name another output folder",
                recipe.output.display()
            );
            return Err(Error::Recipe(message));
        }
    }
    fs::write(&path, text).map_err(Error::io(&path))?;
    let path = recipe.output.join("data.json");
    let counts: serde_json::Map<_, _> =
        counts.iter().map(|(split, counts)| ((*split).to_owned(), json!(counts))).collect();
    fs::write(&path, format!("{:#}\n", serde_json::Value::Object(counts))).map_err(Error::io(&path))
}

fn style() -> ProgressStyle {
    const BAR: &str = "{elapsed_precise} {wide_bar} step {human_pos}/{human_len}, {msg}, {eta} left";
    ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar())
}
