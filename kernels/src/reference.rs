//! Every operation again, slow and obviously right, in f64 where sums are long. Tests compare with these.

/// `y[rows, outputs] = x[rows, inputs] . w[outputs, inputs]^T + bias`.
pub fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, inputs: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks_exact(inputs) {
        for (o, w) in w.chunks_exact(inputs).enumerate() {
            let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            y.push((sum + bias.map_or(0.0, |b| f64::from(b[o]))) as f32);
        }
    }
    y
}

/// `x / rms(x) * weight` for every row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    rms_norm_f64(x, weight, eps).into_iter().map(|y| y as f32).collect()
}

/// [`rms_norm`] without the last rounding.
pub fn rms_norm_f64(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(weight.len()) {
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        y.extend(x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)));
    }
    y
}

/// `(x - mean(x)) / std(x) * weight + bias` for every row.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    layer_norm_f64(x, weight, bias, eps).into_iter().map(|y| y as f32).collect()
}

/// [`layer_norm`] without the last rounding.
pub fn layer_norm_f64(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f64> {
    let mut y = Vec::new();
    for x in x.chunks_exact(weight.len()) {
        let n = x.len() as f64;
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        let weights = weight.iter().zip(bias);
        y.extend(
            x.iter().zip(weights).map(|(x, (w, b))| (f64::from(*x) - mean) * scale * f64::from(*w) + f64::from(*b)),
        );
    }
    y
}

/// What a query of [`attention`] may see and how its scores are made.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRule {
    /// Multiplies the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Keys that a query sees, itself included.
    pub window: Option<usize>,
}

/// Causal attention of one head: `q[queries, dim]` stand at the end of `k`, `v` `[keys, dim]`.
pub fn attention(q: &[f32], k: &[f32], v: &[f32], dim: usize, rule: AttentionRule) -> Vec<f32> {
    let (queries, keys) = (q.len() / dim, k.len() / dim);
    let mut out = Vec::new();
    for (i, q) in q.chunks_exact(dim).enumerate() {
        let position = keys - queries + i;
        let first = rule.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let scores: Vec<f64> = (first..=position)
            .map(|j| {
                let dot: f64 = q.iter().zip(&k[j * dim..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                let score = dot * f64::from(rule.scale);
                rule.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..dim {
            let sum: f64 = weights.iter().zip(first..).map(|(w, j)| w * f64::from(v[j * dim + d])).sum();
            out.push((sum / total) as f32);
        }
    }
    out
}

/// `log softmax(logits)[target]`.
pub fn log_prob(logits: &[f32], target: usize) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    (f64::from(logits[target] - max) - sum.ln()) as f32
}

/// What [`draw`] goes by, as [`crate::sample::Draw`].
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 1 is off.
    pub penalty: f64,
    /// Tokens that it concerns.
    pub penalised: Vec<u32>,
    /// Tokens that are not drawn.
    pub excluded: Vec<u32>,
    /// 0 takes the likeliest.
    pub temperature: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f64,
    /// 0 keeps all.
    pub min_p: f64,
}

/// The token where the cumulative distribution exceeds `uniform`, from 0 to 1, in the order of ids; `None` if all are
/// excluded.
pub fn draw(logits: &[f32], how: &Sampling, uniform: f64) -> Option<u32> {
    let mut adjusted: Vec<f64> = logits.iter().copied().map(f64::from).collect();
    for (id, logit) in adjusted.iter_mut().enumerate() {
        if how.excluded.contains(&(id as u32)) {
            *logit = f64::NEG_INFINITY;
        } else if how.penalised.contains(&(id as u32)) && *logit != f64::NEG_INFINITY {
            let penalised = if *logit >= 0.0 { *logit / how.penalty } else { *logit * how.penalty };
            *logit = penalised.clamp(f64::from(f32::MIN), f64::from(f32::MAX));
        }
    }
    let max = adjusted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return None;
    }
    if how.temperature == 0.0 {
        return adjusted.iter().position(|logit| *logit == max).map(|id| id as u32);
    }
    let mut p: Vec<f64> = adjusted.iter().map(|logit| ((logit - max) / how.temperature).exp()).collect();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
    let mut keep = if how.top_k == 0 { p.len() } else { how.top_k.min(p.len()) };
    let total: f64 = order[..keep].iter().map(|id| p[*id]).sum();
    let mut sum = 0.0;
    for (i, id) in order[..keep].iter().enumerate() {
        sum += p[*id];
        if sum >= how.top_p * total {
            keep = i + 1;
            break;
        }
    }
    keep = keep.min(order.iter().filter(|id| p[**id] >= how.min_p).count()).max(1);
    order[keep..].iter().for_each(|id| p[*id] = 0.0);
    let total: f64 = p.iter().sum();
    let mut sum = 0.0;
    let exceeds = |p: &f64| {
        sum += p / total;
        sum > uniform
    };
    // Sums that are rounded may end below 1.
    p.iter().position(exceeds).or_else(|| p.iter().rposition(|p| *p > 0.0)).map(|id| id as u32)
}
