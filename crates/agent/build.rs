//! Leaves the unwind tables out of the guest's executable: it aborts on panic, so nothing ever
//! reads them, but they are a tenth of a file that every guest unpacks into its memory.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=guest.ld");
    let set = |name: &str| env::var(name).unwrap_or_default();
    let is_static = set("CARGO_CFG_TARGET_FEATURE")
        .split(',')
        .any(|feature| feature == "crt-static");
    // Build scripts are not told what happens on panic; the guest's profile is the one that is
    // built for size.
    if is_static && set("OPT_LEVEL") == "z" {
        // Cargo sets it for every build script.
        let directory = set("CARGO_MANIFEST_DIR");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{directory}/guest.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
