//! The fuzz target for the bytes of an NBD client.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::nbd::run(data));
