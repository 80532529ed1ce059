//! The output of a network plugin, in each version of the specification.
//!
//! Looks for panics, and for a result that is not the same when it is read from where it was kept.
#![no_main]

use hull_network::cni::CniResult;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let Ok(result) = CniResult::read_for_fuzzing(data, version) else {
            continue;
        };
        for interface in &result.interfaces {
            let _ = result.interface(&interface.name);
            assert!(result.addresses(&interface.name).count() <= result.ips.len());
        }
        let kept = result.as_json().to_string();
        let again = CniResult::read_for_fuzzing(kept.as_bytes(), version).expect("it was read");
        assert_eq!(again, result);
    }
});
