//! The loopback interface of an engine's network namespace, and that of the guest: each kernel has
//! its own, and what an engine has on the one is expected on the other. Two relays, for pods,
//! because nobody but engines enters a container's namespace; and the first for published ports
//! without root, which come there when the host itself asks:
//!
//! | module | from | to |
//! | --- | --- | --- |
//! | `forward` | connections made in the namespace to its own addresses: port-forward, probes, rootlesskit | the port in the guest |
//! | `resolver` | questions asked in the guest of 127.0.0.11 | Docker's name server in the namespace |
//!
//! Called by `network`. Everything that comes from the guest is passed on as it is, bounded in
//! size, number and time; nothing is read of it but the heads of messages.

mod forward;
mod resolver;

pub use forward::Forwarder;

/// Serves a guest's questions by a name server in the namespace, for the fuzz targets.
#[cfg(fuzzing)]
pub async fn relay_names(
    namespace: hull_network::Namespace,
    questions: impl tokio::io::AsyncRead + Unpin,
    answers: impl tokio::io::AsyncWrite + Unpin + Send + 'static,
) -> std::io::Result<()> {
    resolver::serve(NameServer::Docker(namespace), questions, answers).await
}
pub use resolver::{NameServer, Resolver, bring};
