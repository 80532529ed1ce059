//! Takes a container out of its sandbox, whether or not that lives.

use std::time::{Duration, Instant};

use super::client::Client;
use super::protocol::{Reply, Request};
use crate::error::{ErrorKind, Result};
use crate::events::{Event, EventKind, EventLog};
use crate::store::SandboxPath;

/// How long a sandbox may take to end a container before it is ended itself.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a process that was killed may take to let go of what it holds.
const DEATH_TIMEOUT: Duration = Duration::from_secs(5);

/// Ends a container and has its sandbox forget it: by asking, else by ending the sandbox. Returns
/// when nothing of the container is left but its directory, which is the caller's to remove.
///
/// # Errors
/// The sandbox cannot be ended, or what it left cannot be removed.
pub fn remove(sandbox: &SandboxPath, container: &str) -> Result<()> {
    let asked = Client::open(sandbox).and_then(|client| {
        let Some(client) = client else {
            return Ok(None);
        };
        client.set_timeout(REMOVE_TIMEOUT)?;
        let request = Request::Delete {
            container: container.to_owned(),
        };
        Ok(Some(client.ask(&request, &[])?.message))
    });
    let told = match asked {
        // The sandbox ends with it.
        Ok(Some(Reply::Ending)) => {
            sandbox.wait_for_end()?;
            true
        }
        Ok(Some(_)) => true,
        // One that was killed does not listen any more before it has let go of its lock.
        Ok(None) => {
            let begin = Instant::now();
            while sandbox.is_alive() && begin.elapsed() < DEATH_TIMEOUT {
                std::thread::sleep(Duration::from_millis(5));
            }
            false
        }
        Err(error) if error.kind == ErrorKind::NotFound => false,
        Err(error) => {
            tracing::debug!("{error}");
            sandbox.kill()?;
            sandbox.wait_for_end()?;
            false
        }
    };
    sandbox.sweep()?;
    if let Some(log) = EventLog::of(sandbox)
        && !told
    {
        let container = container.to_owned();
        let event = Event::now(&sandbox.id, EventKind::Deleted { container });
        if let Err(error) = log.append(&event) {
            tracing::debug!("cannot log an event: {error}");
        }
    }
    Ok(())
}
