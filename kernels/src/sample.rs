//! Drawing the next token from logits, on the CPU; on a GPU `gpu::Sampler` does the same to the bit.
//!
//! A token's weight is `e^((logit - largest) / temperature)` as a whole number of 2^-40, cut off. Sums of whole numbers
//! are the same in any order, so the same logits give the same token on every device, whatever is drawn beside it. What
//! is less than 2^-40 times as likely as the likeliest token is never drawn; together the cut is less than `vocabulary *
//! 2^-40` of that token's probability. Random numbers are Philox's, by seed and index: they do not depend on order either.
//!
//! The token is the one where the sum of the weights that are kept, in the order of ids, exceeds a random number below
//! their total (inverse transform). Two devices can disagree only where their logits do, since products before them add
//! up in other orders: then the borders between tokens lie elsewhere by the difference of the probabilities before them,
//! and a random number that falls in between gives a neighbour. In the order of ids, no border jumps because two tokens
//! that are about equally likely change places; and a token takes one random number, where the largest of logits with
//! Gumbel noise would take one for each of the vocabulary.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::math::exp;
use crate::parallel::{Shared, for_each_piece};
use crate::simd::vectorised;

/// Tokens of the largest vocabulary: so many weights are less than 2^62 together.
pub const MAX_VOCABULARY: usize = 1 << 22;

/// Weights are multiples of its inverse; 2^40.
const ONE: f32 = (1u64 << 40) as f32;
/// Of a token's place in the order, the likeliest first: what its weight lacks to 1 in units in the last place, and, in
/// as many bits, its id.
const ID_BITS: u32 = 24;
/// Bits of a place that are looked at together.
const DIGIT: u32 = 9;
const BUCKETS: usize = 1 << DIGIT;
/// How far the first digit of a place is from its end. A place has 53 bits.
const FIRST_SHIFT: u32 = 45;
/// [`Terms::top_p`] is in units of its inverse; 2^63.
const WHOLE: u64 = 1 << 63;

/// How a token is drawn from a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Which row.
    pub row: usize,
    /// What logits of the tokens that it concerns are divided by, or multiplied with where they are below 0 (after Keskar
    /// et al. 2019, CTRL, section 4.1); 1 is off.
    pub penalty: f32,
    /// Those tokens.
    pub penalised: Option<&'a TokenSet>,
    /// Tokens that are not drawn.
    pub excluded: Option<&'a TokenSet>,
    /// 0 takes the likeliest token, of equals the one with the lowest id.
    pub temperature: f32,
    /// Keeps so many of the likeliest tokens, of equals those with lower ids; 0 keeps all.
    pub top_k: usize,
    /// Of those, keeps the likeliest ones until they have this share of the probability; 1 keeps all.
    pub top_p: f32,
    /// Of those, keeps what has this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Of the random numbers.
    pub seed: u64,
    /// Which token of a sequence is drawn.
    pub index: u32,
    /// How often it was drawn before.
    pub attempt: u32,
}

impl Default for Draw<'_> {
    fn default() -> Self {
        Self {
            row: 0,
            penalty: 1.0,
            penalised: None,
            excluded: None,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            index: 0,
            attempt: 0,
        }
    }
}

impl Draw<'_> {
    /// Whether its numbers are in their ranges, and its sets for a vocabulary of so many tokens.
    pub fn fits(&self, vocabulary: usize) -> bool {
        let Self { penalty, penalised, excluded, temperature, top_p, min_p, .. } = *self;
        let sets = [penalised, excluded];
        (1..=MAX_VOCABULARY).contains(&vocabulary)
            && sets.iter().flatten().all(|set| set.tokens == vocabulary)
            && penalty.is_normal()
            && penalty > 0.0
            && (temperature == 0.0 || temperature.is_normal() && temperature > 0.0 && temperature.recip().is_normal())
            && top_p > 0.0
            && top_p <= 1.0
            && (0.0..=1.0).contains(&min_p)
    }
}

/// A token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Its log-probability, in nats, before penalty, exclusion and temperature.
    pub log_prob: f32,
}

/// Why no token was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undrawn {
    /// A logit is NaN or plus infinity, or all are minus infinity.
    NotFinite,
    /// Every token that is possible is excluded.
    AllExcluded,
}

impl fmt::Display for Undrawn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotFinite => "the logits are no distribution",
            Self::AllExcluded => "every token is excluded",
        })
    }
}

impl std::error::Error for Undrawn {}

/// A set of tokens, a bit for each of the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
    tokens: usize,
}

impl TokenSet {
    /// None of so many tokens.
    pub fn new(vocabulary: usize) -> Self {
        Self { words: vec![0; vocabulary.div_ceil(32)], tokens: vocabulary }
    }

    /// Puts a token in; one outside the vocabulary counts for nothing.
    pub fn insert(&mut self, token: u32) {
        if (token as usize) < self.tokens {
            self.words[token as usize / 32] |= 1 << (token % 32);
        }
    }

    /// Bit `i % 32` of word `i / 32` is token `i`'s.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    fn tokens(&self) -> impl Iterator<Item = usize> {
        let bits = |(i, word): (usize, &u32)| {
            let word = *word;
            (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 32 + bit)
        };
        self.words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(bits)
    }
}

impl Extend<u32> for TokenSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, tokens: I) {
        tokens.into_iter().for_each(|token| self.insert(token));
    }
}

/// Random numbers by counter: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k, mut l] = key;
    for _ in 0..10 {
        let (x, y) = (u64::from(a) * 0xd251_1f53, u64::from(c) * 0xcd9e_8d57);
        [a, b, c, d] = [(y >> 32) as u32 ^ b ^ k, y as u32, (x >> 32) as u32 ^ d ^ l, x as u32];
        (k, l) = (k.wrapping_add(0x9e37_79b9), l.wrapping_add(0xbb67_ae85));
    }
    [a, b, c, d]
}

/// A draw in the form in which it is computed, here and in `cuda/sample.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Terms {
    /// From 0 to 2^64.
    random: u64,
    top_p: u64,
    row: u32,
    /// All, if it is more than there are.
    top_k: u32,
    min_p: f32,
    penalty: f32,
    /// 0 takes the likeliest.
    inverse_temperature: f32,
    /// First words of the sets, where there are some.
    pub(crate) penalised: u32,
    pub(crate) excluded: u32,
    unused: u32,
}

impl Terms {
    /// First word of a set that is not there.
    pub(crate) const NO_SET: u32 = u32::MAX;

    /// # Panics
    /// If it does not fit the vocabulary.
    pub(crate) fn new(draw: &Draw<'_>, vocabulary: usize) -> Self {
        assert!(draw.fits(vocabulary), "{draw:?} from {vocabulary} tokens");
        let key = [draw.seed as u32, (draw.seed >> 32) as u32];
        let [low, high, ..] = philox([draw.index, draw.attempt, 0, 0], key);
        Self {
            random: u64::from(high) << 32 | u64::from(low),
            top_p: (f64::from(draw.top_p) * WHOLE as f64) as u64,
            row: draw.row as u32,
            top_k: if draw.top_k == 0 { u32::MAX } else { u32::try_from(draw.top_k).unwrap_or(u32::MAX) },
            min_p: draw.min_p,
            penalty: draw.penalty,
            inverse_temperature: if draw.temperature == 0.0 { 0.0 } else { draw.temperature.recip() },
            penalised: Self::NO_SET,
            excluded: Self::NO_SET,
            unused: 0,
        }
    }
}

impl Drawn {
    /// From a token's logit, the largest one and the sum of all weights, with nothing left out at temperature 1.
    pub(crate) fn new(token: u32, logit: f32, largest: f32, sum: u64) -> Self {
        let log_sum = (sum as f64 / f64::from(ONE)).ln();
        Self { token, log_prob: (f64::from(logit) - f64::from(largest) - log_sum) as f32 }
    }
}

/// Draws tokens from `logits[_, vocabulary]`, each from its row; in parallel. `scratch[draws, vocabulary]` is written
/// over.
///
/// # Panics
/// If lengths do not fit, or a draw does not fit the vocabulary.
pub fn draw(logits: &[f32], vocabulary: usize, draws: &[Draw<'_>], scratch: &mut [f32]) -> Vec<Result<Drawn, Undrawn>> {
    assert_eq!(scratch.len(), draws.len() * vocabulary, "a row of scratch for each draw");
    let mut results = vec![Err(Undrawn::NotFinite); draws.len()];
    let (shared, scratch) = (Shared::new(&mut results), Shared::new(scratch));
    for_each_piece(draws.len(), 1, |i| {
        // SAFETY: every draw is taken once.
        let (result, weights) =
            unsafe { (shared.range(i.clone()), scratch.range(i.start * vocabulary..i.end * vocabulary)) };
        let draw = &draws[i.start];
        result[0] = draw_one(&logits[draw.row * vocabulary..][..vocabulary], draw, weights);
    });
    results
}

fn draw_one(logits: &[f32], draw: &Draw<'_>, weights: &mut [f32]) -> Result<Drawn, Undrawn> {
    let terms = Terms::new(draw, logits.len());
    let most = largest(logits);
    if !most.is_finite() || !logits.iter().all(|logit| *logit < f32::INFINITY) {
        return Err(Undrawn::NotFinite);
    }
    weights.copy_from_slice(logits);
    weigh(weights, most, 1.0);
    let own = weights.iter().map(|weight| whole(*weight)).sum();
    let is_own = draw.penalised.is_none() && draw.excluded.is_none();
    let token = if is_own && terms.inverse_temperature == 1.0 {
        choose(weights, &terms)
    } else {
        weights.copy_from_slice(logits);
        adjust(weights, draw);
        let most = largest(weights);
        if most == f32::NEG_INFINITY {
            return Err(Undrawn::AllExcluded);
        }
        if terms.inverse_temperature == 0.0 {
            weights.iter().position(|logit| *logit == most)
        } else {
            weigh(weights, most, terms.inverse_temperature);
            choose(weights, &terms)
        }
    };
    let token = token.ok_or(Undrawn::NotFinite)?;
    Ok(Drawn::new(token as u32, logits[token], most, own))
}

/// Penalty and exclusion.
fn adjust(logits: &mut [f32], draw: &Draw<'_>) {
    for token in draw.penalised.into_iter().flat_map(TokenSet::tokens) {
        let logit = &mut logits[token];
        if *logit != f32::NEG_INFINITY {
            let penalised = if *logit >= 0.0 { *logit / draw.penalty } else { *logit * draw.penalty };
            // Two infinities could not be told apart.
            *logit = penalised.clamp(f32::MIN, f32::MAX);
        }
    }
    draw.excluded.into_iter().flat_map(TokenSet::tokens).for_each(|token| logits[token] = f32::NEG_INFINITY);
}

vectorised! {
    /// The largest, but for NaN.
    fn largest(logits: &[f32]) -> f32 {
        logits.iter().fold(f32::NEG_INFINITY, |most, logit| if *logit > most { *logit } else { most })
    }
}

vectorised! {
    /// `e^((logit - most) * factor)` in place of each logit: at most 1, for the exponent is at most 0.
    fn weigh(logits: &mut [f32], most: f32, factor: f32) {
        logits.iter_mut().for_each(|logit| *logit = exp((*logit - most) * factor));
    }
}

/// A weight as a whole number.
fn whole(weight: f32) -> u64 {
    (weight * ONE) as u64
}

/// Place of a token that has a weight.
fn place(token: usize, weight: f32) -> u64 {
    u64::from(1f32.to_bits() - weight.to_bits()) << ID_BITS | token as u64
}

/// The token that the random number falls on, of those that the filters keep.
fn choose(weights: &[f32], terms: &Terms) -> Option<usize> {
    let mut last = u64::MAX;
    let mut sum = None;
    if (terms.top_k as usize) < weights.len() {
        let cut = Cut::new(weights, u64::from(terms.top_k), |_| 1);
        (last, sum) = (cut.last, Some(cut.weight));
    }
    if terms.top_p < WHOLE {
        let sum = sum.unwrap_or_else(|| weights.iter().map(|weight| whole(*weight)).sum());
        last = Cut::new(weights, share(sum, terms.top_p).max(1), |weight| weight).last;
    }
    if terms.min_p > 0.0 {
        last = last.min(place(0, terms.min_p) | ((1 << ID_BITS) - 1));
    }
    let kept = || {
        let all = weights.iter().enumerate().map(|(token, weight)| (token, *weight, whole(*weight)));
        all.filter(|(token, weight, whole)| *whole > 0 && place(*token, *weight) <= last)
    };
    let sum: u64 = kept().map(|(_, _, whole)| whole).sum();
    // Below the sum.
    let mut left = ((u128::from(terms.random) * u128::from(sum)) >> 64) as u64;
    for (token, _, whole) in kept() {
        if left < whole {
            return Some(token);
        }
        left -= whole;
    }
    None
}

/// `top_p` of a sum, cut off.
fn share(sum: u64, top_p: u64) -> u64 {
    (u128::from(sum) * u128::from(top_p) / u128::from(WHOLE)) as u64
}

/// The likeliest tokens up to some measure.
struct Cut {
    /// Their largest place.
    last: u64,
    /// The sum of their weights.
    weight: u64,
}

impl Cut {
    /// The first tokens that measure at least `target` together, or all; by a digit of their places after the other.
    fn new(weights: &[f32], mut target: u64, measure: impl Fn(u64) -> u64) -> Self {
        let (mut prefix, mut sum) = (0, 0);
        let mut shift = FIRST_SHIFT;
        loop {
            // Number, weight and measure of the tokens whose place begins with the prefix and this digit.
            let mut buckets = [(0u32, 0u64, 0u64); BUCKETS];
            for (token, weight) in weights.iter().enumerate() {
                let whole = whole(*weight);
                if whole > 0 {
                    let digits = place(token, *weight) >> shift;
                    if digits >> DIGIT == prefix {
                        let bucket = &mut buckets[digits as usize % BUCKETS];
                        *bucket = (bucket.0 + 1, bucket.1 + whole, bucket.2 + measure(whole));
                    }
                }
            }
            let reaches = |(_, (_, weight, measure)): &(u64, &(u32, u64, u64))| {
                let reached = *measure >= target;
                if !reached {
                    target -= measure;
                    sum += weight;
                }
                reached
            };
            let Some((digit, (count, weight, _))) = (0..).zip(&buckets).find(reaches) else {
                return Self { last: u64::MAX, weight: sum };
            };
            prefix = prefix << DIGIT | digit;
            if shift == 0 || *count == 1 {
                return Self { last: ((prefix + 1) << shift) - 1, weight: sum + weight };
            }
            shift -= DIGIT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The authors' known answers (Random123, `kat_vectors`).
    #[test]
    fn random_numbers_are_those_of_philox() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn what_makes_no_sense_does_not_fit() {
        let base = Draw::default;
        assert!(base().fits(1) && base().fits(MAX_VOCABULARY) && !base().fits(0) && !base().fits(MAX_VOCABULARY + 1));
        let set = TokenSet::new(7);
        assert!(Draw { excluded: Some(&set), ..base() }.fits(7) && !Draw { excluded: Some(&set), ..base() }.fits(8));
        for draw in [
            Draw { penalty: 0.0, ..base() },
            Draw { penalty: f32::NAN, ..base() },
            Draw { temperature: -1.0, ..base() },
            Draw { temperature: 1e-40, ..base() },
            Draw { temperature: f32::INFINITY, ..base() },
            Draw { top_p: 0.0, ..base() },
            Draw { top_p: 1.1, ..base() },
            Draw { min_p: -0.1, ..base() },
            Draw { min_p: f32::NAN, ..base() },
        ] {
            assert!(!draw.fits(7), "{draw:?}");
        }
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        let mut set = TokenSet::new(70);
        set.extend([0, 69, 31, 32, 69, 70, 1000]);
        assert_eq!(set.tokens().collect::<Vec<_>>(), [0, 31, 32, 69]);
    }
}
