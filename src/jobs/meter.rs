//! How fast a job is: what it did in the last seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The seconds that count. Long enough to even out pauses of a disk, short enough to show what the user has just changed.
const WINDOW: Duration = Duration::from_secs(5);

/// The distance of samples.
const STEP: Duration = Duration::from_secs(1);

/// Samples of a job's progress, the oldest first; never empty.
#[derive(Debug)]
pub(super) struct Meter {
    first: (Instant, u64),
    later: VecDeque<(Instant, u64)>,
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        Meter {
            first: (now, 0),
            later: VecDeque::new(),
        }
    }

    /// So much was done when the job went on: what comes counts from now.
    pub(super) fn restart(&mut self, now: Instant, offset: u64) {
        self.first = (now, offset);
        self.later.clear();
    }

    /// So much is done now.
    pub(super) fn note(&mut self, now: Instant, offset: u64) {
        let (newest, _) = self.later.back().copied().unwrap_or(self.first);
        if now.duration_since(newest) >= STEP {
            self.later.push_back((now, offset));
            self.forget(now);
        }
    }

    /// What was done per second in the window; as long as there was not a second, what was done in all.
    pub(super) fn rate(&mut self, now: Instant, offset: u64) -> u64 {
        self.forget(now);
        let (since, was) = self.first;
        let elapsed = now.duration_since(since).max(STEP).as_nanos();
        let done = u128::from(offset.saturating_sub(was));
        u64::try_from(done * Duration::from_secs(1).as_nanos() / elapsed).unwrap_or(u64::MAX)
    }

    /// Drops samples from before the window, but for the last of them.
    fn forget(&mut self, now: Instant) {
        while let Some(next) = self.later.front()
            && now.duration_since(next.0) >= WINDOW
        {
            self.first = *next;
            self.later.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_what_is_done_of_late() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::new(start);
        assert_eq!(meter.rate(start, 0), 0);
        let mut offset = 0;
        // 100 in a second for a minute, then 10.
        for tenth in 1..=600 {
            offset += 10;
            meter.note(at(tenth * 100), offset);
        }
        assert_eq!(meter.rate(at(60_000), offset), 100);
        for second in 61..=70 {
            offset += 10;
            meter.note(at(second * 1000), offset);
        }
        assert_eq!(meter.rate(at(70_000), offset), 10);
        // Nothing more: it fades.
        assert_eq!(meter.rate(at(80_000), offset), 0);
        assert!(meter.later.len() <= 6);
    }

    #[test]
    fn the_first_moments_promise_nothing() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        meter.note(start, 1000);
        assert_eq!(meter.rate(start + Duration::from_millis(3), 1000), 1000);
    }

    #[test]
    fn the_time_before_a_restart_does_not_count() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::new(start);
        for second in 1..=10 {
            meter.note(at(second * 1000), second * 100);
        }
        meter.restart(at(60_000), 1000);
        assert_eq!(meter.rate(at(60_000), 1000), 0);
        meter.note(at(62_000), 1200);
        assert_eq!(meter.rate(at(62_000), 1200), 100);
    }
}
