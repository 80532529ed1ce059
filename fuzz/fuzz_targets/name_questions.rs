//! DNS queries of a guest in a network of hull's own: their question, and hull's answers to it.
//!
//! Looks for panics, for answers to what is no query, and for answers that are longer than the
//! query and its addresses make them.
#![no_main]

use std::net::IpAddr;

use hull_network::names::{MAX_QUERY, Wanted, answer, answer_pointer, question, refuse, reverse};
use libfuzzer_sys::fuzz_target;

/// Bytes of one record in an answer: a name that was said before, its head, an address.
const RECORD: usize = 2 + 10 + 16;

fuzz_target!(|data: &[u8]| {
    let addresses = ["10.0.0.1", "fd00::1"].map(|text| text.parse::<IpAddr>().expect("an address"));
    let asked = question(data);
    assert!(asked.is_none() || data.len() <= MAX_QUERY);
    if let Some(Wanted::Pointer(address)) = asked.as_ref().map(|asked| asked.wanted) {
        let name = asked.as_ref().map(|asked| asked.name.as_str());
        assert!(name.is_some_and(|name| name.eq_ignore_ascii_case(&reverse(address))));
    }
    let pointers = ["web.backend".to_owned(), "a".repeat(63)];
    let replies = [
        answer(data, &addresses),
        answer_pointer(data, &pointers),
        refuse(data, true),
        refuse(data, false),
    ];
    for reply in replies {
        let Some(reply) = reply else { continue };
        // A name that was compressed may be said in full.
        assert!(reply.len() <= data.len() * 256 + addresses.len() * RECORD + 512);
        assert_eq!(reply.get(..2), data.get(..2), "the answer is to this query");
    }
});
