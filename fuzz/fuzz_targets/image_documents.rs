//! What a registry sends beside layers: manifests, lists of them, configurations; and references,
//! which users take from anywhere.
//!
//! Looks for panics, and for a reference that is another one once it was printed.
#![no_main]

use hull_image::Reference;
use hull_image::fuzzing::{parse_config, parse_manifest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [choice, document @ ..] = data else {
        return;
    };
    match choice % 3 {
        0 => drop(parse_manifest(document)),
        1 => {
            if let Ok(config) = parse_config(document, usize::from(choice / 3)) {
                let _ = config.platform().to_string();
            }
        }
        _ => {
            let Ok(text) = std::str::from_utf8(document) else {
                return;
            };
            if let Ok(reference) = text.parse::<Reference>() {
                let printed = reference.to_string();
                let again: Reference = printed.parse().expect("it is a reference");
                assert_eq!(again.to_string(), printed);
            }
        }
    }
});
