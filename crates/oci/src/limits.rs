//! The limits of a container that decide how big its machine is.

use oci_spec::runtime::LinuxResources;

/// Memory limit, bytes.
pub fn memory(resources: Option<&LinuxResources>) -> Option<u64> {
    let limit = resources?.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// Limit of processor time, thousandths of a processor.
pub fn processors(resources: Option<&LinuxResources>) -> Option<u64> {
    let cpu = resources?.cpu().as_ref()?;
    quota(cpu.quota()?, cpu.period().unwrap_or_default())
}

/// A quota of microseconds per period as thousandths of a processor; zero and less is none.
pub fn quota(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    // The kernel's default (kernel/sched/fair.c), microseconds.
    let period = if period > 0 { period } else { 100_000 };
    Some(quota.saturating_mul(1000) / period)
}
