//! Counters of network interfaces. Called by this module.

use hull_protocol::agent::NetworkStats;

/// Most interfaces that are reported.
const MAX_INTERFACES: usize = 64;

/// /proc/PID/net/dev: two lines of headings, then `NAME: NUMBER…`, eight numbers for what is
/// received and eight for what is sent. The loopback interface is left out.
pub fn parse(text: &str) -> Vec<NetworkStats> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let name = name.trim_ascii();
            if name == "lo" {
                return None;
            }
            let mut fields = [0u64; 16];
            for (field, number) in fields.iter_mut().zip(numbers.split_ascii_whitespace()) {
                *field = number.parse().ok()?;
            }
            let mut stats = NetworkStats::new();
            stats.name = name.to_owned();
            [
                stats.receive_bytes,
                stats.receive_packets,
                stats.receive_errors,
                stats.receive_dropped,
            ] = [fields[0], fields[1], fields[2], fields[3]];
            [
                stats.transmit_bytes,
                stats.transmit_packets,
                stats.transmit_errors,
                stats.transmit_dropped,
            ] = [fields[8], fields[9], fields[10], fields[11]];
            Some(stats)
        })
        .take(MAX_INTERFACES)
        .collect()
}
