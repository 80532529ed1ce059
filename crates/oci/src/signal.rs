//! Signals as `runc kill` accepts them.

use hull_sandbox::{Error, Result};

/// Parses a signal: a number, or a name in any case, with or without `SIG`.
///
/// 0 is valid: `kill` then only checks that the process exists. Unlike in runc, real-time signals
/// have names too (`RTMIN+3`).
///
/// # Errors
/// `unknown signal "X"`, as runc reports it.
pub fn parse(text: &str) -> Result<u32> {
    let unknown = || Error::new(format!("unknown signal {text:?}"));
    let number = text.strip_prefix('+').unwrap_or(text);
    if number == "0" {
        return Ok(0);
    }
    // SIG followed by a number is invalid.
    let only_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if text
        .get(..3)
        .filter(|head| head.eq_ignore_ascii_case("SIG"))
        .is_some_and(|_| only_digits(text[3..].trim_start_matches('+')))
    {
        return Err(unknown());
    }
    hull_sandbox::signals::parse(text).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn signals_are_read_as_runc_reads_them() {
        let cases = [
            ("TERM", Some(15)),
            ("SIGTERM", Some(15)),
            ("sigkill", Some(9)),
            ("Usr1", Some(10)),
            ("9", Some(9)),
            ("08", Some(8)),
            ("+9", Some(9)),
            ("0", Some(0)),
            ("+0", Some(0)),
            ("64", Some(64)),
            ("RTMIN+3", Some(37)),
            ("65", None),
            ("-1", None),
            ("SIG15", None),
            ("sig+9", None),
            ("SIG", None),
            ("SIGSIGTERM", None),
            ("NOPE", None),
            ("ü", None),
            ("", None),
        ];
        for (text, number) in cases {
            assert_eq!(parse(text).ok(), number, "{text:?}");
        }
    }

    #[test]
    fn the_error_is_in_runcs_words() {
        let error = parse("SIGFOO").err().map(|error| error.message);
        assert_eq!(error.as_deref(), Some("unknown signal \"SIGFOO\""));
    }
}
