//! Namespaces: what counts as one, identities, and that the caller's never changes.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::support::{NEVER, Place, changed, drain};
use crate::{Error, Namespace};

/// The calling thread's namespace.
fn own() -> std::path::PathBuf {
    std::fs::read_link("/proc/thread-self/ns/net").unwrap()
}

#[test]
fn other_things_are_refused() {
    for path in [
        "/proc/self/ns/mnt",
        "/proc/self/ns",
        "/dev/null",
        "/etc/passwd",
    ] {
        let error = Namespace::open(path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{path} is not a network namespace")
        );
    }
    let file = OwnedFd::from(File::open("/proc/self/ns/uts").unwrap());
    let error = Namespace::try_from(file).unwrap_err();
    assert!(
        matches!(error, Error::NotANetworkNamespace { .. }),
        "{error}"
    );
    let error = Namespace::open("/run/netns/there is none").unwrap_err();
    assert!(matches!(error, Error::Open { .. }), "{error}");
    assert!(Namespace::of_process(i32::MAX).is_err());
}

#[test]
fn a_namespace_is_known_again() {
    let own = Namespace::own().unwrap();
    assert!(own.is_callers_own().unwrap());
    let same = Namespace::of_process(std::process::id() as i32).unwrap();
    assert!(own.is_same(&same).unwrap());
    assert_eq!(own.identity().unwrap(), same.clone().identity().unwrap());
    let made = match Namespace::new() {
        Ok(made) => made,
        Err(error) => return println!("left out: a_namespace_is_known_again: {error}"),
    };
    assert!(!made.is_callers_own().unwrap());
    assert!(!made.is_same(&own).unwrap());
    assert!(
        made.run_in(|| made.is_callers_own().unwrap()).unwrap(),
        "inside it is the caller's"
    );
}

#[tokio::test]
async fn the_threads_own_namespace_never_changes() {
    let before = own();
    let Some(place) = Place::new("the_threads_own_namespace_never_changes") else {
        return;
    };
    let inside = place.namespace.run_in(own).unwrap();
    assert_ne!(inside, before);
    let monitor = place.monitor();
    place.add_bridge("eth0").await;
    changed(&monitor).await.unwrap();
    assert_eq!(place.describe().await.interfaces.len(), 1);
    assert_eq!(own(), before);
    let panicked = std::panic::catch_unwind(|| place.namespace.run_in(|| panic!("inside")));
    assert!(panicked.is_err());
    assert_eq!(own(), before);
    assert!(Namespace::own().unwrap().is_callers_own().unwrap());
}

#[tokio::test]
async fn a_new_one_has_nothing_but_loopback() {
    let Some(place) = Place::new("a_new_one_has_nothing_but_loopback") else {
        return;
    };
    assert_eq!(place.describe().await, crate::Description::default());
    let connected = place.namespace.run_in(|| {
        std::net::UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .connect("127.0.0.1:9")
    });
    connected.unwrap().unwrap();
}

#[tokio::test]
async fn many_changes_are_one() {
    let Some(place) = Place::new("many_changes_are_one") else {
        return;
    };
    let monitor = place.monitor();
    for number in 0..20 {
        place.add_bridge(&format!("eth{number}")).await;
    }
    drain(&monitor).await;
    let nothing = tokio::time::timeout(NEVER, monitor.changed()).await;
    assert!(nothing.is_err(), "nothing changed any more");
    // More than the socket holds: lost notifications count as a change.
    let index = place.index("eth0");
    for number in 0..600 {
        place
            .add_address(index, &format!("10.{}.{}.1/24", number / 250, number % 250))
            .await;
    }
    changed(&monitor).await.unwrap();
    let described = place.describe().await;
    let eth0 = &described.interfaces[0];
    let v4 = eth0
        .addresses
        .iter()
        .filter(|address| address.address.is_ipv4());
    assert_eq!(v4.filter(|address| !address.no_prefix_route).count(), 600);
    assert_eq!(described.routes, []);
}

#[tokio::test]
async fn a_namespace_goes_away_with_its_last_descriptor() {
    let Some(place) = Place::new("a_namespace_goes_away_with_its_last_descriptor") else {
        return;
    };
    let inode = |entry: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_link(entry.unwrap().path()).unwrap_or_default()
    };
    let inside = place.namespace.run_in(own).unwrap();
    let held = || {
        let mut all = std::fs::read_dir("/proc/self/fd").unwrap().map(inode);
        all.any(|link| link == inside)
    };
    assert!(held());
    drop(place);
    assert!(!held());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(inside.to_str().unwrap()));
}
