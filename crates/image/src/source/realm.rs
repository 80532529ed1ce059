//! Which token services get a registry's credentials.
//!
//! Called by the token request. A registry names its token service (the "realm") in an answer that
//! needs no credentials. An attacker who controls that answer must not direct the credentials to
//! another host:
//!
//! - The realm of a registry that is spoken to by https must be https. A registry on this machine,
//!   which is spoken to by http, may have either.
//! - Credentials are sent if the realm's host is the registry's, if both are this machine
//!   (loopback), or if both have the same registered domain: `registry-1.docker.io` and
//!   `auth.docker.io`, `registry.gitlab.com` and `gitlab.com`.
//! - Otherwise a token is requested without credentials, which suffices for public images.
//!
//! The registered domain is taken to be the last two labels of a name, or the last three where
//! these end in a country and a class of names (`co.uk`). Hosts of different owners below a domain
//! that is shared (`a.azurecr.io`, `b.azurecr.io`) count as one owner: only the credentials for the
//! registry that named the realm could go there, and only to a host that it chose.

use std::net::IpAddr;

use reqwest::Url;

/// Classes of names below countries.
const CLASSES: &[&str] = &[
    "ac", "co", "com", "edu", "go", "gob", "gov", "ne", "net", "nom", "or", "org",
];

/// What a token service may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// The credentials for the registry.
    Credentials,
    /// Requests without credentials.
    Anonymous,
    /// Nothing: its answers could be forged by others.
    Nothing,
}

/// Judges the token service that a registry names.
pub(super) fn judge(registry: &Url, realm: &Url) -> Trust {
    match (registry.scheme(), realm.scheme()) {
        (_, "https") | ("http", "http") => {}
        _ => return Trust::Nothing,
    }
    let (Some(registry), Some(realm)) = (registry.host_str(), realm.host_str()) else {
        return Trust::Nothing;
    };
    let loopback = is_loopback(registry) && is_loopback(realm);
    if registry == realm || loopback {
        return Trust::Credentials;
    }
    match (registered_domain(registry), registered_domain(realm)) {
        (Some(registry), Some(realm)) if registry == realm => Trust::Credentials,
        _ => Trust::Anonymous,
    }
}

/// Parses a host of a URL; addresses of IPv6 are in brackets.
fn address(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(host);
    bare.parse().ok()
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || address(host).is_some_and(|address| address.is_loopback())
}

/// The registered domain of a name; `None` for addresses and names of one label.
fn registered_domain(host: &str) -> Option<&str> {
    if address(host).is_some() {
        return None;
    }
    let mut labels = host.rsplit('.');
    let (top, second) = (labels.next()?, labels.next()?);
    let mut length = top.len() + 1 + second.len();
    // Shorter names than four letters below a country are mostly classes, too.
    if top.len() == 2 && (CLASSES.contains(&second) || second.len() <= 3) {
        length += 1 + labels.next()?.len();
    }
    host.get(host.len() - length..)
        .filter(|domain| !domain.starts_with('.') && !domain.ends_with('.'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(registry: &str, realm: &str) -> Trust {
        judge(&registry.parse().unwrap(), &realm.parse().unwrap())
    }

    #[test]
    fn credentials_stay_with_the_owner() {
        for (registry, realm) in [
            (
                "https://registry-1.docker.io",
                "https://auth.docker.io/token",
            ),
            ("https://ghcr.io", "https://ghcr.io/token"),
            ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth"),
            ("https://quay.io", "https://quay.io/v2/auth"),
            ("https://r.example.co.uk", "https://auth.example.co.uk"),
            ("https://r.example:5000", "https://r.example:8443/token"),
            ("https://192.0.2.1:5000", "https://192.0.2.1/token"),
            ("http://localhost:5000", "http://localhost:5001/token"),
            ("http://127.0.0.1:5000", "http://[::1]:5001/token"),
        ] {
            assert_eq!(
                of(registry, realm),
                Trust::Credentials,
                "{registry} {realm}"
            );
        }
        for (registry, realm) in [
            (
                "https://registry-1.docker.io",
                "https://auth.docker.io.evil.example",
            ),
            (
                "https://registry-1.docker.io",
                "https://evildocker.io/token",
            ),
            ("https://registry.example.com", "https://example.org/token"),
            ("https://r.good.co.uk", "https://r.evil.co.uk"),
            ("https://good.co.uk", "https://co.uk"),
            ("https://192.0.2.1", "https://192.0.2.2"),
            ("https://10.1.2.3", "https://9.1.2.3"),
            ("https://[2001:db8::1]", "https://[2001:db8::2]"),
            ("https://r.example", "https://localhost"),
            ("https://example.com", "https://x@evil.example/"),
            ("http://localhost:5000", "http://evil.example/token"),
            ("http://localhost:5000", "http://192.0.2.7/token"),
            ("https://registry", "https://auth"),
        ] {
            assert_eq!(of(registry, realm), Trust::Anonymous, "{registry} {realm}");
        }
    }

    #[test]
    fn others_must_not_read_along() {
        for (registry, realm) in [
            ("https://r.example.com", "http://r.example.com/token"),
            ("https://r.example.com", "ftp://r.example.com/token"),
            ("http://localhost", "file:///etc/passwd"),
        ] {
            assert_eq!(of(registry, realm), Trust::Nothing, "{registry} {realm}");
        }
    }
}
