//! The POSIX file-system checks of `tests/posix/checks.c`: built once, static, for the host and for a container.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use crate::{Invocation, repository};

/// The built program.
pub fn program() -> PathBuf {
    let directory = repository().join("target/e2e");
    std::fs::create_dir_all(&directory).unwrap();
    let lock = std::fs::File::create(directory.join("posix.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let program = directory.join("posix-checks");
    let source = repository().join("tests/posix/checks.c");
    let modified = |path: &PathBuf| {
        std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    if modified(&program) <= modified(&source) {
        Invocation::new("cc")
            .args(["-static", "-O1", "-w", "-o"])
            .args([&program, &source])
            .run()
            .ok();
    }
    program
}

/// Name of each check → what happened.
pub fn posix_results(output: &str) -> BTreeMap<String, String> {
    output
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, result)| (name.to_owned(), result.to_owned()))
        .collect()
}
