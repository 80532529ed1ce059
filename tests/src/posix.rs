//! The POSIX file-system checks of `tests/posix/checks.c`: built once, statically linked, for the
//! host and for containers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::programs::built;

/// The built program.
pub fn program() -> PathBuf {
    built("posix-checks", "posix/checks.c")
}

/// Result of each check, by name.
pub fn posix_results(output: &str) -> BTreeMap<String, String> {
    output
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, result)| (name.to_owned(), result.to_owned()))
        .collect()
}
