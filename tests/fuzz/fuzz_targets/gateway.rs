//! Fuzzes [`plumb_fuzz::gateway`].

#![no_main]

libfuzzer_sys::fuzz_target!(init: plumb_fuzz::start(), |data: &[u8]| plumb_fuzz::run(&plumb_fuzz::GATEWAY, data));
