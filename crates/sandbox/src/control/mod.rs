//! The control protocol: how other processes reach a sandbox, whichever front end they are.

pub mod client;
pub mod launch;
pub mod protocol;
mod server;

mod remove;

pub use remove::remove;
pub use server::serve;
