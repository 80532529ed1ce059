//! Archives out of the fuzzer's bytes.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const BLOCK: usize = 512;

/// Gives every block that looks like a header the checksum that it should have, which the fuzzer
/// would hardly find.
pub fn seal(archive: &mut [u8]) {
    for header in archive.chunks_exact_mut(BLOCK) {
        if &header[257..262] == b"ustar" {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// A new empty directory in memory of this process and target.
pub fn fresh(target: &str) -> PathBuf {
    let place = PathBuf::from(format!(
        "/dev/shm/hull-fuzz-{target}-{}",
        std::process::id()
    ));
    match fs::remove_dir_all(&place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    fs::create_dir(&place).expect("a directory in /dev/shm");
    place
}

/// Everything below a directory, without following links, in a stable order.
pub fn tree(directory: &Path) -> Vec<(PathBuf, Metadata)> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).expect("a directory");
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("one").path()).collect();
        paths.sort();
        for path in paths {
            let metadata = path.symlink_metadata().expect("its metadata");
            if metadata.is_dir() {
                directories.push(path.clone());
            }
            found.push((path, metadata));
        }
    }
    found
}

/// What of a tree must stay as it was.
pub fn state(directory: &Path) -> Vec<(PathBuf, [u64; 6])> {
    let own = directory.symlink_metadata().expect("its metadata");
    let mut all = tree(directory);
    all.push((directory.to_owned(), own));
    let of = |(path, metadata): (PathBuf, Metadata)| {
        let owner = u64::from(metadata.uid()) << 32 | u64::from(metadata.gid());
        let numbers = [
            u64::from(metadata.mode()),
            owner,
            metadata.ino(),
            metadata.nlink(),
            metadata.size(),
            metadata.mtime_nsec() as u64,
        ];
        (path, numbers)
    };
    all.into_iter().map(of).collect()
}
