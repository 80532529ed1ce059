//! Processes of the guest: those that the agent starts, how all of them end, and which ones a
//! container has.

pub mod list;
pub mod oom;
pub mod process;
pub mod reaper;
