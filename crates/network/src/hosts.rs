//! The `hosts` file of a container, made as Docker makes it.
//!
//! Called by whoever writes a container's `/etc`. Names are taken as they are: whoever got them
//! from a user has checked them. Reads and writes no file.

use std::net::IpAddr;

/// What every container's file begins with.
const LOCAL: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::\tip6-localnet\n\
    ff00::\tip6-mcastprefix\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

/// What it begins with where there is no IPv6, not even loopback.
const LOCAL_WITHOUT_IPV6: &str = "127.0.0.1\tlocalhost\n";

/// The container's file: `addresses` are its own, under `hostname` (which may have a domain: then
/// its first part is a name of its own) and `aliases`; `extra` are names of others (`--add-host`),
/// in the order in which they were given. Without an address, as without a network, its name leads
/// to loopback, so that programs that look themselves up find something.
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
