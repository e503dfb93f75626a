//! What a checkpoint took is given back.

use std::path::Path;

use plumb_fuzz::{GGUF, SAFETENSORS, TOKENIZER, allocated, run};

/// The only test of its program: the heap is that of the process.
#[test]
fn a_checkpoint_that_has_gone_leaves_nothing_behind() {
    const TIMES: usize = 200;
    for (target, input) in [(&GGUF, "llama-f32"), (&TOKENIZER, "split"), (&SAFETENSORS, "model")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name).join(input);
        let data = std::fs::read(path).unwrap();
        let times = |times: usize| (0..times).for_each(|_| run(target, &data));
        // What is made once, and what every thread of the pool keeps.
        times(TIMES);
        let before = allocated();
        times(TIMES);
        let left = allocated().saturating_sub(before) / TIMES;
        // The tokenizer's crate keeps a number for each tokenizer on each thread that has used it.
        assert!(left < 512, "{}: {left} bytes are left of each checkpoint", target.name);
    }
}
