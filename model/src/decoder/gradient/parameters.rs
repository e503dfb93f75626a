//! A decoder's weights as one list of numbers, which an optimiser can go over.

use std::ops::Range;

use candle_core::DType;

use super::super::names::{LayerNames, Names, Qkv};
use crate::Result;
use crate::checkpoint::Weights;
use crate::config::{Config, Head, Norm};

/// A tensor of a checkpoint in the list.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its numbers are, in row order.
    pub range: Range<usize>,
}

/// Where every tensor is in the list. Matrices that the decoder holds on top of one another are neighbours.
#[derive(Clone, Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    pub(super) embedding: Range<usize>,
    pub(super) layers: Vec<LayerRanges>,
    pub(super) final_norm: Range<usize>,
    /// The embedding, where the two are tied; empty without a language head.
    pub(super) language_head: Range<usize>,
    /// Empty without a reward head, or without its bias.
    pub(super) score: Range<usize>,
    pub(super) score_bias: Range<usize>,
}

/// Where a layer's tensors are; empty for one that it does not have. A norm's weight is followed by its bias.
#[derive(Clone, Debug)]
pub(super) struct LayerRanges {
    pub(super) attention_norm: Range<usize>,
    pub(super) qkv: Range<usize>,
    pub(super) qkv_bias: Range<usize>,
    /// Whether q, k and v lie among one another as GPT-NeoX stores them.
    pub(super) interleaved: bool,
    pub(super) q_norm: Range<usize>,
    pub(super) k_norm: Range<usize>,
    pub(super) output: Range<usize>,
    pub(super) output_bias: Range<usize>,
    pub(super) attention_post_norm: Range<usize>,
    pub(super) mlp_norm: Range<usize>,
    pub(super) gate: Range<usize>,
    pub(super) gate_bias: Range<usize>,
    pub(super) up: Range<usize>,
    pub(super) up_bias: Range<usize>,
    pub(super) down: Range<usize>,
    pub(super) down_bias: Range<usize>,
    pub(super) mlp_post_norm: Range<usize>,
}

impl Parameters {
    /// The weights of a decoder; those of a vocabulary head too, where a reward model is to have one in training.
    pub fn new(config: &Config, language_head: bool) -> Self {
        let mut list = List(Vec::new());
        let names = Names::of(config.family);
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let embedding = list.tensor(names.embedding, "weight", &[vocabulary, hidden]);
        let layers = (0..config.num_layers).map(|i| list.layer(config, &LayerNames::of(config, i))).collect();
        let final_norm = list.norm(config, names.final_norm, hidden);
        let language_head = match (&config.head, config.tie_word_embeddings) {
            (Head::Reward(_), _) if !language_head => 0..0,
            (_, true) => embedding.clone(),
            (_, false) => list.tensor(names.language_head, "weight", &[vocabulary, hidden]),
        };
        let (mut score, mut score_bias) = (0..0, 0..0);
        if let Head::Reward(head) = &config.head {
            score = list.whole(&head.weight, &[1, hidden]);
            score_bias = head.bias.as_ref().map_or(0..0, |name| list.whole(name, &[1]));
        }
        Self { list: list.0, embedding, layers, final_norm, language_head, score, score_bias }
    }

    /// Every tensor, in the order of the list.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// Whether it is a vocabulary head with weights of its own.
    pub fn is_untied_language_head(&self, parameter: &Parameter) -> bool {
        parameter.range == self.language_head && self.language_head != self.embedding
    }

    /// Whether it belongs to a reward head.
    pub fn is_reward_head(&self, parameter: &Parameter) -> bool {
        [&self.score, &self.score_bias].contains(&&parameter.range)
    }

    /// Takes the tensors of a checkpoint, in f32.
    ///
    /// # Errors
    /// If one is missing or misshapen.
    pub fn read(&self, weights: &mut Weights) -> Result<Vec<f32>> {
        self.read_or(weights, |_| None)
    }

    /// As [`Parameters::read`], with what `missing` gives for a tensor that the checkpoint does not hold.
    ///
    /// # Errors
    /// If one is misshapen, or missing and not given.
    pub fn read_or(
        &self,
        weights: &mut Weights,
        mut missing: impl FnMut(&Parameter) -> Option<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(self.len());
        for parameter in &self.list {
            let given = if weights.contains(&parameter.name) { None } else { missing(parameter) };
            match given {
                Some(given) => values.extend(given),
                None => {
                    let tensor = weights.take(&parameter.name, &parameter.shape)?;
                    values.extend(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
                }
            }
        }
        Ok(values)
    }

    /// Numbers in the list.
    pub fn len(&self) -> usize {
        self.list.last().map_or(0, |last| last.range.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

struct List(Vec<Parameter>);

impl List {
    fn whole(&mut self, name: &str, shape: &[usize]) -> Range<usize> {
        let start = self.0.last().map_or(0, |last| last.range.end);
        let range = start..start + shape.iter().product::<usize>();
        self.0.push(Parameter { name: name.to_owned(), shape: shape.to_vec(), range: range.clone() });
        range
    }

    fn tensor(&mut self, name: &str, part: &str, shape: &[usize]) -> Range<usize> {
        self.whole(&format!("{name}.{part}"), shape)
    }

    fn norm(&mut self, config: &Config, name: &str, width: usize) -> Range<usize> {
        let weight = self.tensor(name, "weight", &[width]);
        match config.norm {
            Norm::Rms { .. } => weight,
            Norm::Layer { .. } => weight.start..self.tensor(name, "bias", &[width]).end,
        }
    }

    /// Weights, then biases, of matrices on top of one another.
    fn matrices(&mut self, parts: &[(&String, usize)], inputs: usize, bias: bool) -> [Range<usize>; 2] {
        let mut all = |part: &str, shape: &dyn Fn(usize) -> Vec<usize>| {
            let ranges: Vec<_> = parts.iter().map(|(name, rows)| self.tensor(name, part, &shape(*rows))).collect();
            ranges.first().map_or(0, |first| first.start)..ranges.last().map_or(0, |last| last.end)
        };
        let weights = all("weight", &|rows| vec![rows, inputs]);
        [weights, if bias { all("bias", &|rows| vec![rows]) } else { 0..0 }]
    }

    fn layer(&mut self, config: &Config, names: &LayerNames) -> LayerRanges {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let attention_norm = self.norm(config, &names.attention_norm, hidden);
        let [qkv, qkv_bias] = match &names.qkv {
            Qkv::Separate([q_name, k_name, v_name]) => {
                self.matrices(&[(q_name, q), (k_name, kv), (v_name, kv)], hidden, config.qkv_bias)
            }
            Qkv::Interleaved(name) => self.matrices(&[(name, q + 2 * kv)], hidden, config.qkv_bias),
        };
        let optional = |list: &mut Self, name: &Option<String>, width| {
            name.as_ref().map_or(0..0, |name| list.norm(config, name, width))
        };
        let q_norm = optional(self, &names.q_norm, config.head_dim);
        let k_norm = optional(self, &names.k_norm, config.head_dim);
        let [output, output_bias] = self.matrices(&[(&names.output, hidden)], q, config.attention_output_bias);
        let attention_post_norm = optional(self, &names.attention_post_norm, hidden);
        let mlp_norm = self.norm(config, &names.mlp_norm, hidden);
        let mut matrix = |name: &String, rows, inputs| self.matrices(&[(name, rows)], inputs, config.mlp_bias);
        let [gate, gate_bias] = names.gate.as_ref().map_or([0..0, 0..0], |name| matrix(name, inner, hidden));
        let [up, up_bias] = matrix(&names.up, inner, hidden);
        let [down, down_bias] = matrix(&names.down, hidden, inner);
        let mlp_post_norm = optional(self, &names.mlp_post_norm, hidden);
        LayerRanges {
            attention_norm,
            qkv,
            qkv_bias,
            interleaved: matches!(names.qkv, Qkv::Interleaved(_)),
            q_norm,
            k_norm,
            output,
            output_bias,
            attention_post_norm,
            mlp_norm,
            gate,
            gate_bias,
            up,
            up_bias,
            down,
            down_bias,
            mlp_post_norm,
        }
    }
}
