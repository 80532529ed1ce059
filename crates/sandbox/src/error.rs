//! The error of the host's front ends and of this crate: a kind that programs act on, one line for
//! people, and what to do about it. It crosses the control protocol as it is.
//!
//! Nothing decides by the text of a message: text may come from a guest, and it changes. What a
//! front end ends with (Docker's, runc's or gRPC's codes) is a table over [`ErrorKind`] in that
//! front end.

use serde::{Deserialize, Serialize};

/// What kind of failure an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// There is no such container, sandbox, process or image.
    NotFound,
    /// The name or id is taken.
    Exists,
    /// The container or sandbox is in another state than the call needs.
    WrongState,
    /// The caller asked for something that makes no sense.
    InvalidArgument,
    /// The request makes sense and cannot be carried out by this hull, host or guest.
    Unsupported,
    /// The command to execute does not exist in the container.
    CommandNotFound,
    /// The command to execute is there and cannot be executed.
    NotExecutable,
    /// The guest did not come up, broke down or does not answer.
    GuestFailed,
    /// The sandbox process has ended.
    Gone,
    /// The host refused something, or an error of any other kind. Also what a newer hull calls by a
    /// name that this one does not know.
    #[serde(other)]
    Host,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// For programs.
    #[serde(default = "host")]
    pub kind: ErrorKind,
    /// What failed, on what, why. One line.
    pub message: String,
    /// What to do about it. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The last lines of the guest's console, when the guest did not come up or broke down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<String>,
}

fn host() -> ErrorKind {
    ErrorKind::Host
}

/// Result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of kind [`ErrorKind::Host`].
    pub fn new(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::Host, message)
    }

    /// An error of a given kind.
    pub fn with_kind(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            console: Vec::new(),
        }
    }

    /// [`ErrorKind::Unsupported`]; the message begins with "not supported: ".
    pub fn unsupported(what: impl std::fmt::Display) -> Self {
        Self::with_kind(ErrorKind::Unsupported, format!("not supported: {what}"))
    }

    /// [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::WrongState`].
    pub fn wrong_state(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::WrongState, message)
    }

    /// [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::InvalidArgument, message)
    }

    /// [`ErrorKind::Exists`].
    pub fn exists(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::Exists, message)
    }

    /// [`ErrorKind::GuestFailed`].
    pub fn guest(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::GuestFailed, message)
    }

    /// Of another library's error, with all its causes, each said once.
    pub fn from_chain(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut message = error.to_string();
        let mut full = is_full(error);
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            full |= is_full(cause);
            source = cause.source();
        }
        let error = Self::new(message);
        match full {
            // The one cause that people mend without asking what hull was doing.
            true => error.hint("df -h; hull image prune"),
            false => error,
        }
    }

    /// The same with a hint, if there is one.
    pub fn hinted(
        error: &(dyn std::error::Error + 'static),
        hint: Option<impl Into<String>>,
    ) -> Self {
        let own = Self::from_chain(error);
        match hint {
            Some(hint) => own.hint(hint),
            None => own,
        }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the kind.
    #[must_use]
    pub fn kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Says before the message what was being done.
    #[must_use]
    pub fn while_doing(mut self, doing: impl std::fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// Adds the tail of the guest's console.
    #[must_use]
    pub fn console(mut self, lines: Vec<String>) -> Self {
        self.console = lines;
        self
    }
}

fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
        || error.downcast_ref::<rustix::io::Errno>() == Some(&rustix::io::Errno::NOSPC)
}

impl From<hull_device_control::Error> for Error {
    fn from(error: hull_device_control::Error) -> Self {
        let kind = match &error {
            hull_device_control::Error::Gone { .. }
            | hull_device_control::Error::TimedOut { .. } => ErrorKind::GuestFailed,
            hull_device_control::Error::Refused { .. }
            | hull_device_control::Error::Host { .. } => ErrorKind::Host,
        };
        Self::from_chain(&error).kind(kind)
    }
}

impl From<hull_network::Error> for Error {
    fn from(error: hull_network::Error) -> Self {
        Self::hinted(&error, error.hint())
    }
}

impl From<hull_network::cni::Error> for Error {
    fn from(error: hull_network::cni::Error) -> Self {
        Self::hinted(&error, error.hint())
    }
}

impl From<hull_jail::Error> for Error {
    fn from(error: hull_jail::Error) -> Self {
        Self::hinted(&error, error.hint())
    }
}

impl From<hull_machine::Error> for Error {
    fn from(error: hull_machine::Error) -> Self {
        Self::hinted(&error, error.hint())
    }
}

/// Turns any error into an [`Error`] that says what was being done.
pub trait Context<T> {
    /// `doing` completes "cannot …".
    fn context<D: std::fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: std::error::Error + 'static> Context<T> for std::result::Result<T, E> {
    fn context<D: std::fmt::Display>(self, doing: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| {
            let mut own = Error::from_chain(&error);
            own.message = format!("cannot {}: {}", doing(), own.message);
            own
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let error = std::fs::read("/nonexistent/file")
            .context(|| "read /nonexistent/file")
            .unwrap_err();
        assert_eq!(
            error.message,
            "cannot read /nonexistent/file: No such file or directory (os error 2)"
        );
        assert_eq!(error.kind, ErrorKind::Host);
    }

    #[test]
    fn a_full_disk_has_a_hint() {
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Err::<(), _>(full).context(|| "write x").unwrap_err();
        assert!(error.hint.unwrap().contains("df"));
        let error = Err::<(), _>(rustix::io::Errno::NOSPC).context(|| "write x");
        assert!(error.unwrap_err().hint.is_some());
    }

    #[test]
    fn kinds_of_a_newer_hull_are_read() {
        let text = r#"{"kind":"out_of_tea","message":"m","more":1}"#;
        let error: Error = serde_json::from_str(text).unwrap();
        assert_eq!((error.kind, &*error.message), (ErrorKind::Host, "m"));
        let text = serde_json::to_string(&Error::not_found("x")).unwrap();
        assert_eq!(text, r#"{"kind":"not_found","message":"x"}"#);
    }
}
