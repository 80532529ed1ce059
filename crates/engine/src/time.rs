//! Times as Docker writes and reads them: RFC 3339, durations, ages for people. UTC only; no
//! time-zone files.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970, UTC.
pub type UnixNanos = i128;

const SECOND: i128 = 1_000_000_000;

/// A time that is left, nanoseconds, as poll(2) takes it.
pub(crate) fn timespec(left: UnixNanos) -> rustix::event::Timespec {
    rustix::event::Timespec {
        tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: (left % 1_000_000_000) as _,
    }
}

/// The present.
pub fn now() -> UnixNanos {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    }
}

/// Days since 1970-01-01 of a date of the Gregorian calendar.
fn days_from_date(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the leap day is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn date_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

/// `2026-11-21T23:04:05.123456789Z`; the form of Docker's `logs --timestamps` and `inspect`.
pub fn format_rfc3339(time: UnixNanos) -> String {
    let seconds = time.div_euclid(SECOND) as i64;
    let nanos = time.rem_euclid(SECOND);
    let (year, month, day) = date_from_days(seconds.div_euclid(86_400));
    let second = seconds.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{nanos:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
    )
}

/// `2026-11-21 23:04:05 +0000 UTC`: the form of `CreatedAt` in Docker's lists.
pub fn format_list(time: UnixNanos) -> String {
    let text = format_rfc3339(time);
    let (date, clock) = text.split_once('T').unwrap_or((&text, ""));
    let clock = clock.split('.').next().unwrap_or_default();
    format!("{date} {clock} +0000 UTC")
}

/// Reads RFC 3339, also without seconds, time of day or zone (then UTC), as `docker logs --since`
/// does.
pub fn parse_rfc3339(text: &str) -> Option<UnixNanos> {
    let field = |text: &str, length: usize| -> Option<i64> {
        let digits = text.len() == length && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let (date, clock) = match text.split_once(['T', 't', ' ']) {
        Some((date, clock)) => (date, Some(clock)),
        None => (text, None),
    };
    let mut parts = date.split('-');
    let (year, month, day) = (
        field(parts.next()?, 4)?,
        field(parts.next()?, 2)?,
        field(parts.next()?, 2)?,
    );
    let valid = parts.next().is_none() && (1..=12).contains(&month) && (1..=31).contains(&day);
    let days = days_from_date(year, month, day);
    if !valid || date_from_days(days) != (year, month, day) {
        return None;
    }
    let mut seconds = days * 86_400;
    let mut nanos = 0;
    if let Some(clock) = clock {
        let (clock, offset) = split_offset(clock)?;
        seconds -= offset;
        let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
        let mut scale = SECOND;
        for digit in fraction.chars() {
            scale /= 10;
            nanos += i128::from(digit.to_digit(10)?) * scale;
        }
        let limits = [(3600, 23), (60, 59), (1, 60)];
        let mut fields = clock.split(':');
        for (unit, limit) in limits {
            let Some(text) = fields.next() else { break };
            let value = field(text, 2).filter(|value| *value <= limit)?;
            seconds += value * unit;
        }
        if fields.next().is_some() {
            return None;
        }
    }
    Some(i128::from(seconds) * SECOND + nanos)
}

/// Splits `10:00:00+02:00` into the clock and the offset in seconds.
fn split_offset(clock: &str) -> Option<(&str, i64)> {
    if let Some(clock) = clock.strip_suffix(['Z', 'z']) {
        return Some((clock, 0));
    }
    let Some(at) = clock.rfind(['+', '-']) else {
        return Some((clock, 0));
    };
    let (hours, minutes) = clock[at + 1..].split_once(':')?;
    let offset = hours.parse::<u8>().ok()? as i64 * 3600 + minutes.parse::<u8>().ok()? as i64 * 60;
    let sign = if clock[at..].starts_with('-') { -1 } else { 1 };
    Some((&clock[..at], sign * offset))
}

/// Reads a duration in Go's notation: `1h30m`, `1.5s`, `300ms`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let units = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..digits].parse().ok()?;
        let unit = &rest[digits..];
        let unit = &unit[..unit
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(unit.len())];
        let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
        seconds += value * factor;
        rest = &rest[digits + unit.len()..];
    }
    (!text.is_empty())
        .then(|| Duration::try_from_secs_f64(seconds).ok())
        .flatten()
}

/// Reads what `--since` takes: a time, a duration before now, or seconds since 1970.
pub fn parse_since(text: &str) -> Result<UnixNanos, String> {
    if let Some(time) = parse_rfc3339(text) {
        return Ok(time);
    }
    if let Some(duration) = parse_duration(text) {
        return Ok(now() - duration.as_nanos() as i128);
    }
    text.parse::<f64>()
        .ok()
        .filter(|seconds| seconds.is_finite() && *seconds >= 0.0)
        .map(|seconds| (seconds * SECOND as f64) as i128)
        .ok_or_else(|| {
            format!("{text:?} is no time: give a time (2026-11-21T10:00:00), seconds since 1970 or a duration (42m)")
        })
}

/// An age in words: `5 minutes`, `About an hour`.
pub fn human_duration(seconds: i64) -> String {
    const HOUR: i64 = 3600;
    const DAY: i64 = 24 * HOUR;
    match seconds {
        ..1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{seconds} seconds"),
        60..120 => "About a minute".to_owned(),
        120..HOUR => format!("{} minutes", seconds / 60),
        HOUR..7200 => "About an hour".to_owned(),
        7200..172_800 => format!("{} hours", seconds / HOUR),
        172_800..1_209_600 => format!("{} days", seconds / DAY),
        1_209_600..5_184_000 => format!("{} weeks", seconds / DAY / 7),
        5_184_000..63_072_000 => format!("{} months", seconds / DAY / 30),
        _ => format!("{} years", seconds / DAY / 365),
    }
}

/// How long ago `time` was, in words.
pub fn human_age(time: UnixNanos) -> String {
    human_duration(((now() - time) / SECOND) as i64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_there_and_back() {
        for (text, nanos) in [
            ("1970-01-01T00:00:00.000000000Z", 0),
            ("2000-02-29T12:30:45.000000001Z", 951_827_445 * SECOND + 1),
            ("2026-11-21T23:04:05.123456789Z", 1_795_302_245_123_456_789),
            ("1969-12-31T23:59:59.000000000Z", -SECOND),
        ] {
            assert_eq!(parse_rfc3339(text), Some(nanos), "{text}");
            assert_eq!(format_rfc3339(nanos), text);
        }
        assert_eq!(format_list(SECOND), "1970-01-01 00:00:01 +0000 UTC");
    }

    #[test]
    fn shorter_times_and_zones() {
        let noon = 1_795_262_400 * SECOND;
        for text in [
            "2026-11-21T12:00:00Z",
            "2026-11-21T12:00",
            "2026-11-21T12",
            "2026-11-21 12:00:00",
            "2026-11-21T14:00:00+02:00",
            "2026-11-21T10:30:00.0-01:30",
        ] {
            assert_eq!(parse_rfc3339(text), Some(noon), "{text}");
        }
        assert_eq!(parse_rfc3339("2026-11-21"), Some(noon - 12 * 3600 * SECOND));
        for text in [
            "",
            "2026-13-01",
            "2026-02-30",
            "2026-11-21T25:00",
            "26-1-1",
            "2026-11-21T1:2:3:4",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, seconds) in [
            ("10s", 10.0),
            ("1h30m", 5400.0),
            ("1.5s", 1.5),
            ("300ms", 0.3),
        ] {
            assert_eq!(
                parse_duration(text),
                Some(Duration::from_secs_f64(seconds)),
                "{text}"
            );
        }
        for text in ["", "10", "s", "1x", "-1s", "1.2.3s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn since_takes_three_forms() {
        assert_eq!(parse_since("1.5").unwrap(), SECOND * 3 / 2);
        assert_eq!(parse_since("1970-01-02").unwrap(), 86_400 * SECOND);
        let since = parse_since("1m").unwrap();
        let age = now() - since;
        assert!((60 * SECOND..61 * SECOND).contains(&age));
        assert!(parse_since("yesterday").is_err());
    }

    #[test]
    fn ages_for_people() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (59, "59 seconds"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (3600, "About an hour"),
            (172_799, "47 hours"),
            (172_800, "2 days"),
            (1_209_600, "2 weeks"),
            (5_184_000, "2 months"),
            (63_072_000, "2 years"),
        ] {
            assert_eq!(human_duration(seconds), text);
        }
    }
}
