//! The archive of a `hull cp` out of a container whose guest is hostile.
//!
//! Looks for panics, for a file elsewhere than at the path that was asked for, for a directory that
//! was there before and is changed, and for set-user-id programs and devices.
#![no_main]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;

use hull_engine::copy::{ArchiveReader, unpack};
use hull_fuzz::tar::{fresh, seal, state, tree};
use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::{Reply, pair, send};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [choice, archive @ ..] = data else { return };
    let place = fresh("cp");
    let home = place.join("home");
    let kept = home.join("kept");
    fs::create_dir_all(&kept).expect("a directory");
    fs::set_permissions(&kept, fs::Permissions::from_mode(0o750)).expect("its mode");
    fs::write(home.join("file"), b"untouched").expect("a file");
    symlink("/proc", kept.join("out")).expect("a link");
    let target = match choice & 1 {
        0 => kept.clone(),
        _ => home.join("new"),
    };
    let beside = || -> Vec<_> {
        let entries = state(&home).into_iter();
        let entries = entries.filter(|(path, _)| *path != home && !path.starts_with(&target));
        entries.collect()
    };
    let before = beside();
    let attributes = || {
        let kept = kept.metadata().expect("it is there");
        (kept.mode(), kept.uid(), kept.gid(), kept.ino())
    };
    let kept_before = attributes();

    let mut archive = archive.to_vec();
    seal(&mut archive);
    let (stream, mut guest) = UnixStream::pair().expect("a socket pair");
    guest.set_nonblocking(true).expect("a non-blocking socket");
    // What does not fit into the socket is not sent: it is the fuzzer's loss.
    let _ = guest.write(&archive);
    drop(guest);
    let (ours, sandbox) = pair().expect("a socket pair");
    send(&sandbox, &Reply::Ok, &[]).expect("room in the socket");
    drop(sandbox);
    let reader = ArchiveReader::of(stream, Client::from(ours));
    let left_out = unpack(reader, &|_| Ok(target.clone()), choice & 2 != 0);

    assert_eq!(beside(), before);
    assert_eq!(attributes(), kept_before);
    if let Ok(left_out) = left_out {
        assert!(left_out.len() <= 64);
    }
    for (path, metadata) in tree(&home) {
        let kind = metadata.file_type();
        assert!(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_fifo());
        assert!(
            kind.is_symlink() || metadata.mode() & 0o6000 == 0,
            "{path:?}"
        );
    }
});
