//! Many pods, one after the other and at once.

use std::time::{Duration, Instant};

use hull_tests::cri::{Cri, container};
use hull_tests::{Containerd, eventually};

use crate::pods::runs;

/// How many pods come and go: HULL_PODS, or a few.
fn count() -> usize {
    let count = std::env::var("HULL_PODS").ok();
    count.map_or(20, |count| count.parse().unwrap())
}

/// What a process holds: descriptors, and resident memory in KiB.
fn held(pid: i32) -> (usize, u64) {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
    (descriptors.count(), memory.unwrap())
}

fn comes_and_goes(containerd: &Containerd, cri: &Cri, name: &str) {
    let config = containerd.pod(name);
    let id = cri.run_pod(&config, "hull").unwrap();
    runs(cri, &id, &config, container("one", "echo there"));
    runs(cri, &id, &config, container("two", "exec sleep 1000"));
    cri.remove_pod(&id).unwrap();
}

#[test]
fn alone_many_pods_in_a_row_leave_nothing_behind() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let mounts = || {
        std::fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .lines()
            .count()
    };
    // containerd's own caches are filled.
    for number in 0..5 {
        comes_and_goes(&containerd, &cri, &format!("first-{number}"));
    }
    let (descriptors, memory) = held(containerd.daemon());
    let mounted = mounts();
    let begin = Instant::now();
    for number in 0..count() {
        comes_and_goes(&containerd, &cri, &format!("pod-{number}"));
    }
    eprintln!(
        "{} pods of two containers in {:?}",
        count(),
        begin.elapsed()
    );
    eventually(
        "its descriptors are closed",
        Duration::from_secs(10),
        || held(containerd.daemon()).0 <= descriptors + 2,
    );
    let (_, after) = held(containerd.daemon());
    // Its memory is Go's, which is given back late: what matters is what grows with each pod.
    let each = after.saturating_sub(memory) / count() as u64;
    eprintln!("containerd: {memory} KiB before, {after} after");
    assert!(
        after < memory + 30_000 || each < 50,
        "{each} KiB more for each pod"
    );
    assert_eq!(mounts(), mounted);
    containerd.assert_clean();
}
