//! Errors are those of the sandbox library; images have their own, which become these here.

pub use hull_sandbox::error::{Context, Error, ErrorKind, Result};

/// An error of the image store or a registry, with its hint.
pub fn of_image(error: hull_image::Error) -> Error {
    let hint = error.hint();
    Error::hinted(&error, hint)
}
