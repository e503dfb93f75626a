//! Checkpoints too large to commit: those in the folder that `PLUMB_MODELS` names (`smollm2/`, and
//! somewhere below the folder the GGUF file that it was made from).

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands, in its helpers too")]

use std::path::{Path, PathBuf};

use plumb_model::cache::PAGE;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::Config;
use plumb_model::decoder::{DType, Decoder, Read, Step, StepSequence};

/// The folder, or `None` with a line that says so.
fn models() -> Option<PathBuf> {
    let folder = std::env::var_os("PLUMB_MODELS").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: PLUMB_MODELS names no folder with real models");
    }
    folder
}

fn open(path: &Path) -> Checkpoint {
    let model = path.to_str().unwrap().to_owned();
    Checkpoint::open(&Source { model, ..Source::default() }).unwrap()
}

/// The first GGUF file in a folder or below it.
fn find_gguf(folder: &Path) -> Option<PathBuf> {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder).ok()?.filter_map(Result::ok).map(|entry| entry.path()).collect();
    entries.sort();
    let is_gguf = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
    let here = entries.iter().find(is_gguf).cloned();
    here.or_else(|| entries.iter().filter(|path| path.is_dir() && !path.is_symlink()).find_map(|path| find_gguf(path)))
}

#[test]
fn a_gguf_file_and_the_folder_made_from_it_agree() {
    let Some(models) = models() else { return };
    let folder = open(&models.join("smollm2"));
    let gguf = open(&find_gguf(&models).unwrap());
    let architecture = folder.config.architecture.clone();
    assert_eq!(Config { architecture, ..gguf.config.clone() }, folder.config);
    assert_eq!(gguf.special.eos_ids, folder.special.eos_ids);
    assert_eq!(gguf.special.bos, folder.special.bos);
    assert_eq!(gguf.chat_template, folder.chat_template);

    let (mut gguf, mut folder) = (gguf.weights, folder.weights);
    for (name, shape) in [
        ("model.embed_tokens.weight", [49_152, 576]),
        ("model.layers.7.self_attn.q_proj.weight", [576, 576]),
        ("model.layers.29.self_attn.k_proj.weight", [192, 576]),
        ("model.layers.0.mlp.down_proj.weight", [576, 1536]),
    ] {
        let read = |weights: &mut plumb_model::checkpoint::Weights| {
            let tensor = weights.take(name, &shape).unwrap().to_dtype(candle_core::DType::BF16).unwrap();
            tensor.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        // The folder was made by dequantising and rounding to bf16.
        assert_eq!(read(&mut gguf), read(&mut folder), "{name}");
    }
}

#[test]
fn a_gguf_file_gives_the_bits_of_the_folder_in_less_memory() {
    let Some(models) = models() else { return };
    let text = "The reward is the last token's, whatever else the server is doing: 3 µm, naïve café.";
    let run = |mut checkpoint: Checkpoint| {
        let decoder =
            Decoder::build(&checkpoint.config, &mut checkpoint.weights, DType::Bf16, 512, &Default::default()).unwrap();
        checkpoint.weights.finish().unwrap();
        let tokens = checkpoint.tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE) as u32).collect();
        let read = Read::LogProbs { rows: 0..tokens.len() - 1, targets: &tokens[1..] };
        let step = Step { sequences: vec![StepSequence { tokens: &tokens, position: 0, pages: &pages, read }] };
        let answers =
            decoder.step(&step, &mut decoder.kv_store(pages.len()).unwrap(), &mut decoder.workspace()).unwrap();
        assert!(answers[0].len() > 10 && answers[0].iter().all(|log_prob| (-40.0..=0.0).contains(log_prob)));
        (answers[0].iter().map(|log_prob| log_prob.to_bits()).collect::<Vec<_>>(), decoder.size())
    };
    let (folder, (parameters, folder_bytes)) = run(open(&models.join("smollm2")));
    let (gguf, (gguf_parameters, gguf_bytes)) = run(open(&find_gguf(&models).unwrap()));
    assert_eq!((gguf, gguf_parameters), (folder, parameters));
    println!("{gguf_bytes} bytes instead of {folder_bytes}");
    assert!((gguf_bytes as f64) < 0.45 * folder_bytes as f64, "{gguf_bytes} of {folder_bytes}");
}

#[test]
fn a_gguf_tokenizer_gives_the_ids_of_the_folders() {
    let Some(models) = models() else { return };
    let folder = open(&models.join("smollm2")).tokenizer;
    let gguf = open(&find_gguf(&models).unwrap()).tokenizer;
    let texts = [
        "The reward is the last token.",
        "Größe: 3 µm, naïve café — 東京 🙂👩‍👩‍👧",
        "x = 1234567890; y=3.14159",
        "  leading, trailing  and   inner    spaces  ",
        "tabs\tand\n\nlines\r\n\n\nend\n",
        "it's, we'll, they'VE, I'm 'quoted'",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|><repo_name><|im_end|>",
        "fn main() {\n    println!(\"{}\", 0x1F);\n}\n",
        "नमस्ते مرحبا שלום ก็",
        "",
        " ",
        "\u{0}\u{7f}\u{a0}\u{3000}\u{feff}",
    ];
    for text in texts {
        for special in [true, false] {
            let (ours, theirs) = (gguf.encode(text, special).unwrap(), folder.encode(text, special).unwrap());
            assert_eq!(ours.get_ids(), theirs.get_ids(), "{text:?}");
            let decode = |ids: &[u32]| gguf.decode(ids, true).unwrap();
            assert_eq!(decode(ours.get_ids()), folder.decode(theirs.get_ids(), true).unwrap(), "{text:?}");
        }
    }
}

/// SmolLM2's own tokenizer, and llama.cpp's `smollm`, split digits off first, so white space before a digit stays
/// together. The folder's tokenizer was rebuilt by Transformers, which does not know `smollm` and splits as GPT-2.
#[test]
fn white_space_before_a_digit_stays_together_in_a_gguf_tokenizer() {
    let Some(models) = models() else { return };
    let gguf = open(&find_gguf(&models).unwrap()).tokenizer;
    let tokens = |text: &str| gguf.encode(text, false).unwrap().get_tokens().to_vec();
    assert_eq!(tokens("a\n\n1"), ["a", "ĊĊ", "1"]);
    assert_eq!(tokens("a   12"), ["a", "ĠĠĠ", "1", "2"]);
}
