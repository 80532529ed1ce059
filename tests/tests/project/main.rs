//! What the project says of itself is true: pictures, pages, packages.

mod architecture;
mod book;
mod package;
