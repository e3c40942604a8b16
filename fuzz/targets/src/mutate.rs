//! Other inputs made of given ones: what a fuzzer does, without its knowledge of coverage.

/// Longest input that is made.
const MAX_LEN: usize = 4096;

/// An input made of one of the seeds, or two, by a few random edits.
pub fn mutate(seeds: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    let pick = |random: &mut fastrand::Rng| match seeds.is_empty() {
        true => Vec::new(),
        false => seeds[random.usize(..seeds.len())].clone(),
    };
    let mut input = pick(random);
    if random.u8(..4) == 0 {
        let other = pick(random);
        let keep = random.usize(..=input.len());
        let from = random.usize(..=other.len());
        input.truncate(keep);
        input.extend_from_slice(&other[from..]);
    }
    for _ in 0..random.u8(1..8) {
        edit(&mut input, random);
    }
    input.truncate(MAX_LEN);
    input
}

fn edit(input: &mut Vec<u8>, random: &mut fastrand::Rng) {
    let at = random.usize(..=input.len());
    match random.u8(..6) {
        0 => input.insert(at, random.u8(..)),
        1 if at < input.len() => drop(input.remove(at)),
        2 if at < input.len() => input[at] ^= 1 << random.u8(..8),
        3 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff, b'"'][random.usize(..6)],
        4 => {
            let end = (at + random.usize(..24)).min(input.len());
            let piece = input[at..end].to_vec();
            let to = random.usize(..=input.len());
            input.splice(to..to, piece);
        }
        _ => {
            let bytes: Vec<u8> = (0..random.usize(1..12)).map(|_| random.u8(..)).collect();
            let end = (at + bytes.len()).min(input.len());
            input.splice(at..end, bytes);
        }
    }
}
