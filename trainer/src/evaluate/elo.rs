//! Elo from comparisons: the preference loss, with a number for each player instead of a model (Askell et al. 2021,
//! section 2.2.3).

use std::collections::HashMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::measure::{Measurement, sigmoid};
use crate::input::{BadLines, Lines};
use crate::objective::softplus;
use crate::{Error, Result};

/// Elo points of a nat: a win is 1 / (1 + 10^(-difference / 400)).
const POINTS: f64 = 400.0 / std::f64::consts::LN_10;

/// Most players: the fit solves a linear system of their number.
const MAX_PLAYERS: usize = 1000;

/// 97.5 % quantile of the normal distribution.
const Z95: f64 = 1.959_963_985;

/// How often one player was preferred to another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) a: usize,
    pub(super) b: usize,
    /// Share of the games that `a` won, ties being halves.
    pub(super) win_rate: f64,
    /// How much the comparison weighs.
    pub(super) games: f64,
}

/// What the files say.
#[derive(Debug, Default)]
pub(super) struct Comparisons {
    pub(super) players: Vec<String>,
    pub(super) comparisons: Vec<Comparison>,
    /// Whether all lines have a number of games.
    pub(super) counted: bool,
}

#[derive(Deserialize)]
struct Line {
    a: String,
    b: String,
    wins_a: Option<f64>,
    win_rate: Option<f64>,
    games: Option<f64>,
}

/// Reads lines of `{"a", "b", "games", "wins_a"}` or `{"a", "b", "win_rate"}`, with `games` where it is known.
pub(super) fn read(
    files: &[PathBuf],
    limit: usize,
    bad: &mut BadLines,
    warn: &mut dyn FnMut(&str),
) -> Result<Comparisons> {
    let mut read = Comparisons { counted: true, ..Comparisons::default() };
    let mut places: HashMap<String, usize> = HashMap::new();
    for path in files {
        let mut lines = Lines::open(path)?;
        let most = read.comparisons.len().saturating_add(limit);
        while read.comparisons.len() < most {
            let Some((number, line)) = lines.next()? else { break };
            let (line, win_rate) = match comparison(&line) {
                Ok(found) => found,
                Err(reason) => {
                    bad.skip(path, number, &reason, warn)?;
                    continue;
                }
            };
            let mut place = |name: String| {
                *places.entry(name).or_insert_with_key(|name| {
                    read.players.push(name.clone());
                    read.players.len() - 1
                })
            };
            let (a, b) = (place(line.a), place(line.b));
            read.counted &= line.games.is_some();
            read.comparisons.push(Comparison { a, b, win_rate, games: line.games.unwrap_or(1.0) });
        }
    }
    if read.comparisons.is_empty() || read.players.len() > MAX_PLAYERS {
        let reason = format!("{} players; Elo is fitted to 2 up to {MAX_PLAYERS}", read.players.len());
        return Err(Error::Recipe(reason));
    }
    Ok(read)
}

/// A line and the share of games that its `a` won.
fn comparison(line: &[u8]) -> std::result::Result<(Line, f64), String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let win_rate = match (line.wins_a, line.win_rate, line.games) {
        (Some(wins), None, Some(games)) => wins / games,
        (None, Some(rate), _) => rate,
        _ => return Err("expected wins_a and games, or win_rate".to_owned()),
    };
    if line.a == line.b {
        return Err(format!("{} is compared with itself", line.a));
    }
    if !(0.0..=1.0).contains(&win_rate) || line.games.is_some_and(|games| !(games > 0.0 && games.is_finite())) {
        return Err("games has to be more than 0, and wins_a at least 0 and no more than games".to_owned());
    }
    Ok((line, win_rate))
}

impl Comparisons {
    /// Elo of every player, the anchor's being 0, with 95 % intervals of the difference to it where games are counted.
    ///
    /// # Errors
    /// If the anchor is no player, or somebody's Elo is not finite.
    pub(super) fn fit(&self, anchor: Option<&str>) -> Result<Vec<Measurement>> {
        let anchor = match anchor {
            Some(name) => self.players.iter().position(|player| player == name).ok_or_else(|| {
                Error::Recipe(format!("anchor {name} is no player; they are {}", self.players.join(", ")))
            })?,
            None => 0,
        };
        self.check_finite()?;
        let rewards = self.rewards(anchor)?;
        let errors = self.deviations(anchor, &rewards)?;
        let games = |player| self.comparisons.iter().filter(move |c| c.a == player || c.b == player);
        let measured = self.players.iter().enumerate().map(|(player, name)| {
            let value = POINTS * rewards[player];
            let half = (self.counted && player != anchor).then(|| Z95 * POINTS * errors[player]);
            Measurement {
                name: name.clone(),
                metric: "elo".to_owned(),
                score: None,
                value,
                low: half.map(|half| value - half),
                high: half.map(|half| value + half),
                n: games(player).map(|c| c.games).sum::<f64>().round() as u64,
                kl_bound: None,
            }
        });
        Ok(measured.collect())
    }

    /// What was compared and what the fit says of it.
    pub(super) fn lines(&self, fitted: &[Measurement]) -> Vec<Value> {
        let line = |c: &Comparison| {
            let difference = (fitted[c.a].value - fitted[c.b].value) / POINTS;
            json!({
                "a": self.players[c.a],
                "b": self.players[c.b],
                "games": self.counted.then_some(c.games),
                "win_rate": c.win_rate,
                "fitted": sigmoid(difference),
            })
        };
        self.comparisons.iter().map(line).collect()
    }

    /// The loss has a minimum only if everybody is better than everybody, by way of others.
    fn check_finite(&self) -> Result<()> {
        for beats in [true, false] {
            let mut reached = vec![false; self.players.len()];
            reached[0] = true;
            let mut changed = true;
            while changed {
                changed = false;
                for c in &self.comparisons {
                    for (from, to, share) in [(c.a, c.b, c.win_rate), (c.b, c.a, 1.0 - c.win_rate)] {
                        let (from, to) = if beats { (from, to) } else { (to, from) };
                        if share > 0.0 && reached[from] && !reached[to] {
                            reached[to] = true;
                            changed = true;
                        }
                    }
                }
            }
            if let Some(player) = reached.iter().position(|reached| !reached) {
                let (first, other) = (&self.players[0], &self.players[player]);
                let (better, worse) = if beats { (other, first) } else { (first, other) };
                return Err(Error::Recipe(format!(
                    "nothing says how much better {better} is than {worse}: {worse} never won, directly or by way of \
                     others; leave one of them out, or add comparisons"
                )));
            }
        }
        Ok(())
    }

    /// Newton's method on the loss: sum of games (w softplus(r_b - r_a) + (1 - w) softplus(r_a - r_b)), which is convex.
    fn rewards(&self, anchor: usize) -> Result<Vec<f64>> {
        let mut rewards = vec![0.0; self.players.len()];
        let mut loss = self.loss(&rewards);
        for _ in 0..200 {
            let (gradient, hessian) = self.derivatives(&rewards);
            let step = solve(hessian, gradient.into_iter().map(|slope| vec![slope]).collect(), anchor)?.concat();
            // A full step may lead too far where win rates are extreme.
            let mut scale = 1.0;
            let next = loop {
                let next: Vec<f64> = rewards.iter().zip(&step).map(|(r, s)| r - scale * s).collect();
                if self.loss(&next) <= loss || scale < 1e-9 {
                    break next;
                }
                scale /= 2.0;
            };
            loss = self.loss(&next);
            rewards = next;
            if step.iter().all(|s| (s * scale).abs() < 1e-10) {
                return Ok(rewards);
            }
        }
        Err(Error::Recipe("Elo does not converge: some win rates are too close to 0 or 1".into()))
    }

    fn loss(&self, rewards: &[f64]) -> f64 {
        let of = |c: &Comparison| {
            let d = rewards[c.a] - rewards[c.b];
            c.games * (c.win_rate * softplus(-d) + (1.0 - c.win_rate) * softplus(d))
        };
        self.comparisons.iter().map(of).sum()
    }

    fn derivatives(&self, rewards: &[f64]) -> (Vec<f64>, Vec<Vec<f64>>) {
        let n = rewards.len();
        let (mut gradient, mut hessian) = (vec![0.0; n], vec![vec![0.0; n]; n]);
        for c in &self.comparisons {
            let p = sigmoid(rewards[c.a] - rewards[c.b]);
            let slope = c.games * (p - c.win_rate);
            gradient[c.a] += slope;
            gradient[c.b] -= slope;
            let curvature = c.games * p * (1.0 - p);
            hessian[c.a][c.a] += curvature;
            hessian[c.b][c.b] += curvature;
            hessian[c.a][c.b] -= curvature;
            hessian[c.b][c.a] -= curvature;
        }
        (gradient, hessian)
    }

    /// Standard errors of the differences to the anchor: the inverse of the Fisher information.
    fn deviations(&self, anchor: usize, rewards: &[f64]) -> Result<Vec<f64>> {
        let (_, hessian) = self.derivatives(rewards);
        let n = rewards.len();
        let unit = |i: usize| (0..n).map(|j| if i == j { 1.0 } else { 0.0 }).collect::<Vec<_>>();
        let inverse = solve(hessian, (0..n).map(unit).collect(), anchor)?;
        Ok((0..n).map(|player| inverse[player][player].max(0.0).sqrt()).collect())
    }
}

/// Solves a symmetric system without the anchor's row and column, for each column of `right`; the anchor's row is 0.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<Vec<f64>>, anchor: usize) -> Result<Vec<Vec<f64>>> {
    let n = right.len();
    for (i, row) in matrix.iter_mut().enumerate() {
        row[anchor] = 0.0;
        if i == anchor {
            row.fill(0.0);
            row[anchor] = 1.0;
        }
    }
    right[anchor].fill(0.0);
    // The matrix is positive definite: no pivoting is needed.
    for i in 0..n {
        let pivot = matrix[i][i];
        if pivot <= 0.0 || !pivot.is_finite() {
            return Err(Error::Recipe("Elo cannot be fitted: some win rates are too close to 0 or 1".into()));
        }
        for j in i + 1..n {
            let factor = matrix[j][i] / pivot;
            if factor != 0.0 {
                subtract(&mut matrix, j, i, factor);
                subtract(&mut right, j, i, factor);
            }
        }
    }
    for i in (0..n).rev() {
        let row = &matrix[i];
        for (j, factor) in row.iter().enumerate().skip(i + 1).filter(|(_, factor)| **factor != 0.0) {
            subtract(&mut right, i, j, *factor);
        }
        right[i].iter_mut().for_each(|x| *x /= row[i]);
    }
    Ok(right)
}

/// Takes so many times one row from another.
fn subtract(rows: &mut [Vec<f64>], from: usize, row: usize, factor: f64) {
    let taken = std::mem::take(&mut rows[row]);
    rows[from].iter_mut().zip(&taken).for_each(|(x, y)| *x -= factor * y);
    rows[row] = taken;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparisons(players: &[&str], of: &[(usize, usize, f64, f64)]) -> Comparisons {
        let comparisons = of.iter().map(|&(a, b, win_rate, games)| Comparison { a, b, win_rate, games }).collect();
        Comparisons { players: players.iter().map(|&name| name.to_owned()).collect(), comparisons, counted: true }
    }

    /// The win rates of Askell et al. 2021, table 2; what they give with equal weights was worked out with NumPy, by
    /// gradient descent on the same loss.
    #[test]
    fn the_papers_models() {
        let players = ["200M", "800M", "3B", "13B", "52B", "13B distilled", "52B distilled", "13B short", "52B short"];
        let rates = [
            (0, 1, 0.34),
            (0, 2, 0.30),
            (0, 3, 0.13),
            (0, 4, 0.16),
            (1, 2, 0.40),
            (1, 3, 0.26),
            (1, 4, 0.25),
            (2, 3, 0.34),
            (2, 4, 0.34),
            (3, 4, 0.45),
            (5, 3, 0.46),
            (6, 4, 0.46),
            (7, 3, 0.44),
            (8, 4, 0.47),
        ];
        let of: Vec<_> = rates.iter().map(|&(a, b, rate)| (a, b, rate, 1.0)).collect();
        let found = comparisons(&players, &of).fit(None).unwrap();
        let expected = [0.0, 108.2605, 171.8775, 288.0831, 301.4250, 260.2288, 273.5706, 246.1890, 280.5538];
        for (measured, expected) in found.iter().zip(expected) {
            assert!(
                (measured.value - expected).abs() < 1e-3,
                "{}: {}, expected {expected}",
                measured.name,
                measured.value
            );
        }
    }

    #[test]
    fn two_players_are_the_logarithm_of_the_odds() {
        let found = comparisons(&["a", "b"], &[(1, 0, 0.75, 400.0)]).fit(None).unwrap();
        let points = 400.0 * 3f64.log10();
        assert!((found[1].value - points).abs() < 1e-6, "{}", found[1].value);
        // The error of the logarithm of odds: 1 / sqrt(n p (1 - p)).
        let half = 1.959_963_985 * 400.0 / 10f64.ln() / (400.0 * 0.75 * 0.25_f64).sqrt();
        assert!((found[1].high.unwrap() - points - half).abs() < 1e-6, "{:?}", found[1]);
        assert_eq!((found[0].value, found[0].low, found[0].n), (0.0, None, 400));
        // Measured from the other side.
        let found = comparisons(&["a", "b"], &[(1, 0, 0.75, 400.0)]).fit(Some("b")).unwrap();
        assert!((found[0].value + points).abs() < 1e-6 && found[1].value == 0.0);
    }

    #[test]
    fn extreme_rates_converge() {
        let found = comparisons(&["a", "b", "c"], &[(0, 1, 1e-6, 1e6), (1, 2, 1.0, 5.0), (2, 1, 0.01, 100.0)]);
        let found = found.fit(None).unwrap();
        assert!((found[1].value - 400.0 * (1e6_f64 - 1.0).log10()).abs() < 1e-3, "{}", found[1].value);
        // c won 1 of 105 games.
        assert!((found[2].value - found[1].value + 400.0 * 104f64.log10()).abs() < 1e-3, "{}", found[2].value);
    }

    #[test]
    fn what_no_number_can_say_is_named() {
        let error = |of: &[(usize, usize, f64, f64)]| {
            comparisons(&["first", "second", "third"], of).fit(None).unwrap_err().to_string()
        };
        let text = error(&[(0, 1, 0.5, 9.0), (1, 2, 1.0, 9.0)]);
        assert!(text.contains("how much better first is than third"), "{text}");
        let text = error(&[(0, 1, 0.5, 9.0), (1, 2, 0.0, 9.0)]);
        assert!(text.contains("how much better third is than first"), "{text}");
        let text = comparisons(&["a", "b"], &[(0, 1, 0.5, 1.0)]).fit(Some("c")).unwrap_err().to_string();
        assert!(text.contains("they are a, b"), "{text}");
    }

    #[test]
    fn lines_that_make_no_sense() {
        let check = |line: &str| comparison(line.as_bytes()).map(|(_, rate)| rate).map_err(|_| ());
        assert_eq!(check(r#"{"a": "x", "b": "y", "wins_a": 3, "games": 4}"#), Ok(0.75));
        assert_eq!(check(r#"{"a": "x", "b": "y", "win_rate": 0.4}"#), Ok(0.4));
        for line in [
            r#"{"a": "x", "b": "y", "wins_a": 3}"#,
            r#"{"a": "x", "b": "y", "wins_a": 5, "games": 4}"#,
            r#"{"a": "x", "b": "y", "wins_a": 0, "games": 0}"#,
            r#"{"a": "x", "b": "y", "win_rate": 1.1}"#,
            r#"{"a": "x", "b": "x", "win_rate": 0.5}"#,
            r#"{"a": "x"}"#,
        ] {
            assert_eq!(check(line), Err(()), "{line}");
        }
    }
}
