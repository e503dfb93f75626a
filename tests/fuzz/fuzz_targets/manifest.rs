//! Fuzzes [`plumb_fuzz::manifest`].

#![no_main]

libfuzzer_sys::fuzz_target!(init: plumb_fuzz::start(), |data: &[u8]| plumb_fuzz::run(&plumb_fuzz::MANIFEST, data));
