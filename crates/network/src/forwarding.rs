//! iptables FORWARD rules for hull's bridges, where the policy may be DROP, as with Docker and many
//! administrators: accepts everything from such a bridge, and to it answers and connections to
//! published ports; nothing goes from one of hull's networks to another, and nothing leaves an
//! internal one. The rules use iptables because an acceptance counts only in the table that would
//! drop otherwise. They are per bridge, not per container, and stay as long as it does:
//!
//! ```text
//! FORWARD → HULL-FORWARD: → HULL-USER
//!                         -o BRIDGE ctstate RELATED,ESTABLISHED,DNAT ACCEPT
//!                         -i BRIDGE -o BRIDGE ACCEPT
//!                         -i BRIDGE -o hull+ DROP
//!                         -i BRIDGE ACCEPT
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

/// All bridges of hull's: what begins so.
const OURS: &str = "hull+";

/// Timeout of one run of iptables, which waits for concurrent ones.
const PATIENCE: Duration = Duration::from_secs(10);

/// The programs of a family.
fn programs(number: &str) -> (String, String) {
    (
        format!("ip{number}tables"),
        format!("ip{number}tables-restore"),
    )
}

const FAMILIES: [(Family, &str); 2] = [(Family::V4, ""), (Family::V6, "6")];

/// Creates the rules for a bridge, in the namespace of the calling process, unless they exist.
///
/// # Errors
/// `Forward` if iptables is not installed, or fails.
pub fn ensure(bridge: &str, ipv6: bool, internal: bool) -> Result<()> {
    for (family, number) in FAMILIES.into_iter().take(1 + usize::from(ipv6)) {
        // Rules of iptables-nft show in nf_tables; for those of iptables-legacy it has to be run.
        if are_there(family, bridge, internal) {
            continue;
        }
        let failed = |why| Error::Forward {
            bridge: bridge.to_owned(),
            why,
        };
        let (iptables, restore) = programs(number);
        let about = |what, chain| run(&iptables, &["--wait", "5", what, chain], "").map_err(failed);
        // A chain that iptables-restore creates is emptied, also if another start has just created
        // it. Here that is a failure, and the chain is there.
        let ours = |chain| match about("-S", chain)? {
            Ok(rules) => Ok(Some(rules)),
            Err(_) => {
                let _ = about("-N", chain)?;
                about("-S", chain).map(std::result::Result::ok)
            }
        };
        let (own, user, forward) = (
            ours(CHAIN)?,
            ours(OF_THE_ADMINISTRATOR)?,
            about("-S", "FORWARD")?.unwrap_or_default(),
        );
        let text = rules(bridge, internal, own.as_deref(), user.is_some(), &forward);
        run(&restore, &["--noflush", "--wait", "5"], &text)
            .map_err(failed)?
            .map_err(failed)?;
    }
    Ok(())
}

/// Removes the rules for a bridge. Without iptables there are none.
pub fn remove(bridge: &str) {
    for (_, number) in FAMILIES {
        let (iptables, restore) = programs(number);
        let Ok(Ok(listed)) = run(&iptables, &["--wait", "5", "-S", CHAIN], "") else {
            continue;
        };
        let text: String = of_bridge(&listed, bridge)
            .map(|rule| format!("{}\n", rule.replacen("-A", "-D", 1)))
            .collect();
        let text = format!("*filter\n{text}COMMIT\n");
        if let Ok(Err(why)) | Err(why) = run(&restore, &["--noflush", "--wait", "5"], &text) {
            tracing::warn!("rules for {bridge} are left in {iptables}: {why}");
        }
    }
}

/// The rules about a bridge among those that iptables lists.
fn of_bridge<'a>(listed: &'a str, bridge: &'a str) -> impl Iterator<Item = &'a str> {
    listed
        .lines()
        .filter(move |line| line.split_whitespace().any(|word| word == bridge))
}

/// How many rules a bridge has.
fn count(internal: bool) -> usize {
    if internal { 3 } else { 4 }
}

/// Whether nf_tables has the jump to our chain, and the chain's rules for the bridge.
fn are_there(family: Family, bridge: &str, internal: bool) -> bool {
    let rules = |chain| nftables::rules(family, "filter", chain).unwrap_or_default();
    let has = |rule: &Vec<u8>, name: &[u8]| rule.windows(name.len()).any(|bytes| bytes == name);
    let name = format!("{bridge}\0").into_bytes();
    let leads_there = |rule: &Vec<u8>| has(rule, CHAIN.as_bytes());
    let of_bridge = |rule: &&Vec<u8>| has(rule, &name);
    rules("FORWARD").iter().any(leads_there)
        && rules(CHAIN).iter().filter(of_bridge).count() >= count(internal)
}

/// Input of iptables-restore, which applies all of it or nothing. `own` is what is in our chain, if
/// there is one.
fn rules(bridge: &str, internal: bool, own: Option<&str>, has_user: bool, forward: &str) -> String {
    let mut text = "*filter\n".to_owned();
    // A chain that is named here is emptied.
    if own.is_none() {
        text += &format!(":{CHAIN} - [0:0]\n");
    }
    if !has_user {
        text += &format!(":{OF_THE_ADMINISTRATOR} - [0:0]\n");
    }
    let own = own.unwrap_or_default();
    let jump = format!("-A {CHAIN} -j {OF_THE_ADMINISTRATOR}");
    if !own.lines().any(|line| line == jump) {
        text += &format!("-I {CHAIN} 1 -j {OF_THE_ADMINISTRATOR}\n");
    }
    // What is half there is made anew.
    for rule in of_bridge(own, bridge) {
        text += &format!("{}\n", rule.replacen("-A", "-D", 1));
    }
    text += &match internal {
        true => format!(
            "-I {CHAIN} 2 -o {bridge} ! -i {bridge} -j DROP\n\
             -I {CHAIN} 2 -i {bridge} ! -o {bridge} -j DROP\n\
             -A {CHAIN} -i {bridge} -j ACCEPT\n"
        ),
        false => format!(
            "-I {CHAIN} 2 -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT\n\
             -A {CHAIN} -i {bridge} -o {bridge} -j ACCEPT\n\
             -A {CHAIN} -i {bridge} -o {OURS} -j DROP\n-A {CHAIN} -i {bridge} -j ACCEPT\n"
        ),
    };
    let jump = format!("-A FORWARD -j {CHAIN}");
    if !forward.lines().any(|line| line == jump) {
        text += &format!("-I FORWARD -j {CHAIN}\n");
    }
    text + "COMMIT\n"
}

/// Runs iptables; what it prints. The outer error is that it cannot be run, the inner one that it
/// failed.
fn run(
    program: &str,
    arguments: &[&str],
    input: &str,
) -> std::result::Result<std::result::Result<String, String>, String> {
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
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
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
        let all = rules("hull0", false, None, false, "-P FORWARD DROP\n");
        assert!(
            all.contains(":HULL-USER") && all.contains("-I FORWARD"),
            "{all}"
        );
        assert!(
            all.starts_with("*filter\n") && all.ends_with("COMMIT\n"),
            "{all}"
        );
        let own =
            "-N HULL-FORWARD\n-A HULL-FORWARD -j HULL-USER\n-A HULL-FORWARD -i hull1 -j ACCEPT\n";
        let some = rules(
            "hull0",
            false,
            Some(own),
            true,
            "-A FORWARD -j HULL-FORWARD\n",
        );
        assert!(
            !some.contains(":HULL") && !some.contains("FORWARD -j HULL-FORWARD"),
            "{some}"
        );
        assert!(
            !some.contains("-j HULL-USER") && !some.contains("hull1"),
            "{some}"
        );
        assert_eq!(some.matches("hull0").count(), 5, "{some}");
        let anew = rules("hull1", true, Some(own), true, "");
        assert!(
            anew.contains("-D HULL-FORWARD -i hull1 -j ACCEPT\n"),
            "{anew}"
        );
    }

    #[test]
    fn rules_of_a_bridge_are_told_from_those_of_others() {
        let listed =
            "-A C -i hull1 -j ACCEPT\n-A C -i hull10 -j ACCEPT\n-A C -o hull1 ! -i hull1 -j DROP\n";
        assert_eq!(of_bridge(listed, "hull1").count(), 2);
        assert_eq!(of_bridge(listed, "hull").count(), 0);
    }
}
