//! Events of the agent, as events of the sandbox.

use std::time::Duration;

use hull_protocol::agent::event::What;

use super::Agent;
use crate::error::ErrorKind;
use crate::sandbox::Sandbox;

/// Shortest time between two calls: a guest cannot keep the host busy with events.
const PAUSE: Duration = Duration::from_millis(20);

/// Passes on that the guest's kernel killed processes for lack of memory, and that inits have
/// exited, until the guest has ended.
///
/// Exits of processes come with their status from `Wait`, when all that they wrote has been read.
pub async fn follow(sandbox: Sandbox, agent: Agent) {
    let mut after = 0;
    loop {
        let answer = tokio::select! {
            answer = agent.events(after) => answer,
            _ = sandbox.down() => return,
        };
        let events = match answer {
            Ok(answer) => answer.events,
            Err(error) => {
                if error.kind != ErrorKind::GuestFailed {
                    tracing::warn!("no events of the guest: {error}");
                }
                return;
            }
        };
        for event in events {
            after = event.sequence.max(after);
            match event.what {
                Some(What::Oom(oom)) => {
                    if let Ok(container) = sandbox.container(&oom.container_id) {
                        container.oom_killed(oom.total);
                    }
                }
                Some(What::Exit(exit)) if exit.exec_id.is_empty() => {
                    if let Ok(container) = sandbox.container(&exit.container_id) {
                        container.init_has_exited();
                    }
                }
                _ => {}
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
