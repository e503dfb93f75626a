//! What gives sequences their scores: a checkpoint or a server.

use plumb_model::loaded::ModelKind;
use plumb_model::text::{self, RenderOptions, TextInput, Truncation};
use serde::Serialize;

use super::options::{ChatFormat, HhhPrompt, Objective, Options};
use crate::Result;

/// Which model was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// Checkpoint or server, as given.
    pub source: String,
    /// Name under which a server has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The server's version of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// Adapter that was merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// `preference` or `language`.
    pub kind: &'static str,
    /// As the checkpoint calls itself.
    pub architecture: String,
    /// Type of the weights.
    pub dtype: String,
    /// Weights.
    pub parameters: u64,
    /// Most tokens in a sequence.
    pub max_input_tokens: usize,
    /// sha256 over files and type: equal digests give equal scores.
    pub weights_digest: String,
    /// Of the checkpoint's chat template, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template_sha256: Option<String>,
    /// Which HHH prompt stands before texts where one does.
    pub hhh_prompt: String,
}

/// How texts become sequences.
#[derive(Clone, Debug)]
pub(super) struct How {
    pub(super) text: RenderOptions,
    /// Whether a language model also scores each response without its query.
    pub(super) mutual_information: bool,
}

/// A sequence's score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Score {
    /// A preference model's.
    Reward(f32),
    /// A language model's, of the response's tokens, in nats.
    LogProb {
        mean: f32,
        sum: f32,
        #[serde(skip_serializing_if = "Option::is_none")]
        mutual_information: Option<f32>,
        tokens: u64,
    },
}

/// A sequence's score, or why it has none.
pub(super) type Outcome = std::result::Result<Score, String>;

/// Told how many sequences are done, again and again.
pub(super) type Advance<'a> = &'a mut dyn FnMut(u64);

/// Scores sequences.
pub(super) trait Scorer {
    /// The model.
    fn model(&self) -> &Model;

    /// An outcome for each text, in their order, the same whatever else is scored with it.
    fn score(&mut self, texts: &[&TextInput], how: &How, advance: Advance<'_>) -> Result<Vec<Outcome>>;

    /// Whether a language model that takes the likeliest token each time goes on from a text with a continuation.
    fn continues(
        &mut self,
        texts: &[(String, String)],
        how: &How,
        advance: Advance<'_>,
    ) -> Result<Vec<std::result::Result<bool, String>>>;

    /// The text of a dialogue in Human:/Assistant: form up to where the assistant answers what the user said.
    fn opening(&mut self, said: &str, hhh_prompt: HhhPrompt) -> Result<String>;
}

impl Score {
    /// What it is compared by.
    pub(super) fn by(&self, objective: Objective) -> Option<f64> {
        match (*self, objective) {
            (Self::Reward(reward), _) => Some(f64::from(reward)),
            (Self::LogProb { mean, .. }, Objective::Mean) => Some(f64::from(mean)),
            (Self::LogProb { sum, .. }, Objective::Sum) => Some(f64::from(sum)),
            (Self::LogProb { mutual_information, .. }, Objective::MutualInformation) => {
                mutual_information.map(f64::from)
            }
        }
    }
}

impl Model {
    /// Whether it is a preference model.
    pub(super) fn is_preference(&self) -> bool {
        self.kind == kind_name(ModelKind::Preference)
    }
}

impl How {
    /// As the options say.
    pub(super) fn new(options: &Options, hhh_prompt: HhhPrompt, objectives: &[Objective]) -> Self {
        let text = RenderOptions {
            chat_format: match options.chat_format {
                None => text::ChatFormat::Auto,
                Some(ChatFormat::Template) => text::ChatFormat::Template,
                Some(ChatFormat::HumanAssistant) => text::ChatFormat::HumanAssistant,
            },
            hhh_prompt: hhh_prompt.of_text(),
            truncation: if options.auto_truncate { Truncation::Left } else { Truncation::Refuse },
            max_tokens: None,
        };
        Self { text, mutual_information: objectives.contains(&Objective::MutualInformation) }
    }
}

impl HhhPrompt {
    pub(super) fn of_text(self) -> text::HhhPrompt {
        match self {
            Self::None => text::HhhPrompt::None,
            Self::Short => text::HhhPrompt::Short,
            Self::Full => text::HhhPrompt::Full,
        }
    }
}

/// A kind as [`Model`] writes it.
pub(super) fn kind_name(kind: ModelKind) -> &'static str {
    match kind {
        ModelKind::Language => "language",
        ModelKind::Preference => "preference",
    }
}

/// A dialogue's text up to the assistant's label, followed by what stands between a label and what is said.
pub(super) fn with_separator(text: String, said: &str) -> String {
    let before = text.rfind(said).map_or("", |at| &text[..at]);
    let blanks = before.len() - before.trim_end_matches(' ').len();
    text + &" ".repeat(blanks)
}
