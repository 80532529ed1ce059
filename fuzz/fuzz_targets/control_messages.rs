//! A hostile client of a sandbox's control socket: messages of JSON, inline or in a memory file,
//! with descriptors.
//!
//! Looks for panics, for a request that is another one when it is sent on, and for a memory file
//! that is read although its sender can still change it.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use hull_ipc::{LONG_MESSAGE, MAX_INLINE};
use hull_sandbox::control::protocol::{Hello, Reply, pair, parse, receive};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::value::RawValue;

const SEALS: [SealFlags; 4] = [
    SealFlags::WRITE,
    SealFlags::SHRINK,
    SealFlags::GROW,
    SealFlags::SEAL,
];

fuzz_target!(|data: &[u8]| {
    let [choice, fds, text @ ..] = data else {
        return;
    };
    let text = &text[..text.len().min(MAX_INLINE)];
    if text.is_empty() {
        return;
    }
    let (client, sandbox) = pair().expect("a socket pair");
    let mut file = File::from(
        memfd_create("message", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)
            .expect("a memory file"),
    );
    file.write_all(text).expect("its content");
    let mut seals = SealFlags::empty();
    for (bit, seal) in SEALS.into_iter().enumerate() {
        if fds & 1 << bit != 0 {
            seals |= seal;
        }
    }
    fcntl_add_seals(&file, seals).expect("its seals");
    let attached = vec![file.as_fd(); usize::from(fds >> 4)];
    let is_long = choice & 1 != 0;
    let sent = match is_long {
        true => LONG_MESSAGE,
        false => text,
    };
    hull_ipc::packet::send(&client, sent, &attached).expect("room in the socket");
    drop(client);
    match choice >> 1 & 3 {
        0 => drop(receive::<Hello>(&sandbox)),
        1 => drop(receive::<Reply>(&sandbox)),
        _ => {
            let Ok(Some(received)) = receive::<Box<RawValue>>(&sandbox) else {
                return;
            };
            let whole = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
            assert!(!is_long || seals.contains(whole), "it can still be changed");
            if let Ok(request) = parse(&received.message) {
                let again = serde_json::value::to_raw_value(&request).expect("it is JSON");
                let request = parse(&again).expect("it is a request");
                let once_more = serde_json::value::to_raw_value(&request).expect("it is JSON");
                assert_eq!(once_more.get(), again.get());
            }
        }
    }
});
