//! The rotary embedding of a `config.json`, in the spelling of Transformers 4 (`rope_theta`, `rope_scaling`, NeoX's
//! `rotary_emb_base` and `rotary_pct`) and of Transformers 5 (`rope_parameters`, possibly one for each layer type).

use super::fields::{Fields, excerpt};
use super::hf_config::{Kind, MOST_POSITIONS};
use crate::config::{Rope, RopeScaling};
use crate::{Error, Result};

const DEFAULT_THETA: f64 = 10_000.0;

/// Reads all of it; `head_dim` and `max_position_embeddings` are those of the model.
pub(super) fn rope(fields: &Fields<'_>, kind: Kind, head_dim: usize, max_position_embeddings: usize) -> Result<Rope> {
    let nested = match parameters(fields, "rope_scaling")? {
        None => parameters(fields, "rope_parameters")?,
        scaling => scaling,
    };
    let (theta_key, fraction_key, default_fraction) = match kind {
        Kind::GptNeoX => ("rotary_emb_base", "rotary_pct", 0.25),
        _ => ("rope_theta", "partial_rotary_factor", 1.0),
    };
    // What stands in the nested object wins over what stands beside it.
    let within = |key: &str| nested.map_or(Ok(None), |nested| nested.positive(key));
    let theta = within("rope_theta")?.or(fields.positive("rope_theta")?).or(fields.positive(theta_key)?);
    let fraction = within("partial_rotary_factor")?
        .or(fields.positive("partial_rotary_factor")?)
        .or(fields.positive(fraction_key)?)
        .unwrap_or(default_fraction);
    let scaling = match nested {
        None => RopeScaling::None,
        Some(nested) => scaling(fields, &nested, max_position_embeddings)?,
    };
    Ok(Rope { dim: rotated(kind, head_dim, fraction)?, theta: theta.unwrap_or(DEFAULT_THETA) as f32, scaling })
}

/// The object at `key`. One for each layer type is taken if all say the same, as the decoder has one table of angles.
fn parameters<'a>(fields: &Fields<'a>, key: &str) -> Result<Option<Fields<'a>>> {
    let Some(object) = fields.object(key)? else { return Ok(None) };
    if object.iter().next().is_none() {
        return Ok(None);
    }
    let types = ["full_attention", "sliding_attention"];
    let present: Vec<_> = types.into_iter().filter_map(|layer_type| object.get(layer_type)).collect();
    match present.as_slice() {
        [] => Ok(Some(object)),
        [one] | [one, _] if present.iter().all(|other| other == one) => {
            object.object(if object.get(types[0]).is_some() { types[0] } else { types[1] })
        }
        _ => Err(Error::Unsupported(format!("`{key}` with different rotary embeddings for different layers"))),
    }
}

/// How many elements of a head are rotated.
fn rotated(kind: Kind, head_dim: usize, fraction: f64) -> Result<usize> {
    if kind != Kind::GptNeoX && fraction != 1.0 {
        return Err(Error::Unsupported(format!(
            "`partial_rotary_factor` {fraction} in a {kind:?} model, which rotates whole heads"
        )));
    }
    let dim = (head_dim as f64 * fraction) as usize;
    if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
        return Err(Error::Unsupported(format!(
            "a rotary embedding over {dim} of a head's {head_dim} elements (`head_dim`, `rotary_pct`); an even number \
             up to all of them is served"
        )));
    }
    Ok(dim)
}

fn scaling(fields: &Fields<'_>, nested: &Fields<'_>, max_position_embeddings: usize) -> Result<RopeScaling> {
    let name = match nested.text("rope_type")? {
        None => nested.text("type")?.unwrap_or("default"),
        Some(name) => name,
    };
    match name {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: nested.required_positive("factor")? as f32 }),
        "llama3" => {
            const ORIGINAL: &str = "original_max_position_embeddings";
            let original = match fields.size(ORIGINAL, MOST_POSITIONS)? {
                None => nested.size(ORIGINAL, MOST_POSITIONS)?,
                beside => beside,
            };
            let low_freq_factor = nested.required_positive("low_freq_factor")?;
            let high_freq_factor = nested.required_positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("a number above `low_freq_factor`, {low_freq_factor}");
                return Err(nested.wrong("high_freq_factor", expected));
            }
            Ok(RopeScaling::Llama3 {
                factor: nested.required_positive("factor")? as f32,
                low_freq_factor: low_freq_factor as f32,
                high_freq_factor: high_freq_factor as f32,
                original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
            })
        }
        other => {
            Err(Error::Unsupported(format!("rope scaling `{}`; served are default, linear and llama3", excerpt(other))))
        }
    }
}
