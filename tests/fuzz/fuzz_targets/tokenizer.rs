//! Fuzzes [`plumb_fuzz::tokenizer`].

#![no_main]

libfuzzer_sys::fuzz_target!(init: plumb_fuzz::start(), |data: &[u8]| plumb_fuzz::run(&plumb_fuzz::TOKENIZER, data));
