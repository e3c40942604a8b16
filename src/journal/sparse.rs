//! Bytes of a device in a journal: mostly zeroes, and of the rest not everything again.

use block::limits::MAX_OVERWRITTEN;
use block::units;
use serde::{Deserialize, Serialize};

use super::record::hex;

/// What is looked at as a whole.
const SECTOR: usize = units::SECTOR as usize;

/// Bytes of which runs of zeroes are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sparse {
    len: usize,
    runs: Vec<Run>,
}

/// Sectors in a row that are not zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    at: usize,
    #[serde(with = "hex")]
    bytes: Vec<u8>,
}

impl Sparse {
    pub(super) fn new(bytes: &[u8]) -> Sparse {
        let mut runs: Vec<Run> = Vec::new();
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            if sector.iter().all(|byte| *byte == 0) {
                continue;
            }
            let at = number * SECTOR;
            match runs.last_mut() {
                Some(run) if run.at + run.bytes.len() == at => run.bytes.extend(sector),
                _ => runs.push(Run {
                    at,
                    bytes: sector.to_vec(),
                }),
            }
        }
        let len = bytes.len();
        Sparse { len, runs }
    }

    /// All bytes. `None` where the parts do not fit together.
    pub(super) fn bytes(&self) -> Option<Vec<u8>> {
        if self.len as u64 > MAX_OVERWRITTEN {
            return None;
        }
        let mut bytes = vec![0; self.len];
        for Run { at, bytes: run } in &self.runs {
            let end = at.checked_add(run.len())?;
            bytes.get_mut(*at..end)?.copy_from_slice(run);
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_left_out_and_come_back() {
        let mut bytes = vec![0; 3000];
        assert_eq!(Sparse::new(&bytes).runs, []);
        bytes[600] = 1;
        bytes[1024..1100].fill(2);
        bytes[2999] = 3;
        let sparse = Sparse::new(&bytes);
        let runs: Vec<_> = sparse
            .runs
            .iter()
            .map(|run| (run.at, run.bytes.len()))
            .collect();
        assert_eq!(runs, [(512, 1024), (2560, 440)]);
        assert_eq!(sparse.bytes().unwrap(), bytes);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let run = |at| Run { at, bytes: vec![1] };
        for (len, at) in [(0, 0), (5, 5), (5, usize::MAX), (usize::MAX, 0)] {
            let runs = vec![run(at)];
            assert_eq!(Sparse { len, runs }.bytes(), None);
        }
    }
}
