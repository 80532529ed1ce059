//! How much a device processes per event: whether guest and device wait for each other, or both
//! are busy with bulk traffic.

/// Frames per event, on average, at which bulk traffic begins, and below which it ends.
const BULK_BEGIN: u32 = 4;
const BULK_END: u32 = 2;

/// The average is kept in fixed point.
const ONE: u32 = 256;
/// The weight of one event in the average: one part in so many.
const WEIGHT: u32 = 8;
/// More frames at one event count as this many.
const MAX_FRAMES: u32 = 1 << 12;

/// Moving average over the last events.
#[derive(Debug, Default)]
pub struct Load {
    average: u32,
    bulk: bool,
}

impl Load {
    /// Records an event in which `frames` were processed.
    pub fn record(&mut self, frames: usize) {
        let frames = u32::try_from(frames).unwrap_or(MAX_FRAMES).min(MAX_FRAMES);
        self.average = self.average - self.average / WEIGHT + frames * ONE / WEIGHT;
        let threshold = if self.bulk { BULK_END } else { BULK_BEGIN };
        self.bulk = self.average >= threshold * ONE;
    }

    /// Whether there is bulk traffic.
    pub fn is_bulk(&self) -> bool {
        self.bulk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(load: &mut Load, events: usize, frames: usize) -> bool {
        for _ in 0..events {
            load.record(frames);
        }
        load.is_bulk()
    }

    #[test]
    fn one_at_a_time_is_not_bulk() {
        assert!(!after(&mut Load::default(), 1000, 1));
        assert!(!after(&mut Load::default(), 1000, 3));
    }

    #[test]
    fn batches_are_bulk_until_they_end() {
        let mut load = Load::default();
        assert!(!after(&mut load, 1, 16));
        assert!(after(&mut load, 10, 16));
        // A few frames keep it going, single ones do not.
        assert!(after(&mut load, 1000, 3));
        assert!(!after(&mut load, 100, 1));
    }

    #[test]
    fn any_number_of_frames_is_taken() {
        let mut load = Load::default();
        assert!(after(&mut load, 1000, usize::MAX));
        assert!(!after(&mut load, 100, 0));
    }
}
