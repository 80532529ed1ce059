//! A rate limit in bytes per second: a token bucket.

use std::time::{Duration, Instant};

/// After a pause, the bytes of this time may be sent at once.
const BURST: Duration = Duration::from_millis(50);
/// Smallest size of the bucket: one frame of the largest size.
const LEAST: u64 = 64 << 10;

/// One direction's bucket. It may be overdrawn by one frame, so that frames larger than its content
/// pass eventually.
#[derive(Debug)]
pub struct Bucket {
    /// Bytes per second; not 0.
    rate: u64,
    size: i64,
    content: i64,
    filled: Option<Instant>,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: u64) -> Self {
        let burst = u128::from(rate) * BURST.as_millis() / 1000;
        let size = u64::try_from(burst).unwrap_or(u64::MAX).max(LEAST);
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        Self {
            rate: rate.max(1),
            size,
            content: size,
            filled: None,
        }
    }

    /// When the next frame may pass, if not at `now`.
    pub fn wait(&mut self, now: Instant) -> Option<Instant> {
        let last = *self.filled.get_or_insert(now);
        let earned =
            now.saturating_duration_since(last).as_nanos() * u128::from(self.rate) / 1_000_000_000;
        if earned > 0 {
            let earned = i64::try_from(earned).unwrap_or(i64::MAX);
            self.content = self.content.saturating_add(earned).min(self.size);
            self.filled = Some(now);
        }
        if self.content > 0 {
            return None;
        }
        let missing = 1 + u128::from(self.content.unsigned_abs());
        let nanoseconds = (missing * 1_000_000_000).div_ceil(u128::from(self.rate));
        let pause = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        // At most a day, so that the addition cannot overflow.
        Some(now + pause.min(Duration::from_secs(86400)))
    }

    /// Takes a frame's bytes.
    pub fn spend(&mut self, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.content = self.content.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_bytes_pass_as_the_rate_and_one_burst_allow() {
        let start = Instant::now();
        for (rate, frame) in [
            (1 << 20, 1500),
            (1 << 20, 64 << 10),
            (100 << 20, 9000),
            (1000, 1500),
        ] {
            let mut bucket = Bucket::new(rate);
            let mut now = start;
            let end = start + Duration::from_secs(10);
            let mut bytes = 0;
            while now < end {
                match bucket.wait(now) {
                    None => {
                        bucket.spend(frame);
                        bytes += frame as u64;
                    }
                    Some(when) => {
                        assert!(when > now);
                        now = when;
                    }
                }
            }
            let most = rate * 10 + (rate / 20).max(LEAST) + frame as u64;
            assert!(bytes <= most + rate / 100, "{rate}: {bytes} of {most}");
            assert!(bytes + frame as u64 >= rate * 10, "{rate}: {bytes}");
        }
    }

    #[test]
    fn nothing_overflows() {
        let now = Instant::now();
        for rate in [1, u64::MAX] {
            let mut bucket = Bucket::new(rate);
            assert_eq!(bucket.wait(now), None);
            bucket.spend(usize::MAX);
            bucket.spend(usize::MAX);
            assert!(bucket.wait(now + Duration::from_secs(1)) != Some(now));
        }
    }
}
