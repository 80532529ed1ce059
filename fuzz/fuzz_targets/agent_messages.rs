//! A hostile agent: whatever it sends on its connection, the sandbox process's calls end, with an
//! error or with bounded values, and nothing panics.
#![no_main]

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hull_sandbox::{Agent, printable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = printable(&String::from_utf8_lossy(data));
    assert!(text.chars().all(|c| !c.is_control()));

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("an event loop");
    runtime.block_on(async {
        // The answer lies ready before the question is asked: the first stream's id is 1.
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        theirs.set_nonblocking(true).expect("a non-blocking socket");
        let payload = &data[..data.len().min(u16::MAX.into())];
        let mut head = Vec::from(
            u32::try_from(payload.len())
                .unwrap_or_default()
                .to_be_bytes(),
        );
        // Stream 1, a response, no flags: so that the fuzzer gets past the frame more often than by
        // chance.
        head.extend([0, 0, 0, 1, 2, 0]);
        let framed = data.first().is_some_and(|first| first % 2 == 0);
        // What does not fit into the socket is not sent: it is the fuzzer's loss.
        if framed {
            let _ = theirs.write(&head);
        }
        let _ = theirs.write(payload);
        drop(theirs);
        // One connection, and then there is no device process any more.
        let (sender, incoming) = tokio::sync::mpsc::channel(1);
        sender.try_send(OwnedFd::from(ours)).expect("room for one");
        drop(sender);
        let agent = Agent::dialled(incoming).await.expect("an agent");
        let calls = async {
            match data.first().unwrap_or(&0) / 2 % 3 {
                0 => drop(agent.metrics("c").await),
                1 => drop(agent.processes("c").await),
                _ => drop(agent.wait("c", "").await),
            }
        };
        tokio::time::timeout(Duration::from_secs(5), calls)
            .await
            .expect("a call ends when the connection does");
    });
});
