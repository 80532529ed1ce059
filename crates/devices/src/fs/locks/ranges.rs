//! Which bytes of a file an owner has locked.

/// Kind of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Others may have one as well.
    Read,
    /// Others may have none.
    Write,
}

/// Bytes of a file, the last one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Range {
    /// The last byte that a file can have: a range up to it has no end.
    pub const LAST: u64 = i64::MAX.cast_unsigned();

    /// `None` for numbers that are no range of a file.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start <= end && end <= Self::LAST).then_some(Self { start, end })
    }

    fn meets(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// Ranges that do not overlap, ascending; neighbours of one kind are one range.
#[derive(Debug, Default)]
pub struct Ranges(Vec<(Range, Kind)>);

impl Ranges {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Range, Kind)> + '_ {
        self.0.iter().copied()
    }

    /// What keeps another owner from locking `range`.
    pub fn conflict(&self, range: Range, kind: Kind) -> Option<(Range, Kind)> {
        self.iter().find(|(held, held_kind)| {
            held.meets(range) && (kind == Kind::Write || *held_kind == Kind::Write)
        })
    }

    /// Locks `range`, whatever it was before; `None` unlocks it.
    pub fn set(&mut self, range: Range, kind: Option<Kind>) {
        let Self(ranges) = self;
        let joins = |held: &(Range, Kind)| Some(held.1) == kind;
        let mut first = ranges.partition_point(|(held, _)| held.end < range.start);
        let mut last = ranges.partition_point(|(held, _)| held.start <= range.end);
        // Neighbours of this kind; none ends at the last number.
        if first > 0 && ranges[first - 1].0.end + 1 == range.start && joins(&ranges[first - 1]) {
            first -= 1;
        }
        if last < ranges.len() && range.end + 1 == ranges[last].0.start && joins(&ranges[last]) {
            last += 1;
        }
        // Of what is in the range, the two at its ends may extend beyond it.
        let (mut new, mut before, mut after) = (range, None, None);
        if let Some(held) = ranges[first..last].first() {
            if joins(held) {
                new.start = new.start.min(held.0.start);
            } else if held.0.start < range.start {
                let (start, end) = (held.0.start, range.start - 1);
                before = Some((Range { start, end }, held.1));
            }
        }
        if let Some(held) = ranges[first..last].last() {
            if joins(held) {
                new.end = new.end.max(held.0.end);
            } else if held.0.end > range.end {
                let (start, end) = (range.end + 1, held.0.end);
                after = Some((Range { start, end }, held.1));
            }
        }
        let new = kind.map(|kind| (new, kind));
        let instead = before.into_iter().chain(new).chain(after);
        ranges.splice(first..last, instead);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range::new(start, end).unwrap()
    }

    #[test]
    fn numbers_that_are_no_range_are_refused() {
        assert_eq!(Range::new(5, 4), None);
        assert_eq!(Range::new(0, Range::LAST + 1), None);
        assert_eq!(Range::new(u64::MAX, u64::MAX), None);
        assert!(Range::new(Range::LAST, Range::LAST).is_some());
    }

    proptest! {
        /// Each byte has what was last set for it, and no two neighbours could be one range.
        #[test]
        fn each_byte_is_as_it_was_set_last(steps in prop::collection::vec(
            (0..20u64, 0..20u64, 0..3u8), 0..40,
        )) {
            let mut ranges = Ranges::default();
            let mut bytes = [None; 40];
            for (start, length, kind) in steps {
                let kind = [None, Some(Kind::Read), Some(Kind::Write)][usize::from(kind)];
                ranges.set(range(start, start + length), kind);
                bytes[start as usize..=(start + length) as usize].fill(kind);
                let held: Vec<_> = ranges.iter().collect();
                for (at, byte) in bytes.iter().enumerate() {
                    let at = at as u64;
                    let here = held.iter().find(|(held, _)| held.meets(range(at, at)));
                    prop_assert_eq!(here.map(|(_, kind)| *kind), *byte);
                    let conflict = ranges.conflict(range(at, at), Kind::Read);
                    prop_assert_eq!(conflict.is_some(), *byte == Some(Kind::Write));
                }
                for pair in held.windows(2) {
                    prop_assert!(pair[0].0.end < pair[1].0.start);
                    prop_assert!(pair[0].1 != pair[1].1 || pair[0].0.end + 1 < pair[1].0.start);
                }
            }
        }
    }

    #[test]
    fn a_range_may_have_no_end() {
        let mut ranges = Ranges::default();
        ranges.set(range(10, Range::LAST), Some(Kind::Write));
        ranges.set(range(0, Range::LAST), Some(Kind::Write));
        assert_eq!(ranges.len(), 1);
        ranges.set(range(5, 6), None);
        assert_eq!(ranges.len(), 2);
        ranges.set(range(0, Range::LAST), None);
        assert_eq!(ranges.len(), 0);
    }
}
