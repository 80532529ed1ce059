//! Errors of the agent as the host sees them: a ttrpc status code and one line. See the head of
//! `agent.proto`.

use std::io;

use ttrpc::{Code, Error};

use crate::container::CreateError;

/// Result of a call.
pub type Result<T> = std::result::Result<T, Failure>;

/// A status code with its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// As in the head of `agent.proto`.
    pub code: Code,
    /// What failed, on what, and why.
    pub message: String,
}

impl Failure {
    /// A failure of any kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// There is no container of this name.
    pub fn no_container(id: &str) -> Self {
        Self::new(Code::NOT_FOUND, format!("container {id:?} does not exist"))
    }

    /// There is no process of this name.
    pub fn no_process(id: &str, exec_id: &str) -> Self {
        Self::new(
            Code::NOT_FOUND,
            format!("process {exec_id:?} of container {id:?} does not exist"),
        )
    }

    /// The container is not in the state that the call needs.
    pub fn wrong_state(id: &str, state: &str, wanted: &str) -> Self {
        Self::new(
            Code::FAILED_PRECONDITION,
            format!("container {id:?} is {state}: cannot {wanted} it"),
        )
    }

    /// The request is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    /// Something else went wrong.
    pub fn internal(what: &str, error: &io::Error) -> Self {
        Self::new(
            Code::INTERNAL,
            format!("cannot {what}: {}", plain_text(error)),
        )
    }
}

/// Text of a system error, without its "(os error N)".
pub fn plain_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((text, rest)) => format!(
            "{text}{}",
            rest.split_once(')').map_or("", |(_, rest)| rest)
        ),
        None => text,
    }
}

impl From<CreateError> for Failure {
    fn from(error: CreateError) -> Self {
        let code = match &error {
            CreateError::CommandNotFound(_) => Code::NOT_FOUND,
            CreateError::NotExecutable(_) => Code::PERMISSION_DENIED,
            CreateError::InvalidSpec(_) => Code::INVALID_ARGUMENT,
            CreateError::NotRunning(_) => Code::FAILED_PRECONDITION,
            CreateError::Other(_) => Code::INTERNAL,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        // The protocol requires one line.
        Error::RpcStatus(ttrpc::get_status(
            failure.code,
            failure.message.replace('\n', " "),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_no_number() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(plain_text(&error), "No such file or directory");
        let error = io::Error::other(format!("/a: {error} there"));
        assert_eq!(plain_text(&error), "/a: No such file or directory there");
    }
}
