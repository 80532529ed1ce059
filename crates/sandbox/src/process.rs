//! One process of a container, as those hold it who stand for it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::TerminalSize;
use crate::container::Container;
use crate::error::{ErrorKind, Result};
use crate::guest::hub;
use crate::store::Exit;

/// Exit status of a process that ended with its container: SIGKILL's.
const KILLED: i32 = 128 + 9;

/// A process of a container: its init, or a further one.
#[derive(Debug)]
pub struct Process {
    container: Arc<Container>,
    /// Empty: the init.
    exec: String,
    streams: Vec<OwnedFd>,
    /// Second descriptors of the output streams of a process that goes on without who reads it.
    orphans: Vec<OwnedFd>,
    terminal: bool,
}

impl Process {
    pub(crate) fn init(container: Arc<Container>, streams: Vec<OwnedFd>) -> Self {
        let terminal = container.has_terminal();
        Self {
            container,
            exec: String::new(),
            streams,
            orphans: Vec::new(),
            terminal,
        }
    }

    pub(crate) fn exec(
        container: Arc<Container>,
        exec: String,
        streams: Vec<OwnedFd>,
        terminal: bool,
    ) -> Self {
        Self {
            container,
            exec,
            streams,
            orphans: Vec::new(),
            terminal,
        }
    }

    /// Its container.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// Whether it is the container's init.
    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }

    /// Its name: empty for the init.
    pub fn name(&self) -> &str {
        &self.exec
    }

    /// Its streams, once: a terminal, or standard input (if it has one), output and error.
    pub fn take_streams(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.streams)
    }

    /// Keeps a second descriptor of each stream, so that the process can go on when who has the
    /// first ones goes away: see [`Process::abandon`].
    pub(crate) fn keep_streams(&mut self) {
        self.orphans = self
            .streams
            .iter()
            .filter_map(|stream| stream.try_clone().ok())
            .collect();
    }

    /// Its reader has gone: its input ends, its output is read and discarded.
    pub(crate) fn abandon(&mut self) {
        for stream in self.orphans.drain(..) {
            // One that was closed by the guest has no direction left to close.
            let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Write);
            tokio::spawn(hub::discard(stream));
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended, or the guest is not there.
    pub async fn signal(&self, signal: u32) -> Result<()> {
        self.send_signal(signal, false).await
    }

    /// Kills it; an init with all processes of its container.
    ///
    /// # Errors
    /// It has ended, or the guest is not there.
    pub async fn kill(&self) -> Result<()> {
        const SIGKILL: u32 = 9;
        self.send_signal(SIGKILL, self.is_init()).await
    }

    async fn send_signal(&self, signal: u32, all: bool) -> Result<()> {
        let (id, exec) = (self.container.id(), &self.exec);
        self.container.sandbox().signal(id, exec, signal, all).await
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has none, or has ended.
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        let (id, exec) = (self.container.id(), &self.exec);
        self.container
            .sandbox()
            .in_guest(async |guest| guest.agent.resize(id, exec, size).await)
            .await
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// Waits for its end; for an init, until nothing of its container is left.
    pub async fn wait(&self) -> Exit {
        if self.is_init() {
            return self.container.ended().await;
        }
        let sandbox = self.container.sandbox();
        let ended = async {
            match sandbox.ready().await {
                Ok(ready) => ready.agent.wait(self.container.id(), &self.exec).await,
                Err(error) => Err(error),
            }
        };
        let exit = tokio::select! {
            biased;
            ended = ended => match ended {
                Ok(exit) => exit,
                // The container has ended, and everything in it.
                Err(error) if error.kind == ErrorKind::NotFound => Exit::now(KILLED),
                Err(error) => sandbox.exit_without_answer(error).await,
            },
            down = sandbox.down() => Exit::because(down.status, down.reason),
        };
        self.container.forget_exec(&self.exec);
        self.container.emit_exit(&self.exec, &exit);
        exit
    }
}
