//! Errors in Docker's form: a status, and a message in an object.

use hull_engine::error::{Error, ErrorKind};
use hyper::StatusCode;

/// Why a request was not carried out.
#[derive(Debug)]
pub struct Failure {
    pub status: StatusCode,
    pub message: String,
}

/// What a handler returns.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// The request makes no sense.
    pub fn bad(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }

    /// There is no such thing.
    pub fn missing(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            message: message.into(),
        }
    }

    /// It makes sense, and hull does not do it.
    pub fn unsupported(what: impl std::fmt::Display) -> Self {
        Self {
            status: StatusCode::NOT_IMPLEMENTED,
            message: format!("not supported: {what}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error.kind {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Exists | ErrorKind::WrongState => StatusCode::CONFLICT,
            ErrorKind::InvalidArgument => StatusCode::BAD_REQUEST,
            // Docker's for a command that cannot be executed at the start.
            ErrorKind::CommandNotFound | ErrorKind::NotExecutable => StatusCode::BAD_REQUEST,
            ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
            ErrorKind::GuestFailed | ErrorKind::Gone | ErrorKind::Host => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        // By these words the docker command line tells its exit codes 127 and 126.
        let word = match error.kind {
            ErrorKind::CommandNotFound => ": executable file not found",
            ErrorKind::NotExecutable => ": permission denied",
            _ => "",
        };
        let word = match error.message.ends_with(word.trim_start_matches(": ")) {
            true => "",
            false => word,
        };
        let message = match &error.hint {
            Some(hint) => format!("{}{word} ({hint})", error.message),
            None => error.message + word,
        };
        Self { status, message }
    }
}
