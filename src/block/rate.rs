//! How fast something may be: bytes per second, evenly, without a clock of its own.

use std::time::{Duration, Instant};

use crate::limits::RATE_SLICE;

/// A limit on bytes per second.
///
/// What is taken is paid for with time, and up to one slice of time may be owed: bursts are at most what the speed allows in a
/// slice, or one request if that is more.
#[derive(Debug, Clone, Default)]
pub struct RateLimit {
    /// Bytes per second. 0: no limit.
    speed: u64,
    /// When all that was taken is paid for.
    paid: Option<Instant>,
}

impl RateLimit {
    /// A limit of so many bytes per second, or none for 0.
    pub fn new(speed: u64) -> Self {
        RateLimit { speed, paid: None }
    }

    /// Bytes per second. 0: no limit.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Changes the speed. What is owed is paid at the new one.
    pub fn set_speed(&mut self, speed: u64, now: Instant) {
        let owed = self.paid.map_or(Duration::ZERO, |paid| paid - now);
        self.paid = match speed {
            0 => None,
            _ => now.checked_add(scaled(owed, self.speed, speed)),
        };
        self.speed = speed;
    }

    /// Takes `bytes`, or answers how long to wait before asking again.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        if self.speed == 0 {
            return Ok(());
        }
        let paid = self.paid.map_or(now, |paid| paid.max(now));
        let owed = paid - now;
        if owed > RATE_SLICE {
            return Err(owed - RATE_SLICE);
        }
        let price = scaled(Duration::from_secs(1), bytes, self.speed);
        // A request that is paid for beyond the clock's end leaves the limit as it was: such a speed is none.
        self.paid = paid.checked_add(price).or(Some(paid));
        Ok(())
    }
}

/// `time * factor / divisor`, as long as a `Duration` can be at most.
fn scaled(time: Duration, factor: u64, divisor: u64) -> Duration {
    let nanoseconds = time.as_nanos().saturating_mul(u128::from(factor)) / u128::from(divisor);
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Takes pieces of `piece` bytes for `time`, as soon as it may, and answers how many bytes that were.
    fn taken(limit: &mut RateLimit, piece: u64, start: Instant, time: Duration) -> u64 {
        let (mut now, mut taken) = (start, 0);
        while now < start + time {
            match limit.take(piece, now) {
                Ok(()) => taken += piece,
                Err(wait) => now += wait,
            }
        }
        taken
    }

    #[test]
    fn the_speed_is_kept_in_the_long_run_and_bursts_are_short() {
        let start = Instant::now();
        for (speed, piece) in [(1 << 20, 4096), (1 << 20, 1 << 20), (10_000_000, 65_536)] {
            let mut limit = RateLimit::new(speed);
            let burst = taken(&mut limit, piece, start, Duration::from_nanos(1));
            assert!(burst <= speed / 10 + 2 * piece, "{speed}: {burst}");
            let rest = taken(
                &mut limit,
                piece,
                start + Duration::from_nanos(1),
                60 * SECOND,
            );
            let error = (burst + rest).abs_diff(60 * speed);
            assert!(error <= speed / 10 + 2 * piece, "{speed}, {piece}: {error}");
        }
    }

    #[test]
    fn none_is_none() {
        let mut limit = RateLimit::new(0);
        for _ in 0..1000 {
            assert_eq!(limit.take(u64::MAX, Instant::now()), Ok(()));
        }
    }

    #[test]
    fn what_is_owed_is_paid_at_the_new_speed() {
        let now = Instant::now();
        let mut limit = RateLimit::new(1);
        assert_eq!(limit.take(100, now), Ok(()));
        assert_eq!(limit.take(1, now), Err(100 * SECOND - RATE_SLICE));
        limit.set_speed(100, now);
        assert_eq!(limit.take(1, now), Err(SECOND - RATE_SLICE));
        limit.set_speed(0, now);
        assert_eq!(limit.take(1, now), Ok(()));
        limit.set_speed(1, now);
        assert_eq!(limit.take(1, now), Ok(()));
    }

    #[test]
    fn no_number_is_too_large() {
        let now = Instant::now();
        let mut limit = RateLimit::new(1);
        assert_eq!(limit.take(u64::MAX, now), Ok(()));
        assert!(limit.take(u64::MAX, now).is_err());
        limit.set_speed(u64::MAX, now);
        limit.set_speed(1, now + SECOND);
    }
}
