//! `hull`: a module for each task of a user.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod builds;
mod changes;
mod check_config;
mod confinement;
mod cp;
mod crash;
mod documented;
mod exec;
mod formats;
mod guest_kernel;
mod images;
mod images_out;
mod install_engines;
mod journal;
mod kvm;
mod lasting;
mod limits;
mod model;
mod named_volumes;
mod processor;
mod ps_logs;
mod rootless;
mod run;
mod seccomp;
mod sockets;
mod stopped;
mod terminal;
mod volumes;
