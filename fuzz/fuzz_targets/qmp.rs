//! The fuzz target for the bytes of a QMP client.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::qmp::run(data));
