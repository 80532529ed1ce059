//! Names for containers that were given none, in Docker's style: an adjective and a thing of the
//! sea.

use crate::error::{Context, Result};

const ADJECTIVES: [&str; 64] = [
    "able", "agile", "amber", "ample", "azure", "bold", "brave", "brisk", "bright", "calm",
    "candid", "clear", "clever", "cosy", "crisp", "daring", "deft", "eager", "early", "easy",
    "fair", "fancy", "fleet", "fond", "free", "fresh", "gentle", "glad", "golden", "grand",
    "happy", "hardy", "honest", "jolly", "keen", "kind", "light", "lively", "loyal", "lucid",
    "lucky", "mellow", "merry", "mild", "neat", "nimble", "noble", "patient", "plain", "proud",
    "quick", "quiet", "rapid", "ready", "serene", "sharp", "silent", "smart", "solid", "steady",
    "sunny", "swift", "tidy", "warm",
];

const NOUNS: [&str; 64] = [
    "anchor", "atoll", "barge", "bark", "bay", "beacon", "boat", "bow", "brig", "buoy", "cape",
    "canoe", "captain", "clipper", "coast", "compass", "coral", "cove", "current", "cutter",
    "deck", "dinghy", "dock", "dolphin", "ferry", "fjord", "frigate", "galley", "gull", "harbour",
    "haven", "heron", "island", "jetty", "kayak", "keel", "ketch", "lagoon", "lantern", "lugger",
    "mast", "mooring", "narwhal", "oar", "osprey", "otter", "pelican", "pier", "pilot", "port",
    "puffin", "raft", "reef", "rudder", "sail", "schooner", "seal", "skiff", "sloop", "tide",
    "tiller", "trawler", "wharf", "yawl",
];

/// A random name: `brisk_heron`, from the third attempt on with a number.
pub fn random(attempt: u32) -> Result<String> {
    let mut bytes = [0u8; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context(|| "get random numbers")?;
    let [adjective, noun, high, low] = bytes;
    let adjective = ADJECTIVES[usize::from(adjective) % ADJECTIVES.len()];
    let noun = NOUNS[usize::from(noun) % NOUNS.len()];
    if attempt < 2 {
        Ok(format!("{adjective}_{noun}"))
    } else {
        Ok(format!(
            "{adjective}_{noun}{}",
            u16::from_be_bytes([high, low])
        ))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_valid_and_differ() {
        let mut names = std::collections::BTreeSet::new();
        for attempt in 0..20 {
            let name = random(attempt).unwrap();
            assert!(super::super::is_valid(&name), "{name}");
            names.insert(name);
        }
        assert!(names.len() > 10);
    }
}
