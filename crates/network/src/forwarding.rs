//! iptables FORWARD rules for hull's bridges where the policy is DROP, as with Docker and many
//! administrators: accepts everything from such a bridge, and to it answers and connections to
//! published ports. The rules use iptables because an acceptance counts only in the table that
//! would drop otherwise. They are per bridge, not per container, and stay as long as it does:
//!
//! ```text
//! FORWARD → HULL-FORWARD: → HULL-USER
//!                         -i BRIDGE ACCEPT
//!                         -o BRIDGE ctstate RELATED,ESTABLISHED,DNAT ACCEPT
//! ```
//!
//! HULL-USER is the administrator's: created empty, never changed. Plugin `firewall` adds similar
//! rules for each container, with 17 runs of iptables at its start and 7 at its end, but does not
//! admit connections to published ports.

use std::time::Duration;

use crate::cni::process;
use crate::error::{Error, Result};
use crate::nftables;
use crate::redirect::Family;

const CHAIN: &str = "HULL-FORWARD";
const OF_THE_ADMINISTRATOR: &str = "HULL-USER";

/// Timeout of one run of iptables, which waits for concurrent ones.
const PATIENCE: Duration = Duration::from_secs(10);

/// Creates the rules for a bridge, in the namespace of the calling process, unless they exist.
///
/// # Errors
/// `Forward` if iptables is not installed, or fails.
pub fn ensure(bridge: &str, ipv6: bool) -> Result<()> {
    let families = [(Family::V4, ""), (Family::V6, "6")];
    for (family, number) in families.into_iter().take(1 + usize::from(ipv6)) {
        // Rules of iptables-nft show in nf_tables; for those of iptables-legacy it has to be run.
        if are_there(family) {
            continue;
        }
        let failed = |why| Error::Forward {
            bridge: bridge.to_owned(),
            why,
        };
        let (iptables, restore) = (
            format!("ip{number}tables"),
            format!("ip{number}tables-restore"),
        );
        let jump = ["--wait", "5", "-C", "FORWARD", "-j", CHAIN];
        let has_jump = run(&iptables, &jump, "").map_err(failed)?;
        let user = ["--wait", "5", "-S", OF_THE_ADMINISTRATOR];
        let has_user = run(&iptables, &user, "").map_err(failed)?;
        let text = rules(bridge, has_jump.is_ok(), has_user.is_ok());
        run(&restore, &["--noflush", "--wait", "5"], &text)
            .map_err(failed)?
            .map_err(failed)?;
    }
    Ok(())
}

/// Whether nf_tables has the jump to our chain, and the chain's rules.
fn are_there(family: Family) -> bool {
    let rules = |chain| nftables::rules(family, "filter", chain).unwrap_or_default();
    let name = CHAIN.as_bytes();
    let leads_there = |rule: &Vec<u8>| rule.windows(name.len()).any(|bytes| bytes == name);
    rules("FORWARD").iter().any(leads_there) && rules(CHAIN).len() >= 3
}

/// Input of iptables-restore, which applies all of it or nothing.
fn rules(bridge: &str, has_jump: bool, has_user: bool) -> String {
    let mut text = format!("*filter\n:{CHAIN} - [0:0]\n");
    if !has_user {
        text += &format!(":{OF_THE_ADMINISTRATOR} - [0:0]\n");
    }
    text += &format!(
        "-A {CHAIN} -j {OF_THE_ADMINISTRATOR}\n-A {CHAIN} -i {bridge} -j ACCEPT\n\
         -A {CHAIN} -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT\n"
    );
    if !has_jump {
        text += &format!("-I FORWARD -j {CHAIN}\n");
    }
    text + "COMMIT\n"
}

/// Runs iptables. The outer error is that it cannot be run, the inner one that it failed.
fn run(
    program: &str,
    arguments: &[&str],
    input: &str,
) -> std::result::Result<std::result::Result<(), String>, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.exists())
        .ok_or_else(|| format!("{program} is not installed"))?;
    let environment = [("PATH", path.as_os_str())];
    let output = process::run(
        &found,
        arguments,
        &environment,
        input.as_bytes(),
        PATIENCE,
        None,
        None,
    )
    .map_err(|fault| format!("{program}: {fault}"))?;
    Ok(match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said.lines().find(|line| !line.trim().is_empty());
            Err(line.unwrap_or(program).trim().to_owned())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_said_again() {
        let all = rules("hull0", false, false);
        assert!(
            all.contains(":HULL-USER") && all.contains("-I FORWARD"),
            "{all}"
        );
        assert!(
            all.starts_with("*filter\n") && all.ends_with("COMMIT\n"),
            "{all}"
        );
        let some = rules("hull0", true, true);
        assert!(
            !some.contains(":HULL-USER") && !some.contains("FORWARD -j HULL-FORWARD"),
            "{some}"
        );
    }
}
