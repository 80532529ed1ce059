//! What hull keeps of containers and sandboxes on the host's disk.
//!
//! ```text
//! RUN/sandboxes/<id>/     what lives: gone with the sandbox, and after a reboot
//!     lock                held (flock) by the sandbox process; its process id
//!     control.sock        the control protocol
//!     console             ring buffer of the guest's console
//!     sandbox.log         messages of the sandbox's host processes
//!     devices/, mounts/   sockets and mount points of the sandbox's own
//! RUN/keepers/<pid>       which sandbox a keeper belongs to
//! RUN/roots/<path>        where engines keep containers
//! RUN/events              what has happened on this host: module `events`
//! ROOT/<container>/       what there is; ROOT is DATA/containers or an engine's `--root`
//!     config.json         the OCI configuration, in the front end's words
//!     record.json         what is known from its creation on, by the front end
//!     status.json         how far it is, by the sandbox
//!     console, sandbox.log  copies of the sandbox's, when its guest broke down
//! ```
//!
//! A status that says "running" while nobody holds the sandbox's lock reads as stopped. Every file
//! is written by rename, by one writer, and has a version: an older one is read, a newer one is a
//! named error.

mod directory;
pub mod keepers;
mod process;
mod record;
pub mod roots;
pub mod sandbox_dir;
mod status;
pub(crate) mod versioned;

pub use directory::{Directory, remove_all};
pub use process::ProcessId;
pub(crate) use process::ProcessStat;
pub use record::{CONFIG_FILE, Record, Stored};
pub use sandbox_dir::{CONSOLE_FILE, MESSAGES_FILE, SandboxDir, SandboxPath};
pub use status::{EXIT_SANDBOX_FAILED, Exit, HostProcesses, State, Status, unix_time_ns};
pub use versioned::read as read_versioned;
