//! Support for the end-to-end tests: a private [`Hull`], commands with a time limit, terminals,
//! images, and a registry with faults on demand; the engines [`Podman`] and [`Docker`], which run
//! their containers with hull; [`Containerd`] with its shim; and [`Oci`], which calls the runtime
//! directly with bundles. The tests are in `tests/GROUP/*.rs`, one module per task of a user; a
//! test's name says what that user can rely on.
//!
//! The tests run the staged executable (`make stage`), not code of hull's crates. cargo-nextest
//! runs each test in its own process, which adopts and finds all processes that its containers
//! leave running.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test stops where it goes wrong

mod api;
pub mod cgroup;
mod command;
mod containerd;
pub mod cri;
mod docker;
mod hull;
mod images;
pub mod kubernetes;
mod leaks;
mod loop_device;
mod netns;
pub mod network;
mod oci;
mod person;
mod podman;
mod posix;
mod programs;
mod registry;
mod runtime;
pub mod shim;
mod terminal;

pub use api::Api;
pub use command::{Invocation, Output, Running};
pub use containerd::{BUSYBOX, Containerd};
pub use docker::Docker;
pub use hull::{Container, Hull, Options, busybox_archive};
pub use images::{Archive, Image, Layout, architecture, digest, gzip};
pub use leaks::{adopt_orphans, descendants, leaked_processes};
pub use loop_device::LoopDevice;
pub use netns::{Link, Netns};
pub use oci::{Bundle, Init, Oci, end_of, pid_in};
pub use person::{Lack, Person};
pub use podman::Podman;
pub use posix::{posix_results, program as posix_program};
pub use programs::{
    many_echo_program, older_host_program, registers_program, shared_memory_program,
    tcp_echo_program, udp_echo_program, unix_client_program, watch_program,
};
pub use registry::{Fault, Registry};
pub use runtime::{Runtime, needs};
pub use terminal::{Console, Terminal};

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The repository's root.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the repository")
}

/// The staged executable, or the one set by `HULL`.
pub fn executable() -> PathBuf {
    let path = std::env::var_os("HULL")
        .map_or_else(|| repository().join("target/stage/bin/hull"), PathBuf::from);
    assert!(path.exists(), "{} is not there: make stage", path.display());
    path
}

/// The directory of the guest's files, beside the executable.
pub fn guest_files() -> PathBuf {
    executable()
        .canonicalize()
        .unwrap()
        .parent()
        .and_then(Path::parent)
        .expect("bin/hull")
        .join("share/hull")
}

/// Records, for `make test`, that this machine lacks what a test needs. The caller should then
/// return.
pub fn left_out(reason: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("{name}: {reason}\n");
    eprint!("left out: {line}");
    if let Some(path) = std::env::var_os("HULL_SKIPPED") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("cannot note what is left out");
    }
}

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
            .any(|directory| directory.join(program).exists())
    })
}

/// How many times the usual time everything may take: `HULL_TEST_PATIENCE`, for emulated hosts.
pub fn patience() -> u32 {
    static TIMES: OnceLock<u32> = OnceLock::new();
    *TIMES.get_or_init(|| match std::env::var("HULL_TEST_PATIENCE") {
        Ok(times) => times.parse().expect("HULL_TEST_PATIENCE is a number"),
        Err(_) => 1,
    })
}

/// Waits until `condition` holds; panics with `what` if it does not in time.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    let limit = limit * patience();
    while !condition() {
        assert!(begin.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    begin.elapsed()
}

/// Generates for each of the named functions, which take a machine kind, a test with each kind.
#[macro_export]
macro_rules! on_every_machine {
    ($($name:ident),+ $(,)?) => {
        mod uml {
            $(#[test] fn $name() { super::$name("uml"); })+
        }
        mod qemu {
            $(#[test] fn $name() {
                if let Some(reason) = $crate::no_qemu() {
                    $crate::left_out(&reason);
                    return;
                }
                super::$name("qemu");
            })+
        }
        mod kvm {
            $(#[test] fn $name() {
                if let Some(reason) = $crate::no_kvm() {
                    $crate::left_out(&reason);
                    return;
                }
                super::$name("kvm");
            })+
        }
    };
}

/// The machine kind of tests that do not care: `HULL_TEST_MACHINE`, or user-mode Linux.
pub fn usual_machine() -> &'static str {
    static KIND: OnceLock<String> = OnceLock::new();
    KIND.get_or_init(|| std::env::var("HULL_TEST_MACHINE").unwrap_or_else(|_| "uml".into()))
}

/// Why machine kind kvm cannot be tested here, or `None`.
pub fn no_kvm() -> Option<String> {
    // Where all tests are to use it, it is not asked for each.
    if usual_machine() == "kvm" {
        return None;
    }
    let report = Invocation::new(executable())
        .args(["check", "--json"])
        .run()
        .json();
    let findings = report["findings"].as_array().expect("findings");
    let kvm = findings
        .iter()
        .find(|finding| finding["what"] == "machine kvm")
        .expect("a line about machine kvm");
    (kvm["level"] != "ok").then(|| format!("machine kind kvm: {}", kvm["found"]))
}

/// Why machine kind qemu cannot be tested here, or `None`.
pub fn no_qemu() -> Option<String> {
    let architecture = std::env::consts::ARCH;
    let program = format!("qemu-system-{architecture}");
    let kernel = guest_files().join(format!("kernel-{architecture}"));
    if !installed(&program) {
        Some(format!("{program} is not installed"))
    } else if !kernel.exists() {
        Some(format!("{} is not built: make kernels", kernel.display()))
    } else {
        None
    }
}
