//! The agent: PID 1 of every guest of hull. It prepares the guest, dials the host, and serves the
//! calls of `agent.proto` on that connection: creates containers, connects their streams, reports
//! how they end.
//!
//! Started by the guest's kernel as `/init`, alone in its initramfs. Never run on a host. It has
//! one thread, so that `container` can clone processes straight from it; nothing here may start
//! another one.
//!
//! When its connection ends, it dials again, and containers do not notice. It powers the machine
//! off when the host asks for it, when no host answers for long, and when it cannot go on, which it
//! reports on the console; when it panics, the kernel ends the machine. The host sees each of
//! these.

#![cfg_attr(not(test), no_main)]

mod bpf;
mod configure;
mod container;
mod container_init;
mod copy;
mod disks;
mod events;
mod given_files;
mod hardening;
mod host_sockets;
mod hotplug;
mod init;
mod io;
mod log;
mod loopback;
mod metrics;
mod network;
mod processes;
mod rpc;
mod shared_memory;
mod time;
mod tmpfs;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_protocol::{AGENT_PORT, HOST_CID};

use crate::io::streams::Streams;
use crate::io::vsock;
use crate::processes::reaper::Reaper;
use crate::rpc::connection;
use crate::rpc::service::Service;

/// Where the C library enters. Rust's own `main` would first look after standard streams, signals
/// and the stack: fifteen system calls that PID 1 of a guest has no use for.
#[cfg(not(test))]
#[allow(unsafe_code)] // The name is the C library's, and nothing else has it.
#[unsafe(no_mangle)]
extern "C" fn main(_count: libc::c_int, _arguments: *const *const libc::c_char) -> libc::c_int {
    start();
    0
}

#[cfg(test)]
fn main() {
    start();
}

fn start() {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if std::path::Path::new(&name).file_name() == Some(container_init::NAME.as_ref()) {
        std::process::exit(container_init::run(arguments));
    }
    if std::process::id() != 1 {
        eprintln!(
            "error: hull-agent is the first process of hull's guests and does nothing anywhere else"
        );
        std::process::exit(1);
    }
    std::panic::set_hook(Box::new(|panic| {
        log::critical!("{panic}");
        std::process::exit(101);
    }));
    // Dialled before anything else: the host learns that the guest is up while the guest sets
    // itself up. What the host sends meanwhile waits in the socket.
    let home = dial();
    if let Err(error) = init::set_up().and(home).and_then(run) {
        log::critical!("{error}");
    }
    init::power_off();
}

/// Starts connecting to the host.
fn dial() -> std::io::Result<OwnedFd> {
    vsock::dial(HOST_CID, AGENT_PORT)
}

/// Serves the host until none answers any more.
fn run(home: OwnedFd) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // Memory for events is touched when it is allocated.
        .max_io_events_per_tick(64)
        .build()?;
    runtime.block_on(serve(home))
}

async fn serve(home: OwnedFd) -> std::io::Result<()> {
    let reaper = Reaper::default();
    let reaping = reaper.start()?;
    let streams = Arc::new(Streams::listen()?);
    let service = Service::new(streams.clone(), reaper);
    tokio::select! {
        () = reaping => Ok(()),
        ended = connection::serve(service, &streams, home, dial) => match ended? {},
    }
}
