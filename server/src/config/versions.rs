//! Which versions of a watched folder are served, what their labels are, and how calls are split between labels.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use super::args::ModelFlags;
use super::check_name;
use crate::registry::{MAX_LABELS, Share, check_shares};

/// How versions come and go.
#[derive(Clone, Debug)]
pub struct Versions {
    /// Folder that is watched for `<model>/<version>/`.
    pub root: Option<PathBuf>,
    /// Which versions of it are served, where there is no policy for the model.
    pub policy: VersionPolicy,
    /// The same for single models.
    pub policies: BTreeMap<String, VersionPolicy>,
    /// What is first: the new version in, or the old one out.
    pub swap: SwapPolicy,
    /// How often the folder is read when nothing tells of a change.
    pub poll_interval: Duration,
    /// How long a new version may be taken back, and the one before it stays.
    pub rollback_window: Duration,
    /// Labels that are set once their version is available.
    pub(crate) labels: Vec<WantedLabel>,
    /// Splits of calls that name neither version nor label, by model.
    pub(crate) traffic: BTreeMap<String, Vec<Share>>,
}

/// Which versions of a model are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VersionPolicy {
    /// So many with the highest numbers.
    Latest(usize),
    /// All.
    All,
    /// These.
    Specific(BTreeSet<u64>),
}

/// What is first when a version takes the place of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SwapPolicy {
    /// The new one comes in, then the old one goes: there is always one that answers, and for a while there are two.
    Availability,
    /// The old one goes, then the new one comes in: there is never more than one, and for a while there is none.
    Resource,
}

/// A label and the version that it is to point at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedLabel {
    pub(crate) model: String,
    pub(crate) label: String,
    pub(crate) version: u64,
}

/// Puts the flags together.
pub(super) fn resolve(flags: &ModelFlags) -> Result<Versions, String> {
    let mut policy = VersionPolicy::Latest(1);
    let mut policies = BTreeMap::new();
    for text in &flags.version_policy {
        match text.split_once('=') {
            None => policy = parse_policy(text)?,
            Some((model, text)) => {
                check_name(model)?;
                policies.insert(model.to_owned(), parse_policy(text)?);
            }
        }
    }
    let mut labels: Vec<WantedLabel> = Vec::new();
    for text in &flags.label {
        let (model, label, version) = labelled(text, "label")?;
        if version == 0 {
            return Err(format!("--label {text}: versions begin at 1"));
        }
        let others = labels.iter().filter(|other| other.model == model);
        if others.clone().any(|other| other.label == label) || others.count() >= MAX_LABELS {
            return Err(format!("--label {text}: a label twice, or more than {MAX_LABELS} labels of a model"));
        }
        labels.push(WantedLabel { model, label, version });
    }
    let mut traffic: BTreeMap<String, Vec<Share>> = BTreeMap::new();
    for text in &flags.traffic {
        let (model, label, weight) = labelled(text, "traffic")?;
        let weight = u32::try_from(weight).map_err(|error| format!("--traffic {text}: {error}"))?;
        traffic.entry(model).or_default().push(Share { label, weight });
    }
    for (model, shares) in &traffic {
        check_shares(shares).map_err(|error| format!("--traffic of {model}: {error}"))?;
    }
    Ok(Versions {
        root: flags.model_root.clone(),
        policy,
        policies,
        swap: flags.swap_policy,
        poll_interval: flags.poll_interval_secs,
        rollback_window: flags.rollback_window_secs,
        labels,
        traffic,
    })
}

/// `latest:2`, `all`, `specific:3+7`.
fn parse_policy(text: &str) -> Result<VersionPolicy, String> {
    let wrong = || format!("--version-policy {text}: expected latest:N, all or specific:N+N");
    match text.split_once(':') {
        None if text == "all" => Ok(VersionPolicy::All),
        None if text == "latest" => Ok(VersionPolicy::Latest(1)),
        Some(("latest", n)) => match n.parse() {
            Ok(n @ 1..) => Ok(VersionPolicy::Latest(n)),
            _ => Err(wrong()),
        },
        Some(("specific", these)) => {
            these.split('+').map(str::parse).collect::<Result<_, _>>().map(VersionPolicy::Specific).map_err(|_| wrong())
        }
        _ => Err(wrong()),
    }
}

/// `MODEL:LABEL=NUMBER`.
fn labelled(text: &str, option: &str) -> Result<(String, String, u64), String> {
    let parts = || {
        let (model, rest) = text.split_once(':')?;
        let (label, number) = rest.split_once('=')?;
        Some((model, label, number.parse().ok()?))
    };
    let (model, label, number) = parts().ok_or_else(|| format!("--{option} {text}: expected MODEL:LABEL=NUMBER"))?;
    check_name(model)?;
    check_name(label)?;
    Ok((model.to_owned(), label.to_owned(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies() {
        let check =
            |text: &str, expected: Option<VersionPolicy>| assert_eq!(parse_policy(text).ok(), expected, "{text}");
        check("latest", Some(VersionPolicy::Latest(1)));
        check("latest:3", Some(VersionPolicy::Latest(3)));
        check("all", Some(VersionPolicy::All));
        check("specific:3+7", Some(VersionPolicy::Specific([3, 7].into())));
        for wrong in ["", "latest:0", "latest:-1", "specific:", "specific:a", "all:1", "newest"] {
            check(wrong, None);
        }
    }

    #[test]
    fn labels_and_shares() {
        let found = labelled("pm:stable=3", "label").unwrap();
        assert_eq!(found, ("pm".to_owned(), "stable".to_owned(), 3));
        for wrong in ["stable=3", "pm:stable", "pm:stable=x", "p m:stable=1", "pm:=1"] {
            assert!(labelled(wrong, "label").is_err(), "{wrong}");
        }
    }
}
