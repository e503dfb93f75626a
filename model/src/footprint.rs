//! How much memory a model will take, found out before it is read.

use std::fmt;

use crate::cache::PAGE;
use crate::checkpoint::{Headers, Source};
use crate::decoder::{Decoder, StepSize};
use crate::loaded::{LoadOptions, LoadedModel, Sizes};
use crate::{Error, Result};

/// Bytes of memory for a byte of `tokenizer.json`: 9 were measured for a vocabulary of 49 thousand (SmolLM2).
const TOKENIZER: u64 = 10;

/// Bytes of a device for rounding arrays up to its pages, for kernels that are loaded when they are first used, and for
/// the lists of a step.
const DRIVER: u64 = 512 << 20;

/// Bytes of memory that a model takes: of the process, or, where there is a device with memory of its own, of that but
/// for the tokenizer and the copies while weights are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, as [`ModelInfo::weight_bytes`](crate::loaded::ModelInfo::weight_bytes) will say.
    pub weights: u64,
    /// Pages of keys and values, which are taken when the weights are there.
    pub cache: u64,
    /// Norms, tables of the rotary embedding, and on a GPU what quantised matrices are expanded in.
    pub tables: u64,
    /// Always the process's.
    pub tokenizer: u64,
    /// What the largest step computes in, which is taken when one comes.
    pub workspace: u64,
    /// Copies while weights are read, as far as they are beyond what the weights take in the end.
    pub reading: u64,
    /// Whether the device has memory of its own.
    pub on_device: bool,
}

impl Footprint {
    /// The most of the process's memory at a time: what is read is packed before the cache is taken.
    pub fn peak(&self) -> u64 {
        if self.on_device {
            return self.tokenizer.saturating_add(self.reading);
        }
        let served = self.cache.saturating_add(self.workspace);
        (self.weights + self.tables + self.tokenizer).saturating_add(self.reading.max(served))
    }

    /// The most of the device's own memory, with what its driver takes beside it.
    pub fn device_peak(&self) -> u64 {
        match self.on_device {
            true => (self.weights + self.tables + DRIVER).saturating_add(self.cache).saturating_add(self.workspace),
            false => 0,
        }
    }

    /// What stays before anything is asked.
    pub fn lasting(&self) -> u64 {
        self.weights + self.tables + self.tokenizer + self.cache
    }

    /// Refuses what does not fit into so many free bytes of the process, and of the device, as far as they are known.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with what is needed and what there is.
    pub fn check(&self, free: Option<u64>, on_device: Option<u64>) -> Result<()> {
        for (needed, free, whose) in
            [(self.peak(), free, "give the process more memory"), (self.device_peak(), on_device, "take a larger GPU")]
        {
            if let Some(free) = free.filter(|free| needed > *free) {
                return Err(Error::OutOfMemory(format!(
                    "{self}, {} are free; unload another version first, lower --kv-cache-mib, or {whose}",
                    Size(free)
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (peak, others) = (self.peak().max(self.device_peak()), self.tables + self.tokenizer);
        let [peak, weights, cache, others, workspace, reading] =
            [peak, self.weights, self.cache, others, self.workspace, self.reading].map(Size);
        write!(
            f,
            "the model needs {peak} (weights {weights}, key-value cache {cache}, tokenizer and tables {others}, workspace \
             {workspace}; {reading} more while it is read)"
        )
    }
}

/// Displayed in MiB, or in GiB if there are many.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1 << 20) as f64;
        let mib = self.0 as f64 / MIB;
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.2} GiB", mib / 1024.0) }
    }
}

impl LoadedModel {
    /// What [`LoadedModel::load`] will take, and then steps up to the `largest`, from headers alone; a repository's files
    /// are fetched, as by a load.
    ///
    /// # Errors
    /// What is missing, malformed or not served, as far as headers tell.
    pub fn footprint(source: &Source, options: &LoadOptions, largest: StepSize) -> Result<Footprint> {
        let Headers { config, mut weights, stored_dtype, tokenizer_bytes } = Headers::read(source)?;
        if options.dtype.is_fp8() {
            weights.round_to_fp8()?;
        }
        let sizes = Sizes::of(&config, stored_dtype, options)?;
        // Every token of a step has a place in the cache, and every sequence a token.
        let tokens = largest.tokens.min(sizes.kv_pages * PAGE);
        let largest = StepSize { tokens, sequences: largest.sequences.min(tokens) };
        let plan = Decoder::plan(&config, &weights, sizes.dtype, sizes.max_input_tokens, &options.device);
        Ok(Footprint {
            weights: plan.weights,
            cache: sizes.kv_pages as u64 * sizes.page_bytes as u64,
            tables: plan.tables,
            tokenizer: TOKENIZER * tokenizer_bytes,
            workspace: Decoder::workspace_bytes(&config, sizes.dtype, largest, &options.device),
            reading: plan.reading,
            on_device: !options.device.is_cpu(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_what_would() {
        let footprint = Footprint {
            weights: 3 << 30,
            cache: 1 << 30,
            tables: 2 << 20,
            tokenizer: 3 << 20,
            workspace: 100 << 20,
            reading: 200 << 20,
            on_device: false,
        };
        assert_eq!((footprint.peak(), footprint.device_peak()), ((4 << 30) + (105 << 20), 0));
        footprint.check(Some(footprint.peak()), None).unwrap();
        footprint.check(None, None).unwrap();
        let there = Footprint { on_device: true, ..footprint };
        assert_eq!((there.peak(), there.device_peak()), (203 << 20, (4 << 30) + (102 << 20) + DRIVER));
        there.check(Some(203 << 20), Some(5 << 30)).unwrap();
        assert!(there.check(Some(5 << 30), Some(4 << 30)).unwrap_err().to_string().contains("a larger GPU"));
        let error = footprint.check(Some(700 << 20), None).unwrap_err().to_string();
        for words in [
            "needs 4.10 GiB",
            "weights 3.00 GiB",
            "cache 1.00 GiB",
            "workspace 100.0 MiB",
            "200.0 MiB more while",
            "700.0 MiB are free",
        ] {
            assert!(error.contains(words), "{error}");
        }
    }
}
