//! Where models compute: `--device`, plain for all and `NAME=` for one of them.

use std::collections::{BTreeMap, BTreeSet};

use plumb_model::decoder;

use super::check_name;

/// Where models compute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Where there is nothing else said of a model.
    pub default: DeviceChoice,
    /// The same for single models.
    pub models: BTreeMap<String, DeviceChoice>,
}

/// Where a model computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, or the CPU where there is none.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPUs of these numbers, each once, which share the model.
    Cuda(Vec<usize>),
}

/// Puts the flags together; `is_name` says which names there may be.
pub(super) fn resolve(flags: &[String], is_name: impl Fn(&str) -> bool) -> Result<Devices, String> {
    let mut devices = Devices::default();
    let mut has_default = false;
    for text in flags {
        let twice = match text.split_once('=') {
            None => {
                devices.default = parse(text)?;
                std::mem::replace(&mut has_default, true)
            }
            Some((name, choice)) => {
                check_name(name)?;
                if !is_name(name) {
                    return Err(format!("--device {text}: no model has this name"));
                }
                devices.models.insert(name.to_owned(), parse(choice)?).is_some()
            }
        };
        if twice {
            return Err(format!("--device {text}: given twice; GPUs that share a model are one list: cuda:0,cuda:1"));
        }
    }
    Ok(devices)
}

/// `auto`, `cpu`, `cuda:0`, `cuda:0,cuda:1`.
fn parse(text: &str) -> Result<DeviceChoice, String> {
    match text.parse() {
        Ok(decoder::DeviceChoice::Auto) => return Ok(DeviceChoice::Auto),
        Ok(decoder::DeviceChoice::Cpu) => return Ok(DeviceChoice::Cpu),
        _ => {}
    }
    let gpu = |text: &str| match text.parse() {
        Ok(decoder::DeviceChoice::Cuda(number)) => Some(number),
        _ => None,
    };
    let numbers: Option<Vec<usize>> = text.split(',').map(gpu).collect();
    let numbers = numbers.ok_or_else(|| format!("--device {text}: not auto, cpu, cuda:N or a list of GPUs"))?;
    if numbers.iter().collect::<BTreeSet<_>>().len() < numbers.len() {
        return Err(format!("--device {text}: a GPU twice"));
    }
    Ok(DeviceChoice::Cuda(numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(flags: &[&str]) -> Result<Devices, String> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        resolve(&flags, |name| name != "rm")
    }

    #[test]
    fn a_device_is_for_all_models_or_for_one() {
        let check = |flags: &[&str], default: DeviceChoice, models: &[(&str, DeviceChoice)]| {
            let models = models.iter().map(|(name, choice)| ((*name).to_owned(), choice.clone())).collect();
            assert_eq!(resolved(flags), Ok(Devices { default, models }), "{flags:?}");
        };
        let gpus = |numbers: &[usize]| DeviceChoice::Cuda(numbers.to_vec());
        check(&[], DeviceChoice::Auto, &[]);
        check(&["cpu"], DeviceChoice::Cpu, &[]);
        check(&["cuda"], gpus(&[0]), &[]);
        check(&["cuda:3"], gpus(&[3]), &[]);
        check(&["cuda:1,cuda:0"], gpus(&[1, 0]), &[]);
        check(&["pm=cuda:1"], DeviceChoice::Auto, &[("pm", gpus(&[1]))]);
        check(
            &["pm=cuda:1", "cuda:0", "lm=cuda:2,cuda:3", "small=cpu"],
            gpus(&[0]),
            &[("pm", gpus(&[1])), ("lm", gpus(&[2, 3])), ("small", DeviceChoice::Cpu)],
        );
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let check = |flags: &[&str], message: &str| {
            let error = resolved(flags).unwrap_err();
            assert!(error.contains(message), "{flags:?}: {error}");
        };
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda0", "cpu,cpu", "auto,cuda:1", "cuda:0,", "cuda:0,cpu"] {
            check(&[wrong], "not auto, cpu, cuda:N or a list of GPUs");
        }
        check(&["cuda:0,cuda:0"], "a GPU twice");
        check(&["cuda,cuda:0"], "a GPU twice");
        check(&["cuda:0", "cuda:1"], "one list: cuda:0,cuda:1");
        check(&["pm=cuda:0", "pm=cuda:1"], "given twice");
        check(&["rm=cuda:0"], "no model has this name");
        check(&["p m=cuda:0"], "cannot be a model's name");
    }
}
