//! The relay of a guest's questions to Docker's name server, in a namespace without one.
//!
//! Looks for panics, for questions without an answer or with two, and for a relay that does not
//! end.
#![no_main]

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::time::Duration;

use hull_network::Namespace;
use hull_protocol::NameHeader;
use hull_sandbox::relay_names;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Of one run: more than wait at a time, and not so many that a run takes seconds.
const QUESTIONS: usize = 96;

thread_local! {
    static NAMESPACE: OnceCell<Namespace> = const { OnceCell::new() };
}

/// How often each slot is asked, and the bytes of that.
fn questions(data: &[u8]) -> (BTreeMap<u16, usize>, usize) {
    let (mut asked, mut at) = (BTreeMap::new(), 0);
    for _ in 0..QUESTIONS {
        let Some(header) = data[at..].first_chunk::<{ NameHeader::LENGTH }>() else {
            return (asked, data.len());
        };
        let Some(header) = NameHeader::decode(*header) else {
            return (asked, data.len());
        };
        let end = at + NameHeader::LENGTH + usize::from(header.length);
        if end > data.len() {
            return (asked, data.len());
        }
        *asked.entry(header.slot).or_insert(0) += 1;
        at = end;
    }
    (asked, at)
}

fuzz_target!(|data: &[u8]| {
    let namespace = NAMESPACE.with(|namespace| {
        let new = || Namespace::new().expect("a network namespace: run as root");
        namespace.get_or_init(new).clone()
    });
    let (mut expected, length) = questions(data);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("an event loop");
    runtime.block_on(async {
        let (guest, host) = tokio::io::duplex(1 << 10);
        let (from_guest, to_guest) = tokio::io::split(host);
        let (mut from_host, mut to_host) = tokio::io::split(guest);
        let served = relay_names(namespace, from_guest, to_guest);
        let asking = async {
            // It may listen no more.
            let _ = to_host.write_all(&data[..length]).await;
            let _ = to_host.shutdown().await;
        };
        let reading = async {
            let mut answers = Vec::new();
            from_host.read_to_end(&mut answers).await.expect("answers");
            answers
        };
        let all = async { tokio::join!(served, asking, reading) };
        let (_, (), answers) = tokio::time::timeout(Duration::from_secs(8), all)
            .await
            .expect("the relay ends");
        let mut rest = &answers[..];
        while let Some((header, after)) = rest.split_first_chunk() {
            let header = NameHeader::decode(*header).expect("an answer");
            assert_eq!(header.length, 0, "nobody is there to answer");
            let left = expected.get_mut(&header.slot).expect("it was asked");
            *left = left.checked_sub(1).expect("it has no answer yet");
            rest = after;
        }
        assert!(rest.is_empty(), "a whole answer");
        assert!(expected.values().all(|left| *left == 0), "{expected:?}");
    });
});
