//! What is learned from, as tokens. Examples lie on disk, and a step reads its own.

use crate::store::Store;
use crate::{Error, Result};

/// Tokens of an example.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// A text.
    Text(Side),
    /// A better and a worse sequence.
    Pair {
        /// The better one.
        chosen: Side,
        /// The worse one.
        rejected: Side,
    },
    /// A text, and what a teacher expects after its tokens.
    Taught {
        /// The text.
        side: Side,
        /// The teacher's distributions.
        teacher: Teacher,
    },
}

/// A sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Token ids, the end-of-context token last.
    pub tokens: Vec<u32>,
    /// Where the response begins; 1 in a text.
    pub response: usize,
}

/// The likeliest next tokens after some tokens in a row (Askell et al. 2021, appendix B.5).
#[derive(Clone, Debug, PartialEq)]
pub struct Teacher {
    /// The first of those tokens.
    pub first: usize,
    /// Likeliest tokens after each.
    pub top: usize,
    /// Their ids, `[rows, top]`.
    pub ids: Vec<u32>,
    /// Their log-probabilities in nats, `[rows, top]`.
    pub log_probs: Vec<f32>,
}

/// Examples on disk.
#[derive(Debug)]
pub struct Examples {
    /// With the records in front that are not examples.
    stores: Vec<(usize, Store)>,
}

const TEXT: u32 = 0;
const PAIR: u32 = 1;
const TAUGHT: u32 = 2;

impl Example {
    /// Its sequences.
    pub fn sides(&self) -> impl Iterator<Item = &Side> {
        let (first, second) = match self {
            Self::Text(side) | Self::Taught { side, .. } => (side, None),
            Self::Pair { chosen, rejected } => (chosen, Some(rejected)),
        };
        [first].into_iter().chain(second)
    }

    /// As numbers of a store.
    pub(crate) fn encode(&self) -> Vec<u32> {
        let kind = match self {
            Self::Text(_) => TEXT,
            Self::Pair { .. } => PAIR,
            Self::Taught { .. } => TAUGHT,
        };
        let mut numbers = vec![kind];
        for side in self.sides() {
            numbers.extend([side.response as u32, side.tokens.len() as u32]);
            numbers.extend(&side.tokens);
        }
        if let Self::Taught { teacher: Teacher { first, top, ids, log_probs }, .. } = self {
            numbers.extend([*first as u32, *top as u32, ids.len() as u32]);
            numbers.extend(ids);
            numbers.extend(log_probs.iter().map(|x| x.to_bits()));
        }
        numbers
    }

    /// From the numbers of a store, if they are whole.
    fn decode(numbers: &[u32]) -> Option<Self> {
        let (kind, mut rest) = numbers.split_first()?;
        let mut side = || {
            let [response, len, after @ ..] = rest else { return None };
            let (tokens, after) = after.split_at_checked(*len as usize)?;
            rest = after;
            let response = *response as usize;
            (response >= 1 && response <= tokens.len()).then(|| Side { tokens: tokens.to_vec(), response })
        };
        let first = side()?;
        match *kind {
            TEXT => Some(Self::Text(first)),
            PAIR => Some(Self::Pair { rejected: side()?, chosen: first }),
            TAUGHT => Some(Self::Taught { teacher: Teacher::decode(rest, first.tokens.len())?, side: first }),
            _ => None,
        }
    }
}

impl Teacher {
    fn decode(numbers: &[u32], tokens: usize) -> Option<Self> {
        let [first, top, len, rest @ ..] = numbers else { return None };
        let (first, top) = (*first as usize, *top as usize);
        let (ids, log_probs) = rest.split_at_checked(*len as usize)?;
        let whole = top > 0 && ids.len() == log_probs.len() && ids.len().is_multiple_of(top);
        (whole && first + ids.len() / top <= tokens).then(|| Self {
            first,
            top,
            ids: ids.to_vec(),
            log_probs: log_probs.iter().map(|bits| f32::from_bits(*bits)).collect(),
        })
    }
}

impl Examples {
    pub(crate) fn new(store: Store) -> Self {
        Self { stores: vec![(0, store)] }
    }

    /// Those of several stores, each behind so many other records.
    pub(crate) fn behind(stores: Vec<(usize, Store)>) -> Self {
        Self { stores }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.stores.iter().map(|(others, store)| store.len().saturating_sub(*others)).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The example of a number.
    ///
    /// # Errors
    /// If it cannot be read or there is none.
    pub fn get(&self, number: usize) -> Result<Example> {
        let mut left = number;
        for (others, store) in &self.stores {
            let own = store.len().saturating_sub(*others);
            if left < own {
                let numbers = store.get(others + left)?;
                let reason = || format!("record {} is not an example", others + left);
                let wrong = || Error::Malformed { path: store.path().to_owned(), reason: reason() };
                return Example::decode(&numbers).ok_or_else(wrong);
            }
            left -= own;
        }
        Err(Error::Recipe(format!("there is no example {number}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Writer;

    #[test]
    fn examples_come_back_from_several_stores() {
        let side = |tokens: &[u32], response| Side { tokens: tokens.to_vec(), response };
        let teacher = Teacher { first: 1, top: 2, ids: vec![5, 6, 7, 8], log_probs: vec![-0.5, -1.0, -0.25, -3.0] };
        let all = [
            Example::Text(side(&[1, 2, 3], 1)),
            Example::Pair { chosen: side(&[1, 2], 1), rejected: side(&[9, 8, 7, 6], 3) },
            Example::Taught { side: side(&[4, 5, 6], 1), teacher },
        ];
        let folder = tempfile::tempdir().unwrap();
        let store = |examples: &[Example], others: usize| {
            let mut writer = Writer::nameless(folder.path()).unwrap();
            (0..others).for_each(|_| writer.push(&[77]).unwrap());
            examples.iter().for_each(|example| writer.push(&example.encode()).unwrap());
            (others, writer.finish().unwrap())
        };
        let examples = Examples::behind(vec![store(&all[..1], 0), store(&[], 1), store(&all[1..], 1)]);
        assert_eq!(examples.len(), 3);
        (0..3).for_each(|i| assert_eq!(examples.get(i).unwrap(), all[i]));
        assert!(examples.get(3).is_err());
        for (i, example) in all.iter().enumerate() {
            let whole = example.encode();
            assert!((0..whole.len()).all(|len| Example::decode(&whole[..len]).is_none()), "{i}");
        }
    }
}
