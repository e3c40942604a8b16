//! The fuzz target for a damaged image and operations on it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::image::run(data));
