//! What the project says of itself is true: pictures, pages, packages.
#![allow(clippy::unwrap_used)]

mod architecture;
mod book;
mod package;
