//! CRI-O reads every file of `crio.conf.d` after `crio.conf`, in the order of their names.

use super::RUNTIME;
use super::drop_in::{DropIn, quoted, text};

pub(super) const CRIO: DropIn = DropIn {
    command: "crio",
    path: "etc/crio/crio.conf.d/50-hull.conf",
    main: "etc/crio/crio.conf",
    render,
    runtime: |file| {
        let runtimes = file.get("crio")?.get("runtime")?.get("runtimes")?;
        text(runtimes.get(RUNTIME)?.get("runtime_path")?)
    },
    default: |file| text(file.get("crio")?.get("runtime")?.get("default_runtime")?),
};

fn render(runtime: &str, default: bool) -> String {
    let default = if default {
        format!("[crio.runtime]\ndefault_runtime = {RUNTIME:?}\n\n")
    } else {
        String::new()
    };
    format!(
        "{default}[crio.runtime.runtimes.{RUNTIME}]\nruntime_path = {}\nruntime_type = \"oci\"\n\
         runtime_root = \"/run/hull-oci\"\n",
        quoted(runtime)
    )
}
