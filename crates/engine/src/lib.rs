//! What `hull run` means: from options and an image to a container in a sandbox of its own, and
//! what people do with it afterwards.
//!
//! Containers of hull's own are in `DATA/containers`, each with a directory of its own that
//! survives a reboot; names are links beside them. This crate reads the configuration, writes
//! records, and asks sandboxes through their control protocol; it knows no grammar of a command
//! line and prints nothing but what a container writes. Called by `cli`. It never touches guest
//! memory and reads nothing that a guest wrote, but for archives that are copied out of a
//! container.

pub mod attach;
pub mod build;
pub mod changes;
pub mod config;
pub mod container;
pub mod copy;
pub mod dns;
pub mod endpoint;
pub(crate) mod entries;
pub mod error;
pub mod events;
pub(crate) mod exact;
pub mod exec;
pub mod guest_files;
pub mod health;
pub mod home;
pub mod images;
pub mod info;
pub mod inspect;
pub mod install;
pub mod lifecycle;
pub mod listing;
pub mod log;
pub mod log_options;
pub mod names;
pub mod network;
pub mod networks;
pub mod options;
pub mod paths;
pub mod publish;
pub mod run;
pub mod search;
pub mod spec;
pub mod supervise;
pub mod time;
pub mod top;
pub mod unpacker;
pub mod update;
pub mod usage;
pub mod values;
pub mod volumes;

pub use config::Config;
pub use container::{Container, Details};
pub use paths::Paths;
