//! Errors of creating a container or a process in it.
//!
//! Used by every file of this module, on both sides of the gate: the child sends its error to the
//! agent as bytes and exits. A message is one line.

use std::fmt::Display;
use std::io;

/// Longest message that crosses the gate; longer ones are cut.
pub(super) const MESSAGE_LIMIT: usize = 2048;

/// Why a container or process could not be created. Each message says what failed, on what, and
/// why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The command does not exist in the container.
    #[error("{0}")]
    CommandNotFound(String),
    /// The command exists and cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// The spec is invalid, or asks for something that this agent does not support.
    #[error("{0}")]
    InvalidSpec(String),
    /// The container's init has ended.
    #[error("{0}")]
    NotRunning(String),
    /// Everything else, mostly a failed system call.
    #[error("{0}")]
    Other(String),
}

/// Result of anything in this module.
pub type Result<T> = std::result::Result<T, CreateError>;

impl CreateError {
    /// The spec is invalid at `field`.
    pub(super) fn invalid(field: impl Display, why: impl Display) -> Self {
        CreateError::InvalidSpec(format!("invalid spec: {field}: {why}"))
    }

    /// The spec is valid, and asks for something that this agent does not support.
    pub(super) fn unsupported(field: impl Display, why: impl Display) -> Self {
        CreateError::InvalidSpec(format!("not supported: {field}: {why}"))
    }

    /// An operation failed.
    pub(super) fn other(what: impl Display, why: impl Display) -> Self {
        CreateError::Other(format!("{what}: {why}"))
    }

    /// Encodes it for the gate: a byte for the kind, then the message.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (kind, message) = match self {
            CreateError::CommandNotFound(message) => (b'c', message),
            CreateError::NotExecutable(message) => (b'x', message),
            CreateError::InvalidSpec(message) => (b's', message),
            CreateError::NotRunning(message) => (b'r', message),
            CreateError::Other(message) => (b'o', message),
        };
        let length = message.floor_char_boundary(MESSAGE_LIMIT);
        let mut bytes = Vec::with_capacity(1 + length);
        bytes.push(kind);
        bytes.extend(&message.as_bytes()[..length]);
        bytes
    }

    /// Decodes a message read from [`super::Child::gate`].
    pub fn decode(bytes: &[u8]) -> Self {
        let text = |rest: &[u8]| String::from_utf8_lossy(rest).replace('\n', " ");
        match bytes.split_first() {
            Some((b'c', rest)) => CreateError::CommandNotFound(text(rest)),
            Some((b'x', rest)) => CreateError::NotExecutable(text(rest)),
            Some((b's', rest)) => CreateError::InvalidSpec(text(rest)),
            Some((b'r', rest)) => CreateError::NotRunning(text(rest)),
            Some((b'o', rest)) => CreateError::Other(text(rest)),
            _ => CreateError::Other("the new process reported an error that cannot be read".into()),
        }
    }
}

/// Adds "what, on what" in front of a system error.
pub(super) trait Context<T> {
    /// Calls `what` on failure only.
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| CreateError::other(what(), reason(&error.into())))
    }
}

/// Text of a system error, without its "(os error N)".
pub(super) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_lowercase().chain(characters).collect(),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn errors_cross_the_gate() {
        for error in [
            CreateError::CommandNotFound("a".into()),
            CreateError::NotExecutable("b".into()),
            CreateError::InvalidSpec("ü".into()),
            CreateError::NotRunning(String::new()),
            CreateError::Other("e".into()),
        ] {
            assert_eq!(CreateError::decode(&error.encode()), error);
        }
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let error = CreateError::Other("ü".repeat(MESSAGE_LIMIT));
        let bytes = error.encode();
        assert!(bytes.len() <= MESSAGE_LIMIT + 1);
        std::str::from_utf8(&bytes[1..]).unwrap();
    }

    #[test]
    fn garbage_is_an_error_too() {
        assert!(matches!(CreateError::decode(b""), CreateError::Other(_)));
        assert!(matches!(CreateError::decode(b"?x"), CreateError::Other(_)));
    }

    #[test]
    fn reasons_are_for_people() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(reason(&error), "no such file or directory");
    }
}
