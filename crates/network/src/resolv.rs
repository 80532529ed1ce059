//! The `resolv.conf` of a container, built as Docker does: from the host's, without name servers
//! that the container cannot reach, and from the user's options.
//!
//! Called when a container's `/etc` is written. Text in, text out: reads and writes no file. Never
//! adds a default name server: if none remains, the file has none.

use std::net::{IpAddr, Ipv6Addr};

/// The file that the host's programs read.
pub const HOST_FILE: &str = "/etc/resolv.conf";
/// Where systemd-resolved, whose own address is loopback, lists its upstream servers.
pub const SYSTEMD_FILE: &str = "/run/systemd/resolve/resolv.conf";

/// The user's options. Empty ones are taken from the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `--dns`.
    pub servers: Vec<IpAddr>,
    /// `--dns-search`; a single `.` means none.
    pub search: Vec<String>,
    /// `--dns-option`.
    pub options: Vec<String>,
}

/// The content of a `resolv.conf`. Comments, `sortlist` and unknown keywords are dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolv {
    /// Name servers as written, possibly with a zone.
    pub servers: Vec<String>,
    /// Domains to search: those of the last `search` or `domain`, as resolvers read it.
    pub search: Vec<String>,
    /// Options of all lines.
    pub options: Vec<String>,
}

impl Resolv {
    /// Reads a file. Never fails: resolvers skip what they do not understand, too.
    pub fn parse(text: &str) -> Resolv {
        let mut all = Resolv::default();
        for line in text.lines() {
            // A comment begins a line, or ends one.
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => all.servers.extend(words.next()),
                Some("search") => all.search = words.collect(),
                Some("domain") => all.search = words.take(1).collect(),
                Some("options") => all.options.extend(words),
                _ => {}
            }
        }
        all
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        for (word, values) in [("search", &self.search), ("options", &self.options)] {
            if !values.is_empty() {
                text.push_str(&format!("{word} {}\n", values.join(" ")));
            }
        }
        text
    }
}

/// Whether all name servers of the host's file are loopback addresses, so that the container's come
/// from [`SYSTEMD_FILE`], if there is one. False without any server: then the host resolves nothing
/// either.
pub fn only_loopback(host: &str) -> bool {
    let servers = Resolv::parse(host).servers;
    !servers.is_empty() && servers.iter().all(|server| is_loopback(server))
}

/// Generates the container's. `host` is the text of the host's file, or of [`SYSTEMD_FILE`] if
/// [`only_loopback`] says so; `ipv6` is whether the container has an address that can reach IPv6
/// servers of the host. Servers in `asked` are taken as they are.
pub fn generate(host: &str, asked: &Options, ipv6: bool) -> Resolv {
    let mut all = Resolv::parse(host);
    if asked.servers.is_empty() {
        all.servers.retain(|server| is_reachable(server, ipv6));
    } else {
        all.servers = asked.servers.iter().map(IpAddr::to_string).collect();
    }
    if !asked.search.is_empty() {
        all.search.clone_from(&asked.search);
    }
    if all.search == ["."] {
        all.search.clear();
    }
    if !asked.options.is_empty() {
        all.options.clone_from(&asked.options);
    }
    all
}

fn is_loopback(server: &str) -> bool {
    // The zone does not matter: ::1%lo.
    let address = server.split('%').next().unwrap_or_default();
    address
        .parse()
        .is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback())
}

/// Whether a container can reach a name server that the host uses.
fn is_reachable(server: &str, ipv6: bool) -> bool {
    match server.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(IpAddr::V4(ip)) => !ip.is_loopback() && !ip.is_unspecified(),
        Ok(IpAddr::V6(ip)) => {
            ipv6 && !ip.is_loopback() && !ip.is_unspecified() && !is_link_local(ip)
        }
        // An address with a zone, which names an interface of the host, or not an address.
        Err(_) => false,
    }
}

/// Such an address is valid only on one of the host's links.
fn is_link_local(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# made by hand\nnameserver 127.0.0.53\nnameserver 10.0.0.1 # office\nnameserver\t::1\n\
        nameserver fe80::1%eth0\nnameserver fd00::1\nnameserver nonsense\ndomain old.example\nsearch a.example b.example\n\
        options edns0 trust-ad\noptions ndots:2\nsortlist 10.0.0.0\n";

    fn made(host: &str, asked: &Options, ipv6: bool) -> String {
        generate(host, asked, ipv6).text()
    }

    #[test]
    fn the_hosts_without_what_cannot_be_reached() {
        assert_eq!(
            made(HOST, &Options::default(), true),
            "nameserver 10.0.0.1\nnameserver fd00::1\nsearch a.example b.example\noptions edns0 trust-ad ndots:2\n"
        );
        assert_eq!(
            made(HOST, &Options::default(), false),
            "nameserver 10.0.0.1\nsearch a.example b.example\noptions edns0 trust-ad ndots:2\n"
        );
        assert_eq!(made("", &Options::default(), true), "");
        assert_eq!(
            made("nameserver 127.1.2.3\n", &Options::default(), true),
            "",
            "no server is invented"
        );
        assert_eq!(
            made("search a\ndomain b c\n", &Options::default(), true),
            "search b\n"
        );
        assert_eq!(
            made(
                " ; x\n\0\u{ff}\nnameserver\nsearch\n",
                &Options::default(),
                true
            ),
            ""
        );
    }

    #[test]
    fn what_was_asked_for_replaces() {
        let asked = Options {
            servers: vec![
                IpAddr::from([127, 0, 0, 1]),
                IpAddr::V6(Ipv6Addr::LOCALHOST),
            ],
            search: vec!["c.example".into()],
            options: vec!["ndots:1".into()],
        };
        assert_eq!(
            made(HOST, &asked, false),
            "nameserver 127.0.0.1\nnameserver ::1\nsearch c.example\noptions ndots:1\n"
        );
        let asked = Options {
            search: vec![".".into()],
            ..Options::default()
        };
        assert_eq!(
            made(HOST, &asked, false),
            "nameserver 10.0.0.1\noptions edns0 trust-ad ndots:2\n"
        );
    }

    #[test]
    fn when_systemds_file_is_the_one() {
        assert!(only_loopback("nameserver 127.0.0.53\noptions edns0\n"));
        assert!(only_loopback(
            "nameserver 127.0.0.53\nnameserver ::1%lo\nnameserver ::ffff:127.0.0.1\n"
        ));
        assert!(!only_loopback(
            "nameserver 127.0.0.53\nnameserver 10.0.0.1\n"
        ));
        assert!(!only_loopback("nameserver fd00::1\n"));
        assert!(!only_loopback("search example\n"));
    }
}
