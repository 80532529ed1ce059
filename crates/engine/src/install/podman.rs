//! podman and buildah read every file of `containers.conf.d` after `containers.conf`, in the order
//! of their names.

use super::RUNTIME;
use super::drop_in::{DropIn, quoted, text};

pub(super) const PODMAN: DropIn = DropIn {
    command: "podman",
    path: "etc/containers/containers.conf.d/50-hull.conf",
    main: "etc/containers/containers.conf",
    render,
    runtime: |file| {
        let paths = file.get("engine")?.get("runtimes")?.get(RUNTIME)?;
        text(paths.get(0)?)
    },
    default: |file| text(file.get("engine")?.get("runtime")?),
};

fn render(runtime: &str, default: bool) -> String {
    let default = if default {
        format!("[engine]\nruntime = {RUNTIME:?}\n\n")
    } else {
        String::new()
    };
    format!(
        "{default}[engine.runtimes]\n{RUNTIME} = [{}]\n",
        quoted(runtime)
    )
}
