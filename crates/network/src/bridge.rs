//! Takes away what a network of hull's own has on the host: its bridge, and what is there for that
//! in the packet filter. Nothing of it belongs to a container.

use futures_util::TryStreamExt;

use crate::error::{Error, Result};
use crate::{forwarding, nftables};

/// Removes the bridge and the rules of a network, in the namespace of the calling thread. What is
/// not there is fine.
///
/// # Errors
/// The kernel refuses.
pub fn remove(network: &str, bridge: &str) -> Result<()> {
    let failed = |why| Error::Remove {
        network: network.to_owned(),
        why,
    };
    nftables::forget(network).map_err(failed)?;
    forwarding::remove(bridge);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime.block_on(remove_link(bridge)).map_err(failed)
}

async fn remove_link(name: &str) -> std::io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let serving = tokio::spawn(connection);
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    let removed = match found.try_next().await {
        Ok(Some(link)) => handle.link().del(link.header.index).execute().await,
        // There is none.
        Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => Ok(()),
        Err(error) => Err(error),
    };
    serving.abort();
    removed.map_err(std::io::Error::other)
}
