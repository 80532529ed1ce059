//! The `hosts` file of a container, built as Docker does.
//!
//! Called when a container's `/etc` is written. Names must have been validated. Reads and writes no
//! file.

use std::net::IpAddr;

/// The start of every container's file.
const LOCAL: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::\tip6-localnet\n\
    ff00::\tip6-mcastprefix\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

/// The start without IPv6, not even on loopback.
const LOCAL_WITHOUT_IPV6: &str = "127.0.0.1\tlocalhost\n";

/// Generates the container's file: `addresses` are its own, with the names `hostname` (and its
/// first part, if it has a domain) and `aliases`; `extra` are other hosts (`--add-host`), in the
/// order given. Without an address, its name resolves to loopback, so that programs can look
/// themselves up.
pub fn generate(
    hostname: &str,
    aliases: &[String],
    addresses: &[IpAddr],
    extra: &[(String, IpAddr)],
    ipv6: bool,
) -> String {
    let mut text = if ipv6 { LOCAL } else { LOCAL_WITHOUT_IPV6 }.to_owned();
    for (name, ip) in extra {
        text.push_str(&format!("{ip}\t{name}\n"));
    }
    let short = hostname.split_once('.').map(|(short, _)| short);
    let mut names: Vec<&str> = Vec::new();
    for name in [hostname]
        .into_iter()
        .chain(short)
        .chain(aliases.iter().map(String::as_str))
    {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return text;
    }
    let names = names.join(" ");
    let loopback = [IpAddr::from([127, 0, 0, 1])];
    for ip in if addresses.is_empty() {
        &loopback
    } else {
        addresses
    } {
        text.push_str(&format!("{ip}\t{names}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_container_with_addresses() {
        let addresses = [ip("10.87.0.2"), ip("fd00::2")];
        let extra = [
            ("db".to_owned(), ip("10.0.0.5")),
            ("db".to_owned(), ip("fd00::5")),
        ];
        assert_eq!(
            generate(
                "web.example.org",
                &["www".into(), "web".into()],
                &addresses,
                &extra,
                true
            ),
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
             ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n\
             10.0.0.5\tdb\nfd00::5\tdb\n\
             10.87.0.2\tweb.example.org web www\nfd00::2\tweb.example.org web www\n"
        );
    }

    #[test]
    fn a_container_without() {
        assert_eq!(
            generate("web", &[], &[], &[], false),
            "127.0.0.1\tlocalhost\n127.0.0.1\tweb\n"
        );
        assert_eq!(
            generate("", &[], &[ip("10.0.0.1")], &[], false),
            "127.0.0.1\tlocalhost\n"
        );
    }
}
