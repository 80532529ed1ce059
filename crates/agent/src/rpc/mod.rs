//! What the host calls: the methods of `agent.proto`, what they work on, and how they fail.

pub mod calls;
pub mod connection;
pub mod registry;
pub mod service;
pub mod status;

#[cfg(test)]
mod tests;
