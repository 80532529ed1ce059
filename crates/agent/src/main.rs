//! The agent: PID 1 of every guest of hull. It prepares the guest, dials the host, and does on that connection what
//! `agent.proto` says: creates containers, connects their streams, tells how they end.
//!
//! Started by the guest's kernel as `/init`, alone in its initramfs. Never run on a host. It has one thread, so that
//! `container` can clone processes straight from it; nothing here may start another one.
//!
//! When the host closes the connection, the guest is over. When the agent cannot go on, it says so on the console and
//! powers the machine off; when it panics, the kernel does so too. The host sees either.

#![cfg_attr(not(test), no_main)]

mod bpf;
mod configure;
mod container;
mod container_init;
mod copy;
mod disks;
mod events;
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

use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use hull_protocol::{AGENT_PORT, HOST_CID};
use tokio::sync::Notify;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::io::streams::Streams;
use crate::io::vsock::{self, Connection};
use crate::processes::reaper::Reaper;
use crate::rpc::service::{self, Service};

/// Where the C library enters. Rust's own `main` would first look after standard streams, signals and the stack:
/// fifteen system calls that PID 1 of a guest has no use for.
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
    // Dialled before anything else: the host learns that the guest is there while the guest sets itself up. What
    // the host sends meanwhile waits in the socket.
    let home = vsock::dial(HOST_CID, AGENT_PORT);
    match init::set_up().and(home).and_then(run) {
        Ok(()) => log::info!("the host has closed the connection"),
        Err(error) => log::critical!("{error}"),
    }
    init::power_off();
}

/// Everything after the setting up.
fn run(home: OwnedFd) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // Room for events is touched when it is made.
        .max_io_events_per_tick(64)
        .build()?;
    runtime.block_on(serve(home))
}

/// The one connection that there ever is, for ttrpc, which expects many.
struct Once(Option<Connection>);

impl Stream for Once {
    type Item = std::io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.take().map(Ok))
    }
}

/// Serves until the connection ends.
async fn serve(home: OwnedFd) -> std::io::Result<()> {
    let ended = Arc::new(Notify::new());
    let connection = Connection::new(home, ended.clone())?;
    let reaper = Reaper::default();
    let reaping = reaper.start()?;
    let streams = Streams::listen()?;
    let established = connection.established().await;
    established
        .map_err(|error| std::io::Error::other(format!("cannot reach the host: {error}")))?;

    let mut server = Server::new()
        .add_listener(Listener::new(Once(Some(connection))))
        .register_service(service::methods(Service::new(streams, reaper)));
    server.start().await.map_err(std::io::Error::other)?;
    tokio::select! {
        () = reaping => {}
        () = ended.notified() => {}
    }
    Ok(())
}
