//! The project's documents and packages are correct: pictures, pages, packages.
#![allow(clippy::unwrap_used)]

mod architecture;
mod book;
mod bounds;
mod package;
