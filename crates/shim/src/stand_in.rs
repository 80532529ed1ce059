//! What stands for a container on the host: a thread of the shim that sleeps in the container's
//! network namespace. Its id is the process id that containerd is told, so that it is a different
//! one for each container and `/proc/PID/ns/net` is what engines and their hooks expect. Killing it
//! kills the shim, and the machine with it.

use std::os::fd::AsFd;
use std::sync::mpsc;

use hull_network::Namespace;
use hull_oci::guest_spec::Network;
use hull_sandbox::{Context, Error, Result};
use rustix::thread::{LinkNameSpaceType, gettid, move_into_link_name_space};

/// The thread does nothing but sleep.
const STACK: usize = 64 << 10;

/// A thread that stands for a container; it ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    /// Its id.
    pub pid: i32,
    /// Its network namespace.
    pub network: Namespace,
    _end: mpsc::Sender<()>,
}

impl StandIn {
    /// Starts one in the network namespace that a container asks for.
    ///
    /// # Errors
    /// The namespace cannot be opened, made or entered; there are too many threads.
    pub fn start(network: &Network) -> Result<Self> {
        Self::enter(match network {
            Network::New => Namespace::new()?,
            Network::Path(path) => Namespace::open(path)?,
        })
    }

    /// One for a further process of the same container.
    ///
    /// # Errors
    /// There are too many threads.
    pub fn another(&self) -> Result<Self> {
        Self::enter(self.network.clone())
    }

    fn enter(network: Namespace) -> Result<Self> {
        let (end, ended) = mpsc::channel::<()>();
        let (answer, answered) = mpsc::sync_channel(1);
        let inside = network.clone();
        std::thread::Builder::new()
            .name("stand-in".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let entered =
                    move_into_link_name_space(inside.as_fd(), Some(LinkNameSpaceType::Network));
                // Who started it waits for this.
                let _ = answer.send(entered.map(|()| gettid().as_raw_nonzero().get()));
                drop(inside);
                // Until the other end is dropped.
                let _ = ended.recv();
            })
            .context(|| "start a thread for the container")?;
        let pid = answered
            .recv()
            .map_err(|_| Error::new("the thread for the container has ended"))?
            .context(|| "enter the container's network namespace")?;
        Ok(Self {
            pid,
            network,
            _end: end,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_container_has_a_process_id_of_its_own_until_it_goes() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root to make network namespaces");
            return;
        }
        let one = StandIn::start(&Network::New).unwrap();
        let path = format!("/proc/{}/ns/net", one.pid);
        let two = StandIn::start(&Network::Path(path.clone().into())).unwrap();
        assert_ne!(one.pid, two.pid);
        assert!(one.network.is_same(&two.network).unwrap());
        assert!(!one.network.is_callers_own().unwrap());
        drop(one);
        let gone = || !std::path::Path::new(&path).exists();
        for _ in 0..500 {
            if gone() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(gone());
    }
}
