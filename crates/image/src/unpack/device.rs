//! Device nodes that an image may contain.
//!
//! Called by the writer. A node in a layer directory is a real device node of the host, which the
//! file system device might be tricked into opening, so only harmless ones are created.

/// Character devices that distributions include in the `/dev` of images: (major, first minor, last
/// minor, names).
const HARMLESS: &[(u32, u32, u32, &str)] = &[
    (1, 3, 3, "null"),
    (1, 5, 5, "zero"),
    (1, 7, 7, "full"),
    (1, 8, 9, "random, urandom"),
    (4, 0, 255, "tty0 to tty63, ttyS0 to ttyS191"),
    (5, 0, 2, "tty, console, ptmx"),
    (10, 200, 200, "net/tun"),
    (10, 229, 229, "fuse"),
];

/// Whether a character device may be created.
pub(super) fn is_harmless(major: u32, minor: u32) -> bool {
    HARMLESS
        .iter()
        .any(|&(known, first, last, _)| known == major && (first..=last).contains(&minor))
}

#[cfg(test)]
mod tests {
    use super::is_harmless;

    #[test]
    fn memory_and_disks_are_not_harmless() {
        for (major, minor) in [(1, 3), (1, 9), (5, 2), (4, 64), (10, 229)] {
            assert!(is_harmless(major, minor), "{major}:{minor}");
        }
        for (major, minor) in [
            (1, 1),
            (1, 2),
            (1, 4),
            (1, 11),
            (8, 0),
            (10, 232),
            (5, 3),
            (0, 0),
        ] {
            assert!(!is_harmless(major, minor), "{major}:{minor}");
        }
    }
}
