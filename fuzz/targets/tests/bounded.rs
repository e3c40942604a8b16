//! The corpus and mutations of it, for a bounded time and without a fuzzer.
//!
//! `QBLOCKD_FUZZ_SECONDS` says for how long each target runs (two seconds unless given), `QBLOCKD_FUZZ_SEED` which mutations
//! are tried. An input that fails is written to a file that the message names: put it into the corpus.

#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Panics of tasks and threads of the servers, which those survive.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The targets share the hook for panics, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| (path.display().to_string(), std::fs::read(&path).unwrap()))
        .collect()
}

/// Runs one input; a panic anywhere in the process is a failure.
fn try_input(target: fn(&[u8]), name: &str, input: &[u8]) {
    let ran = catch_unwind(AssertUnwindSafe(|| target(input)));
    let panics = std::mem::take(&mut *PANICS.lock().unwrap());
    if ran.is_ok() && panics.is_empty() {
        return;
    }
    let kept = std::env::temp_dir().join(format!("qblockd-fuzz-{}", std::process::id()));
    std::fs::write(&kept, input).unwrap();
    panic!("{name} fails, input kept in {}: {panics:?}", kept.display());
}

fn fuzz(name: &str, target: fn(&[u8])) {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seconds = number("QBLOCKD_FUZZ_SECONDS", 2);
    let seed = number("QBLOCKD_FUZZ_SEED", 1);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        PANICS.lock().unwrap().push(info.to_string());
    }));
    let corpus = corpus(name);
    assert!(!corpus.is_empty());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        for (file, input) in &corpus {
            try_input(target, file, input);
        }
        let seeds: Vec<_> = corpus.iter().map(|(_, input)| input.clone()).collect();
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut tried = 0_u64;
        while Instant::now() < end {
            // Each input has its own generator, so that it can be made again from its number.
            let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(1 << 40) ^ tried);
            let input = fuzz_targets::mutate::mutate(&seeds, &mut random);
            try_input(target, &format!("seed {seed}, mutation {tried}"), &input);
            tried += 1;
        }
        tried
    }));
    std::panic::set_hook(before);
    match outcome {
        Ok(tried) => println!(
            "{name}: {} files, {tried} mutations (seed {seed})",
            corpus.len()
        ),
        Err(failure) => std::panic::resume_unwind(failure),
    }
}

#[test]
fn images() {
    fuzz("image", fuzz_targets::image::run);
}

#[test]
fn qmp_clients() {
    fuzz("qmp", fuzz_targets::qmp::run);
}

#[test]
fn nbd_clients() {
    fuzz("nbd", fuzz_targets::nbd::run);
}
