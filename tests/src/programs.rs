//! C programs that run in containers: built once, statically linked.

use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use crate::{Invocation, repository};

/// Builds a source file of this repository's `tests`; returns the program's path.
pub(crate) fn built(name: &str, source: &str) -> PathBuf {
    let directory = repository().join("target/e2e");
    std::fs::create_dir_all(&directory).unwrap();
    let lock = std::fs::File::create(directory.join(format!("{name}.lock"))).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let program = directory.join(name);
    let source = repository().join("tests").join(source);
    let modified = |path: &PathBuf| {
        std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    if modified(&program) <= modified(&source) {
        Invocation::new("cc")
            .args(["-static", "-O1", "-w", "-pthread", "-o"])
            .args([&program, &source])
            .run()
            .ok();
    }
    program
}

/// Checks that its vector registers keep their values (`tests/processor/registers.c`).
pub fn registers_program() -> PathBuf {
    built("registers", "processor/registers.c")
}

/// Requests or replies in POSIX shared memory (`tests/memory/shared.c`).
pub fn shared_memory_program() -> PathBuf {
    built("shared-memory", "memory/shared.c")
}

/// Prints what inotify(7) tells of files (`tests/files/watch.c`).
pub fn watch_program() -> PathBuf {
    built("watch", "files/watch.c")
}

/// Connects to unix sockets (`tests/files/unix-client.c`).
pub fn unix_client_program() -> PathBuf {
    built("unix-client", "files/unix-client.c")
}

/// TCP echo server (`tests/network/tcp-echo.c`).
pub fn tcp_echo_program() -> PathBuf {
    built("tcp-echo", "network/tcp-echo.c")
}

/// TCP echo server for many concurrent connections (`tests/network/many-echo.c`).
pub fn many_echo_program() -> PathBuf {
    built("many-echo", "network/many-echo.c")
}

/// UDP echo server (`tests/network/udp-echo.c`).
pub fn udp_echo_program() -> PathBuf {
    built("udp-echo", "network/udp-echo.c")
}

/// Runs a command as on a host before Linux 6.3 (`tests/host/before-6.3.c`).
pub fn older_host_program() -> PathBuf {
    built("before-6.3", "host/before-6.3.c")
}
