//! A way through a packet filter that forwards nothing by itself, as Docker's and many administrators' do: whatever comes
//! from a bridge of hull's own may pass, and to it answers, and what published ports lead there. The rules are iptables',
//! because an acceptance counts only in the table that would drop otherwise. They are for the bridge, whatever containers there
//! are, and stay as it does:
//!
//! ```text
//! FORWARD → HULL-FORWARD: -i BRIDGE ACCEPT; -o BRIDGE ctstate RELATED,ESTABLISHED,DNAT ACCEPT
//! ```
//!
//! Plugin `firewall` says something like it for each container, with 17 runs of iptables at its start and 7 at its end, and lets
//! nobody in through published ports.

use std::time::Duration;

use crate::cni::process;
use crate::error::{Error, Result};
use crate::nftables;
use crate::redirect::Family;

const CHAIN: &str = "HULL-FORWARD";

/// How long one run of iptables may take; it waits for others.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the rules for a bridge, in the namespace of the calling process, unless they are there.
///
/// # Errors
/// There is no iptables, or what it says.
pub fn ensure(bridge: &str, ipv6: bool) -> Result<()> {
    let families = [(Family::V4, "iptables"), (Family::V6, "ip6tables")];
    for (family, program) in families.into_iter().take(1 + usize::from(ipv6)) {
        // What iptables says to nf_tables, and not to its predecessor, shows at once.
        if nftables::has_chain(family, "filter", CHAIN) {
            continue;
        }
        let jump = ["FORWARD", "-j", CHAIN];
        if run(program, &[&["-C"], &jump[..]].concat()).is_ok() {
            continue;
        }
        // Another one may be at it, too: a chain that is there is made the same.
        let _ = run(program, &["-N", CHAIN]);
        for rule in [
            &["-F", CHAIN][..],
            &["-A", CHAIN, "-i", bridge, "-j", "ACCEPT"],
            &[
                "-A",
                CHAIN,
                "-o",
                bridge,
                "-m",
                "conntrack",
                "--ctstate",
                "RELATED,ESTABLISHED,DNAT",
                "-j",
                "ACCEPT",
            ],
            &[&["-I"], &jump[..]].concat(),
        ] {
            run(program, rule).map_err(|why| Error::Forward {
                bridge: bridge.to_owned(),
                why,
            })?;
        }
    }
    Ok(())
}

/// One run of iptables.
fn run(program: &str, arguments: &[&str]) -> std::result::Result<(), String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.exists())
        .ok_or_else(|| format!("{program} is not installed"))?;
    let environment = [("PATH", path.as_os_str())];
    let mut all = vec!["--wait", "5"];
    all.extend(arguments);
    let output = process::run(&found, &all, &environment, b"", PATIENCE, None)
        .map_err(|fault| format!("{program}: {fault}"))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said.lines().find(|line| !line.trim().is_empty());
            Err(line.unwrap_or(program).trim().to_owned())
        }
    }
}
