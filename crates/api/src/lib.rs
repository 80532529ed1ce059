//! Docker's Engine API, over hull's engine: what the docker command line, docker compose,
//! testcontainers and client libraries ask for, on a socket of the host.
//!
//! There is nothing behind it that a command of hull does not do as well: containers, images,
//! volumes and networks are on disk, and what serves the API knows no more of them. It can be
//! started at any time, and ended: containers run on. What is only here are executions that were
//! created and connections that wait for a container to start.
//!
//! Who can open the socket can do what the user can that serves it, as with Docker: access is by
//! the permissions of the socket, and there is no other transport.
//!
//! Called by `hull api`. Never prints.

mod attach;
mod build;
mod busy;
mod call;
mod containers;
mod exec;
mod failure;
mod images;
mod networks;
mod registries;
mod router;
mod server;
mod starts;
mod system;
mod transfer;
mod volumes;
mod windows;

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use hull_engine::Config;
use hull_engine::error::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use self::busy::Busy;
use self::exec::Execs;
use self::starts::Starts;
use self::windows::Windows;

/// What requests share.
#[derive(Debug)]
pub(crate) struct State {
    config: Config,
    version: &'static str,
    execs: Execs,
    starts: Starts,
    windows: Windows,
    busy: Busy,
}

/// The same, for threads of their own.
pub(crate) type Shared = Arc<State>;

/// How long the end of a server waits for what it is asked; some of that never ends.
const LAST_WORK: Duration = Duration::from_secs(1);

/// Serves on a socket until SIGTERM or SIGINT, or until nobody has asked for anything for `idle`.
/// `version` is hull's own. `ready` is called when these signals end it in order.
///
/// # Errors
/// The socket cannot be used.
pub fn serve(
    config: Config,
    version: &'static str,
    listener: UnixListener,
    idle: Option<Duration>,
    ready: impl FnOnce(),
) -> Result<()> {
    let state = Arc::new(State {
        config,
        version,
        execs: Execs::default(),
        starts: Starts::default(),
        windows: Windows::default(),
        busy: Busy::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start a runtime")?;
    let served = runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        ready();
        let last = state.clone();
        let served = tokio::select! {
            served = server::serve(listener, state, idle) => served,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        };
        // What is being created or removed is finished.
        let end = tokio::time::Instant::now() + LAST_WORK;
        while last.busy.is_any() && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        served
    });
    // Threads that follow something do not end by themselves.
    runtime.shutdown_background();
    served.context(|| "serve the API")
}
