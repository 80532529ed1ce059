//! The layer of a hostile image: tar with pax and GNU extensions, unpacked above a lower layer.
//!
//! Looks for panics, for changes outside the layer's directory, and for a layer that has more files
//! or bytes than its archive pays for.
#![no_main]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};

use hull_fuzz::tar::{fresh, seal, state, tree};
use hull_image::fuzzing::unpack_layer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let place = fresh("layer");
    let (root, lower, outside) = (
        place.join("root"),
        place.join("lower"),
        place.join("outside"),
    );
    for directory in [&root, &lower, &outside, &lower.join("d")] {
        fs::create_dir(directory).expect("a directory");
    }
    fs::write(outside.join("a"), b"untouched").expect("a file");
    fs::write(lower.join("d/a"), b"below").expect("a file");
    symlink(&outside, lower.join("out")).expect("a link");
    symlink("../../outside", lower.join("d/up")).expect("a link");
    let before = [state(&lower), state(&outside)];

    let mut archive = data.to_vec();
    seal(&mut archive);
    let open = |path| OwnedFd::from(File::open(path).expect("a directory"));
    let unpacked = unpack_layer(&archive[..], open(&root), &[open(&lower)]);

    assert_eq!([state(&lower), state(&outside)], before);
    let names = fs::read_dir(&place).expect("the place");
    assert_eq!(names.count(), 3, "something appeared beside the layer");
    let files = tree(&root);
    assert!(files.len() <= 4 * data.len(), "more files than names");
    let blocks: u64 = files.iter().map(|(_, metadata)| metadata.blocks()).sum();
    // Directories of tmpfs have no blocks; the last page of a file is a whole one.
    let most = data.len() as u64 + 8192 * files.len() as u64;
    assert!(blocks * 512 <= most, "more bytes than the archive has");
    if let Ok(unpacked) = unpacked {
        assert!(unpacked.bytes <= 1 << 50 && unpacked.entries <= data.len() as u64 / 512);
    }
});
