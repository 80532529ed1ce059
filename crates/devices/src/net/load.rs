//! How many frames come together: whether one side waits for the other, or both are busy.

/// Frames per event, on average, from which on it is a stream; and below which it is none any more.
const STREAM: u32 = 4;
const NO_STREAM: u32 = 2;

/// The average is kept in fixed point.
const ONE: u32 = 256;
/// An event's share of it: one part in so many.
const WEIGHT: u32 = 8;
/// More frames at one event count as this many.
const MOST: u32 = 1 << 12;

/// The last events, on average.
#[derive(Debug, Default)]
pub struct Load {
    /// At the event that is dealt with.
    frames: u32,
    average: u32,
    streaming: bool,
}

impl Load {
    /// Frames of this event.
    pub fn add(&mut self, frames: usize) {
        let frames = u32::try_from(frames).unwrap_or(MOST);
        self.frames = self.frames.saturating_add(frames).min(MOST);
    }

    /// The event is over.
    pub fn settle(&mut self) {
        let frames = std::mem::take(&mut self.frames);
        self.average = self.average - self.average / WEIGHT + frames * ONE / WEIGHT;
        let enough = if self.streaming { NO_STREAM } else { STREAM };
        self.streaming = self.average >= enough * ONE;
    }

    /// Whether frames come in numbers.
    pub fn is_streaming(&self) -> bool {
        self.streaming
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(load: &mut Load, events: usize, frames: usize) -> bool {
        for _ in 0..events {
            load.add(frames);
            load.settle();
        }
        load.is_streaming()
    }

    #[test]
    fn one_at_a_time_is_no_stream() {
        assert!(!after(&mut Load::default(), 1000, 1));
        assert!(!after(&mut Load::default(), 1000, 3));
    }

    #[test]
    fn batches_are_a_stream_until_they_end() {
        let mut load = Load::default();
        assert!(!after(&mut load, 1, 16));
        assert!(after(&mut load, 10, 16));
        // What a stream goes on with, and what it does not.
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
