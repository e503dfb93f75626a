//! What of a decoder is trained: all of its weights, or low-rank changes of its matrices (Hu et al. 2021, LoRA).
//!
//! A change is a product `B A` of two thin matrices. The decoder always computes with the sum `W + s B A`, which is what
//! a server makes of the adapter when it loads it; so the gradients of `A` and `B` follow from that of the sum, and
//! nothing else has to know of adapters.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use plumb_kernels::gradient::{AdamW, Outer};
use plumb_kernels::linear::{Linear, Matrix, Rows, Store};
use plumb_model::decoder::Device;
use plumb_model::decoder::gradient::{Numbers, Parameter, Parameters, Trainable};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::recipe::Recipe;
use crate::{Error, Result};

/// Stream of the random numbers that `A` begins with; a new head has another.
const STREAM: u64 = 1 << 32;

/// The numbers that an optimiser changes.
pub(crate) struct Trained {
    list: Vec<Parameter>,
    lora: Option<Lora>,
}

/// Changes of a decoder's matrices.
struct Lora {
    rank: usize,
    alpha: f32,
    /// The decoder's weights without and with the changes.
    base: Vec<f32>,
    merged: Numbers,
    /// How the loss changes with those, where the decoder computes.
    gradient: Numbers,
    factors: Vec<Factor>,
    /// Trained as they are: in the trained numbers, and in the decoder's.
    whole: Vec<(Range<usize>, Range<usize>)>,
    modules: Vec<String>,
    scratch: Scratch,
}

/// One matrix `[outputs, inputs]` of the decoder and its change.
struct Factor {
    weight: Range<usize>,
    inputs: usize,
    /// `[rank, inputs]`.
    a: Range<usize>,
    /// `[outputs, rank]`.
    b: Range<usize>,
}

#[derive(Default)]
struct Scratch {
    outer: Outer<f32>,
    /// `B`, scaled, as `[rank, outputs]`.
    transposed: Vec<f32>,
    product: Vec<f32>,
}

impl Trained {
    /// What the recipe wants to be trained of a decoder with these weights, and its first values.
    ///
    /// # Errors
    /// If the recipe names matrices that the decoder does not have.
    pub(crate) fn new(recipe: &Recipe, parameters: &Parameters, values: Vec<f32>) -> Result<(Self, Vec<f32>)> {
        if recipe.lora_rank == 0 {
            return Ok((Self { list: parameters.list().to_vec(), lora: None }, values));
        }
        let rank = recipe.lora_rank;
        let module = |parameter: &Parameter| {
            let path = parameter.name.strip_suffix(".weight").filter(|path| path.contains(".layers."))?;
            let module = path.rsplit('.').next()?.to_owned();
            let wanted = recipe.lora_targets.is_empty() || recipe.lora_targets.contains(&module);
            (parameter.shape.len() == 2 && wanted).then_some(module)
        };
        let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
        rng.set_stream(STREAM);
        let (mut list, mut first, mut factors, mut whole) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut modules: Vec<String> = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, values: &mut Vec<f32>, new: &mut dyn Iterator<Item = f32>| {
            let start = values.len();
            values.extend(new.take(shape.iter().product()));
            let range = start..values.len();
            list.push(Parameter { name: format!("base_model.model.{name}"), shape, range: range.clone() });
            range
        };
        for parameter in parameters.list() {
            if let Some(module) = module(parameter) {
                let path = parameter.name.trim_end_matches(".weight");
                let [outputs, inputs] = [parameter.shape[0], parameter.shape[1]];
                // As PEFT: uniform, and a change that is zero at first.
                let bound = 1.0 / (inputs as f32).sqrt();
                let mut draws = std::iter::repeat_with(|| rng.random_range(-bound..=bound));
                let a = add(format!("{path}.lora_A.weight"), vec![rank, inputs], &mut first, &mut draws);
                let mut zeros = std::iter::repeat(0.0);
                let b = add(format!("{path}.lora_B.weight"), vec![outputs, rank], &mut first, &mut zeros);
                factors.push(Factor { weight: parameter.range.clone(), inputs, a, b });
                if !modules.contains(&module) {
                    modules.push(module);
                }
            } else if parameters.is_reward_head(parameter) {
                let mut now = values[parameter.range.clone()].iter().copied();
                let trained = add(parameter.name.clone(), parameter.shape.clone(), &mut first, &mut now);
                whole.push((trained, parameter.range.clone()));
            }
        }
        if let Some(unknown) = recipe.lora_targets.iter().find(|target| !modules.contains(target)) {
            let message = format!("lora-targets: no layer of {} has a matrix `{unknown}`", recipe.init);
            return Err(Error::Recipe(message));
        }
        let lora = Lora {
            rank,
            alpha: recipe.lora_alpha,
            gradient: Numbers::new(Vec::new(), &Device::Cpu)?,
            merged: Numbers::new(values.clone(), &Device::Cpu)?,
            base: values,
            factors,
            whole,
            modules,
            scratch: Scratch::default(),
        };
        Ok((Self { list, lora: Some(lora) }, first))
    }

    /// Every tensor that is trained, by the name that it is saved under.
    pub(crate) fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// Takes the values of an adapter that was saved.
    ///
    /// # Errors
    /// If it has other tensors than are trained.
    pub(crate) fn take(&self, values: &mut [f32], tensors: &BTreeMap<String, Vec<f32>>, folder: &Path) -> Result<()> {
        let wrong = |name: &str| Error::Malformed {
            path: folder.to_owned(),
            reason: format!(
                "`{name}` is not what the recipe trains: lora-rank and lora-targets have to be the adapter's"
            ),
        };
        for parameter in &self.list {
            let tensor = tensors.get(&parameter.name).filter(|tensor| tensor.len() == parameter.range.len());
            values[parameter.range.clone()].copy_from_slice(tensor.ok_or_else(|| wrong(&parameter.name))?);
        }
        match tensors.keys().find(|name| self.list.iter().all(|parameter| parameter.name != **name)) {
            Some(extra) => Err(wrong(extra)),
            None => Ok(()),
        }
    }

    /// Whether low-rank changes are trained: their numbers are in the memory of the process.
    pub(crate) fn is_adapter(&self) -> bool {
        self.lora.is_some()
    }

    /// Says where the decoder computes.
    pub(crate) fn compute_on(&mut self, device: &Device) -> Result<()> {
        if let Some(lora) = &mut self.lora {
            lora.gradient = Numbers::new(vec![0.0; lora.base.len()], device)?;
        }
        Ok(())
    }

    /// The decoder's weights for trained numbers.
    pub(crate) fn weights<'a>(&'a mut self, trained: &'a Numbers) -> Result<&'a Numbers> {
        match &mut self.lora {
            None => Ok(trained),
            Some(lora) => {
                lora.merge(&trained.to_host()?)?;
                Ok(&lora.merged)
            }
        }
    }

    /// Adds to `gradient` that of the trained numbers, with what `fill` adds to the decoder's gradient.
    pub(crate) fn gradient<T>(
        &mut self,
        trained: &Numbers,
        gradient: &mut Numbers,
        fill: impl FnOnce(&mut Numbers) -> Result<T>,
    ) -> Result<T> {
        let Some(lora) = &mut self.lora else { return fill(gradient) };
        lora.gradient.clear()?;
        let answer = fill(&mut lora.gradient)?;
        lora.contract(&trained.to_host()?, gradient)?;
        Ok(answer)
    }

    /// Takes an optimiser's step with the trained numbers, by their gradient and its running means, as `how` says for each
    /// tensor; then the decoder has the new ones.
    pub(crate) fn step(
        &mut self,
        model: &mut Trainable,
        weights: &mut Numbers,
        gradient: &Numbers,
        [mean, square]: [&mut Numbers; 2],
        how: impl Fn(&Parameter) -> AdamW,
    ) -> Result<()> {
        let Some(lora) = &mut self.lora else { return Ok(model.step(weights, gradient, [mean, square], &how)?) };
        let (values, mean, square) = (in_process(weights)?, in_process(mean)?, in_process(square)?);
        let gradient = gradient.to_host()?;
        for parameter in &self.list {
            let at = || parameter.range.clone();
            how(parameter).update(&mut values[at()], &gradient[at()], &mut mean[at()], &mut square[at()]);
        }
        lora.merge(values)?;
        Ok(model.set(&lora.merged)?)
    }

    /// `adapter_config.json` as PEFT reads it, for an adapter.
    pub(crate) fn adapter_config(&self, base: &str) -> Option<Value> {
        let Lora { rank, alpha, modules, whole, .. } = self.lora.as_ref()?;
        let reward = !whole.is_empty();
        Some(json!({
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "modules_to_save": if reward { json!(["score"]) } else { Value::Null },
            "peft_type": "LORA",
            "r": rank,
            "target_modules": modules,
            "task_type": if reward { "SEQ_CLS" } else { "CAUSAL_LM" },
            "use_rslora": false,
        }))
    }
}

impl Lora {
    fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    fn merge(&mut self, trained: &[f32]) -> Result<()> {
        let scale = self.scale();
        let Self { rank, base, merged, factors, whole, scratch, .. } = self;
        let merged = in_process(merged)?;
        for Factor { weight, inputs, a, b } in factors {
            let merged = &mut merged[weight.clone()];
            merged.copy_from_slice(&base[weight.clone()]);
            scratch.transposed.clear();
            let b = &trained[b.clone()];
            scratch.transposed.extend((0..*rank).flat_map(|r| b[r..].iter().step_by(*rank)).map(|x| scale * x));
            scratch.outer.take(&trained[a.clone()], *inputs);
            scratch.outer.add(&scratch.transposed, merged);
        }
        for (from, to) in whole {
            merged[to.clone()].copy_from_slice(&trained[from.clone()]);
        }
        Ok(())
    }

    /// From the gradient `G` of `W + s B A`: `s B^T G` for `A` and `s G A^T` for `B`.
    fn contract(&mut self, trained: &[f32], sums: &mut Numbers) -> Result<()> {
        let (scale, sums) = (self.scale(), in_process(sums)?);
        let Self { rank, gradient, factors, whole, scratch, .. } = self;
        let gradient = gradient.to_host()?;
        let Scratch { outer, product, .. } = scratch;
        let mut add = |product: &[f32], to: &Range<usize>| {
            sums[to.clone()].iter_mut().zip(product).for_each(|(sum, x)| *sum += scale * x);
        };
        for Factor { weight, inputs, a, b } in factors {
            let full = &gradient[weight.clone()];
            product.clear();
            product.resize(a.len(), 0.0);
            outer.take(full, *inputs);
            outer.add(&trained[b.clone()], product);
            add(product, a);
            let weights = Rows::Plain(&trained[a.clone()]);
            // Ends the run as the vectors around it would.
            let linear = Linear::<f32>::new(&[Matrix { weights, bias: None }], *inputs);
            let linear = linear.unwrap_or_else(|error| error.abort());
            product.clear();
            product.resize(full.len() / *inputs * *rank, 0.0);
            linear.forward(full, product, Store::Set);
            add(product, b);
        }
        for (to, from) in whole {
            sums[to.clone()].iter_mut().zip(&gradient[from.clone()]).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }
}

/// Numbers of an adapter, which are there.
fn in_process(numbers: &mut Numbers) -> Result<&mut [f32]> {
    numbers.host_mut().ok_or_else(|| Error::Recipe("an adapter's numbers are in the memory of the process".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1013) as f32 / 506.0 - 1.0).collect()
    }

    #[test]
    fn changes_and_their_gradients_are_those_of_the_product() {
        // A matrix [5, 6], then one [4, 10] and a head of 3; ranks 2.
        let (rank, alpha) = (2, 3.0);
        let base = numbers(30 + 40 + 3, 1);
        let factor = |start: usize, outputs: usize, inputs: usize, first: usize| Factor {
            weight: start..start + outputs * inputs,
            inputs,
            a: first..first + rank * inputs,
            b: first + rank * inputs..first + rank * (inputs + outputs),
        };
        let shapes = [(0, 5, 6, 0), (30, 4, 10, 22)];
        let trained = numbers(22 + 28 + 3, 2);
        let full = numbers(base.len(), 3);
        let mut lora = Lora {
            rank,
            alpha,
            merged: Numbers::new(base.clone(), &Device::Cpu).unwrap(),
            gradient: Numbers::new(full.clone(), &Device::Cpu).unwrap(),
            base,
            factors: shapes
                .iter()
                .map(|(start, outputs, inputs, first)| factor(*start, *outputs, *inputs, *first))
                .collect(),
            whole: vec![(50..53, 70..73)],
            modules: Vec::new(),
            scratch: Scratch::default(),
        };
        let before = lora.base.clone();
        lora.merge(&trained).unwrap();
        let merged = lora.merged.to_host().unwrap().to_vec();
        let mut gradient = Numbers::new(vec![1.0; trained.len()], &Device::Cpu).unwrap();
        lora.contract(&trained, &mut gradient).unwrap();
        let gradient = gradient.to_host().unwrap();
        let close = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        for (start, outputs, inputs, first) in shapes {
            let a = |r: usize, i: usize| first + r * inputs + i;
            let b = |o: usize, r: usize| first + rank * inputs + o * rank + r;
            let w = |o: usize, i: usize| start + o * inputs + i;
            for (o, i) in (0..outputs).flat_map(|o| (0..inputs).map(move |i| (o, i))) {
                let product: f32 = (0..rank).map(|r| trained[b(o, r)] * trained[a(r, i)]).sum();
                close(merged[w(o, i)], before[w(o, i)] + 1.5 * product);
            }
            for r in 0..rank {
                for i in 0..inputs {
                    close(
                        gradient[a(r, i)],
                        1.0 + 1.5 * (0..outputs).map(|o| trained[b(o, r)] * full[w(o, i)]).sum::<f32>(),
                    );
                }
                for o in 0..outputs {
                    close(
                        gradient[b(o, r)],
                        1.0 + 1.5 * (0..inputs).map(|i| trained[a(r, i)] * full[w(o, i)]).sum::<f32>(),
                    );
                }
            }
        }
        assert_eq!(merged[70..], trained[50..]);
        (0..3).for_each(|i| close(gradient[50 + i], 1.0 + full[70 + i]));
    }
}
