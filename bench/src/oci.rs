//! The OCI runtime's command line, as called by engines.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::contestants::{Contestant, Root, Setup};
use crate::memory::proportional;
use crate::report::{Better, Results};
use crate::{Options, all};

/// `create`, `start` and `delete`, and the memory of a container's keeper.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let name = "oci: create, start, delete";
    results.row(name, "ms", Better::Lower);
    for round in 0..=options.rounds(30) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > options.rounds(6) {
                continue;
            }
            let bundle = setup.bundle(Root::Busybox, &["true"], None)?;
            let id = setup.unique();
            let begin = Instant::now();
            start(setup, contestant, &bundle, &id)?;
            call(setup.oci(contestant).args(["delete", "--force", &id]))?;
            if round > 0 {
                results.add(name, contestant, begin.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    keeper(setup, results)
}

fn keeper(setup: &Setup, results: &mut Results) -> Result<()> {
    let name = "oci: keeper of an idle container";
    results.row(name, "MB", Better::Lower);
    for contestant in all(setup) {
        if contestant == Contestant::Runc {
            continue;
        }
        let bundle = setup.bundle(Root::Busybox, &["sleep", "1000"], None)?;
        let id = setup.unique();
        start(setup, contestant, &bundle, &id)?;
        let output = setup
            .oci(contestant)
            .args(["state", &id])
            .stdout(Stdio::piped())
            .output()?;
        let state: Value = serde_json::from_slice(&output.stdout)?;
        let pid = state["pid"].as_i64().context("a state has a pid")?;
        results.add(name, contestant, proportional(pid)?);
        call(setup.oci(contestant).args(["delete", "--force", &id]))?;
        if !output.status.success() {
            bail!("{}: state: {}", contestant.name(), output.status);
        }
    }
    Ok(())
}

/// `create` and `start`.
fn start(setup: &Setup, contestant: Contestant, bundle: &Path, id: &str) -> Result<()> {
    let mut create = setup.oci(contestant);
    call(create.args(["create", "-b"]).arg(bundle).arg(id))?;
    call(setup.oci(contestant).args(["start", id]))
}

/// Runs a command that must succeed. Without a pipe for errors: the container would inherit it and
/// keep it open.
pub fn call(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
