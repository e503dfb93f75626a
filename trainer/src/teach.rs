//! Context distillation (Askell et al. 2021, section 2.1 and appendix B.5): what a language model expects behind a prompt,
//! written down for a student that reads the same texts without it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget};
use plumb_model::cache::PAGE;
use plumb_model::checkpoint::Source;
use plumb_model::decoder::{KvStore, Read, Step, StepSequence, Workspace};
use plumb_model::loaded::{DTypeChoice, LoadOptions, LoadedModel, ModelKind};
use plumb_model::text::{
    ChatFormat, HhhPrompt, HhhPrompts, Message, RenderMode, RenderOptions, TextInput, TextPipeline,
};

use crate::data::{Counts, dialogue};
use crate::examples::{Example, Examples, Side, Teacher};
use crate::input::{BadLines, Lines};
use crate::output::unfinished;
use crate::store::{Store, Writer};
use crate::{Error, Result};

/// The first record of a file: this, the format's number, and the digest of the vocabulary.
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"plum"), u32::from_le_bytes(*b"teac")];
const FORMAT: u32 = 1;
/// Tokens that go through the teacher at once, in whole pages.
const STEP: usize = 4096;

/// Which HHH prompt stands before the teacher's texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prompt {
    /// All its conversations
    Full,
    /// Its first conversation
    Short,
}

/// How a teacher is asked.
#[derive(Clone, Debug, clap::Args)]
pub struct TeachOptions {
    /// Prompt that the student is to do without
    #[arg(long, value_enum, default_value_t = Prompt::Full)]
    pub hhh_prompt: Prompt,
    /// Another HHH prompt than the built-in one
    #[arg(long, value_name = "FILE")]
    pub hhh_prompt_file: Option<PathBuf>,
    /// Likeliest tokens that are written down at each position
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub top: usize,
    /// Tokens of a text, behind the prompt; longer ones lose their end
    #[arg(long, value_name = "N", default_value_t = 1500)]
    pub max_tokens: usize,
    /// Bad lines after which to stop
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_bad_lines: u64,
}

/// Asks the teacher about all texts of JSONL files, and writes what it expects into a file, whole or not at all. The lines
/// are those that a run takes: a text becomes what a person says, a prompt and its chosen answer a dialogue.
///
/// # Errors
/// If the teacher does not load or is no language model, the prompt leaves no room in its context, a file cannot be read or
/// written, or more lines are bad than allowed.
pub fn teach(source: &Source, files: &[PathBuf], output: &Path, options: &TeachOptions) -> Result<Counts> {
    let hhh = match &options.hhh_prompt_file {
        Some(path) => HhhPrompts::from_file(path)?,
        None => HhhPrompts::default(),
    };
    let load = LoadOptions {
        dtype: DTypeChoice::Auto,
        hhh: Arc::new(hhh),
        max_input_tokens: None,
        // Only counted here: the pages that are needed are taken below.
        kv_cache_bytes: usize::MAX,
        device: Default::default(),
        background: Default::default(),
    };
    let model = LoadedModel::load(source, &load)?;
    if model.info.kind != ModelKind::Language {
        return Err(Error::Recipe(format!("{} is no language model: it expects no tokens", source.model)));
    }
    if !(1..=model.info.vocab_size).contains(&options.top) || options.max_tokens < 2 {
        let message = format!("top has to be from 1 to {}, max-tokens at least 2", model.info.vocab_size);
        return Err(Error::Recipe(message));
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.enable_steady_tick(Duration::from_millis(200));
    let (mut class, mut counts) = (Class::new(&model, options)?, Counts::default());
    let unfinished = unfinished(output);
    let mut writer = Writer::create(&unfinished)?;
    writer.push(&header(&model.text))?;
    let (mut bad, mut waiting, start) = (BadLines::at_most(options.max_bad_lines), Vec::new(), Instant::now());
    for path in files {
        let mut lines = Lines::open(path)?;
        while let Some((number, line)) = lines.next()? {
            counts.lines += 1;
            match dialogue(&line).and_then(|dialogue| class.lesson(dialogue).map_err(|error| error.to_string())) {
                Ok(Some(lesson)) => {
                    counts.cut += u64::from(lesson.cut);
                    waiting.push(lesson);
                }
                Ok(None) => *counts.dropped.entry("too short to learn from").or_default() += 1,
                Err(reason) => {
                    *counts.dropped.entry("bad line").or_default() += 1;
                    bad.skip(path, number, &reason, &mut |line| bar.suspend(|| eprintln!("{line}")))?;
                }
            }
            if waiting.iter().map(|lesson| lesson.tokens.len().next_multiple_of(PAGE)).sum::<usize>() >= STEP {
                class.ask(std::mem::take(&mut waiting), &mut writer, &mut counts)?;
                let rate = HumanCount((counts.tokens as f64 / start.elapsed().as_secs_f64()) as u64);
                bar.set_message(format!("{} tokens, {rate} tok/s", HumanCount(counts.tokens)));
            }
        }
    }
    class.ask(waiting, &mut writer, &mut counts)?;
    writer.finish()?;
    fs::rename(&unfinished, output).map_err(Error::io(output))?;
    bar.finish_and_clear();
    Ok(counts)
}

/// What was written, for a student with this vocabulary and of so many tokens at most.
///
/// # Errors
/// If a file is none of [`teach`]'s or its teacher has another vocabulary.
pub(crate) fn examples(files: &[PathBuf], student: &TextPipeline, max_tokens: usize) -> Result<(Examples, Counts)> {
    let expected = header(student);
    let open = |path: &PathBuf| {
        let store = Store::open(path)?;
        let found = store.get(0)?;
        let reason = match found {
            found if found == expected => return Ok((1, store)),
            found if found.starts_with(&MAGIC) => "its teacher has another vocabulary than the student",
            _ => "not a file of `plumb-train teach`",
        };
        Err(Error::Malformed { path: path.clone(), reason: reason.into() })
    };
    let examples = Examples::behind(files.iter().map(open).collect::<Result<_>>()?);
    let mut counts = Counts::default();
    for i in 0..examples.len() {
        let example = examples.get(i)?;
        counts.lines += 1;
        counts.add(&example);
        if let Some(side) = example.sides().find(|side| side.tokens.len() > max_tokens) {
            let message = format!("a taught text has {} tokens: raise max-tokens from {max_tokens}", side.tokens.len());
            return Err(Error::Recipe(message));
        }
    }
    Ok((examples, counts))
}

fn header(text: &TextPipeline) -> Vec<u32> {
    let digest = text.vocabulary_sha256();
    let digest = digest.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    MAGIC.into_iter().chain([FORMAT]).chain(digest).collect()
}

/// A text for both.
struct Lesson {
    /// What the teacher reads behind the shared part of its prompt.
    tokens: Vec<u32>,
    /// What the student reads; but for its beginning, the teacher's tokens end in it.
    student: Vec<u32>,
    cut: bool,
}

/// A teacher that has read its prompt.
struct Class<'a> {
    model: &'a LoadedModel,
    options: &'a TeachOptions,
    prompt: HhhPrompt,
    /// Special tokens that begin the student's texts.
    beginning: usize,
    /// Tokens of the prompt's whole pages.
    shared: usize,
    kv: KvStore,
    workspace: Workspace,
    /// Pages that texts may take.
    free: usize,
}

impl<'a> Class<'a> {
    fn new(model: &'a LoadedModel, options: &'a TeachOptions) -> Result<Self> {
        let prompt = match options.hhh_prompt {
            Prompt::Full => HhhPrompt::Full,
            Prompt::Short => HhhPrompt::Short,
        };
        let Some(ids) = model.text.hhh_prefix_ids(prompt) else {
            let message = format!(
                "the HHH prompt does not fit into the teacher's context of {} tokens: take the short one, or another",
                model.info.max_input_tokens
            );
            return Err(Error::Recipe(message));
        };
        let shared = ids.len() / PAGE * PAGE;
        // A step's last text may be as long as one can be.
        let free = STEP / PAGE + model.info.max_input_tokens.div_ceil(PAGE);
        let mut kv = model.decoder.kv_store(shared / PAGE + free)?;
        let mut workspace = model.decoder.workspace();
        let pages: Vec<u32> = (0..(shared / PAGE) as u32).collect();
        for (i, tokens) in ids[..shared].chunks(STEP).enumerate() {
            let sequence = StepSequence { tokens, position: i * STEP, pages: &pages, read: Read::Nothing };
            model.decoder.step(&Step { sequences: vec![sequence] }, &mut kv, &mut workspace)?;
        }
        let first = model.text.tokenize("Human:", true)?;
        let beginning = first.iter().take_while(|token| token.special).count();
        Ok(Self { model, options, prompt, beginning, shared, kv, workspace, free })
    }

    /// A dialogue as teacher and student read it; nothing if that is not more than a token.
    fn lesson(&self, dialogue: Vec<Message>) -> Result<Option<Lesson>> {
        let input = TextInput::Conversation(dialogue);
        let render = |hhh_prompt| {
            let options = RenderOptions { chat_format: ChatFormat::HumanAssistant, hhh_prompt, ..Default::default() };
            self.model.text.render(&input, &options, RenderMode::Score)
        };
        let (behind, mut student) = (render(self.prompt)?, render(HhhPrompt::None)?.ids);
        let cut = student.len() > self.options.max_tokens;
        student.truncate(self.options.max_tokens);
        if student.len() < self.beginning + 2 {
            return Ok(None);
        }
        // The prompt has separators of its own. Behind it, the teacher reads the very tokens that the student will read.
        let own = &student[self.beginning..];
        let prompt = &behind.ids[self.shared..];
        let first = (behind.prefix_len - self.shared..prompt.len() - 1).find(|i| prompt[*i..*i + 2] == own[..2]);
        let tokens = [&prompt[..first.unwrap_or(behind.prefix_len - self.shared)], own].concat();
        Ok(Some(Lesson { tokens, student, cut }))
    }

    /// Asks about texts, and writes them down with the answers.
    fn ask(&mut self, lessons: Vec<Lesson>, writer: &mut Writer, counts: &mut Counts) -> Result<()> {
        let before = (self.shared / PAGE) as u32;
        let mut next = before;
        let tables: Vec<Vec<u32>> = lessons
            .iter()
            .map(|lesson| {
                let own = lesson.tokens.len().div_ceil(PAGE) as u32;
                next += own;
                (0..before).chain(next - own..next).collect()
            })
            .collect();
        debug_assert!((next - before) as usize <= self.free, "pages for a step");
        let sequences = lessons.iter().zip(&tables).map(|(lesson, pages)| {
            let (len, common) = (lesson.tokens.len(), lesson.student.len() - self.beginning);
            // What comes after its last token counts for neither.
            let read = Read::TopLogProbs { rows: len - common..len - 1, count: self.options.top };
            StepSequence { tokens: &lesson.tokens, position: self.shared, pages, read }
        });
        let step = Step { sequences: sequences.collect() };
        let answers = self.model.decoder.step(&step, &mut self.kv, &mut self.workspace)?;
        drop(step);
        for (lesson, answer) in lessons.into_iter().zip(answers) {
            let (tokens, top) = (lesson.student, self.options.top);
            let rows = || answer.chunks_exact(2 * top);
            let teacher = Teacher {
                first: self.beginning,
                top,
                ids: rows().flat_map(|row| &row[..top]).map(|id| *id as u32).collect(),
                log_probs: rows().flat_map(|row| &row[top..]).copied().collect(),
            };
            let example = Example::Taught { side: Side { tokens, response: 1 }, teacher };
            counts.add(&example);
            writer.push(&example.encode())?;
        }
        Ok(())
    }
}
