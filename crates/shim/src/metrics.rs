//! What a container uses, as containerd reads it: `io.containerd.cgroups.v2.Metrics`, by the names
//! of the guest's control groups. containerd takes it on hosts with either version of them.

use std::collections::BTreeMap;

use containerd_shim_protos::cgroups_v2::metrics as proto;
use hull_sandbox::metrics::{Metrics, Pressure, PressureLine};
use hull_sandbox::{Error, Result};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::pod::{Pod, blocking};
use crate::process::lock;

/// Name of the message.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// How many nanoseconds one microsecond has: what control groups count in.
const MICROSECOND: u64 = 1000;

/// What a pod takes of the host: memory of its processes (PSS), and their processor time.
///
/// # Errors
/// `NotFound` when it has no machine.
pub async fn of_pod(pod: &Pod) -> Result<Metrics> {
    let sandbox = pod.sandbox();
    let sandbox = sandbox.ok_or_else(|| Error::not_found("the pod has no machine"))?;
    let (memory, cpu_ns) = blocking(move || Ok(sandbox.cost())).await?;
    let mut metrics = Metrics::default();
    metrics.memory.usage = memory.total();
    // What can be reclaimed is not told apart: it counts as in use.
    metrics.memory.stat.anon = memory.total();
    metrics.cpu.usage_ns = cpu_ns;
    Ok(metrics)
}

/// What a pod takes beside what its containers use: the metrics of the container that holds it. The
/// sum over all containers is then what the pod takes.
///
/// # Errors
/// `NotFound` when it has no machine.
pub async fn overhead(pod: &Pod) -> Result<Metrics> {
    let mut metrics = of_pod(pod).await?;
    let mut used = BTreeMap::new();
    for container in pod.containers().iter().filter(|one| !one.holds_pod) {
        // One that has ended has no memory, and its processor time is known from before.
        let Ok(now) = container.inner.metrics().await else {
            continue;
        };
        let memory = metrics.memory.usage.saturating_sub(now.memory.usage);
        metrics.memory.usage = memory;
        metrics.memory.stat.anon = memory;
        used.insert(container.id.clone(), now.cpu.usage_ns);
    }
    metrics.cpu.usage_ns = lock(&pod.spent).beside(metrics.cpu.usage_ns, used);
    Ok(metrics)
}

/// Processor time of a pod, of which only what its containers do not use is told: a counter, which
/// never falls. Nanoseconds.
#[derive(Debug, Default)]
pub struct Spent {
    /// Of each container, when it was last asked.
    containers: BTreeMap<String, u64>,
    /// Of those that are gone.
    ended: u64,
    /// What was told.
    told: u64,
}

impl Spent {
    /// What a pod has spent beside its containers.
    fn beside(&mut self, total: u64, used: BTreeMap<String, u64>) -> u64 {
        let before = std::mem::replace(&mut self.containers, used);
        let gone = before
            .into_iter()
            .filter(|(id, _)| !self.containers.contains_key(id));
        self.ended += gone.map(|(_, spent)| spent).sum::<u64>();
        let used = self.containers.values().sum::<u64>() + self.ended;
        self.told = self.told.max(total.saturating_sub(used));
        self.told
    }
}

/// Encodes metrics. A limit that is not set is the largest number, as in containerd's own.
pub fn encode(metrics: &Metrics) -> protobuf::Result<Any> {
    let message = proto::Metrics {
        pids: MessageField::some(proto::PidsStat {
            current: metrics.pids.current,
            // Zero: none.
            limit: metrics.pids.limit.unwrap_or_default(),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(metrics)),
        memory: MessageField::some(memory(metrics)),
        memory_events: MessageField::some(proto::MemoryEvents {
            low: metrics.memory.low_events,
            high: metrics.memory.high_events,
            max: metrics.memory.max_events,
            oom: metrics.memory.oom_events,
            oom_kill: metrics.memory.oom_kills,
            ..Default::default()
        }),
        io: MessageField::some(proto::IOStat {
            usage: metrics
                .io
                .devices
                .iter()
                .map(|device| proto::IOEntry {
                    major: device.major.into(),
                    minor: device.minor.into(),
                    rbytes: device.read_bytes,
                    wbytes: device.write_bytes,
                    rios: device.reads,
                    wios: device.writes,
                    ..Default::default()
                })
                .collect(),
            psi: psi(metrics.io.pressure.as_ref()),
            ..Default::default()
        }),
        hugetlb: metrics
            .hugetlb
            .iter()
            .map(|pages| proto::HugeTlbStat {
                current: pages.usage,
                max: pages.limit.unwrap_or(u64::MAX),
                pagesize: pages.page_size.clone(),
                failcnt: pages.max_events,
                ..Default::default()
            })
            .collect(),
        network: metrics
            .network
            .iter()
            .map(|interface| proto::NetworkStat {
                name: interface.name.clone(),
                rx_bytes: interface.receive_bytes,
                rx_packets: interface.receive_packets,
                rx_errors: interface.receive_errors,
                rx_dropped: interface.receive_dropped,
                tx_bytes: interface.transmit_bytes,
                tx_packets: interface.transmit_packets,
                tx_errors: interface.transmit_errors,
                tx_dropped: interface.transmit_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    Ok(Any {
        type_url: TYPE.to_owned(),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

fn cpu(metrics: &Metrics) -> proto::CPUStat {
    let cpu = &metrics.cpu;
    proto::CPUStat {
        usage_usec: cpu.usage_ns / MICROSECOND,
        user_usec: cpu.user_ns / MICROSECOND,
        system_usec: cpu.system_ns / MICROSECOND,
        nr_periods: cpu.periods.unwrap_or_default(),
        nr_throttled: cpu.throttled_periods.unwrap_or_default(),
        throttled_usec: cpu.throttled_ns.unwrap_or_default() / MICROSECOND,
        psi: psi(cpu.pressure.as_ref()),
        ..Default::default()
    }
}

fn memory(metrics: &Metrics) -> proto::MemoryStat {
    let memory = &metrics.memory;
    let stat = &memory.stat;
    proto::MemoryStat {
        anon: stat.anon,
        file: stat.file,
        kernel_stack: stat.kernel_stack,
        slab: stat.slab,
        sock: stat.sock,
        shmem: stat.shmem,
        file_mapped: stat.file_mapped,
        file_dirty: stat.file_dirty,
        file_writeback: stat.file_writeback,
        anon_thp: stat.anon_thp,
        inactive_anon: stat.inactive_anon,
        active_anon: stat.active_anon,
        inactive_file: stat.inactive_file,
        active_file: stat.active_file,
        unevictable: stat.unevictable,
        slab_reclaimable: stat.slab_reclaimable,
        slab_unreclaimable: stat.slab_unreclaimable,
        pgfault: stat.pgfault,
        pgmajfault: stat.pgmajfault,
        workingset_refault: stat.workingset_refault,
        workingset_activate: stat.workingset_activate,
        workingset_nodereclaim: stat.workingset_nodereclaim,
        pgrefill: stat.pgrefill,
        pgscan: stat.pgscan,
        pgsteal: stat.pgsteal,
        pgactivate: stat.pgactivate,
        pgdeactivate: stat.pgdeactivate,
        pglazyfree: stat.pglazyfree,
        pglazyfreed: stat.pglazyfreed,
        thp_fault_alloc: stat.thp_fault_alloc,
        thp_collapse_alloc: stat.thp_collapse_alloc,
        usage: memory.usage,
        usage_limit: memory.limit.unwrap_or(u64::MAX),
        swap_usage: memory.swap_usage.unwrap_or_default(),
        swap_limit: memory.swap_limit.unwrap_or(u64::MAX),
        max_usage: memory.peak.unwrap_or_default(),
        swap_max_usage: memory.swap_peak.unwrap_or_default(),
        psi: psi(memory.pressure.as_ref()),
        ..Default::default()
    }
}

fn psi(pressure: Option<&Pressure>) -> MessageField<proto::PSIStats> {
    let Some(pressure) = pressure else {
        return MessageField::none();
    };
    let line = |line: &PressureLine| {
        // Hundredths of a percent.
        let percent = |part: u32| f64::from(part) / 100.0;
        MessageField::some(proto::PSIData {
            avg10: percent(line.avg10),
            avg60: percent(line.avg60),
            avg300: percent(line.avg300),
            total: line.total_ns / MICROSECOND,
            ..Default::default()
        })
    };
    MessageField::some(proto::PSIStats {
        some: line(&pressure.some),
        full: line(&pressure.full),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_pod_spends_beside_its_containers_never_falls() {
        let used = |pairs: &[(&str, u64)]| {
            let pairs = pairs.iter().map(|(id, spent)| ((*id).to_owned(), *spent));
            pairs.collect::<BTreeMap<_, _>>()
        };
        let mut spent = Spent::default();
        assert_eq!(spent.beside(100, used(&[("a", 30), ("b", 20)])), 50);
        // One has ended: its time is not the pod's own.
        assert_eq!(spent.beside(120, used(&[("a", 40)])), 60);
        assert_eq!(spent.beside(120, used(&[("a", 50)])), 60);
        assert_eq!(spent.beside(200, used(&[])), 130);
    }

    #[test]
    fn numbers_have_containerds_units() {
        let mut metrics = Metrics::default();
        metrics.cpu.usage_ns = 5_000_000;
        metrics.memory.usage = 7;
        metrics.pids.current = 3;
        metrics.memory.pressure = Some(Pressure {
            some: PressureLine {
                avg10: 150,
                total_ns: 9_000,
                ..PressureLine::default()
            },
            ..Pressure::default()
        });
        let any = encode(&metrics).unwrap();
        assert_eq!(any.type_url, TYPE);
        let read = proto::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(read.cpu.usage_usec, 5000);
        assert_eq!((read.memory.usage, read.memory.usage_limit), (7, u64::MAX));
        assert_eq!(read.pids.current, 3);
        let some = &read.memory.psi.some;
        assert_eq!((some.avg10, some.total), (1.5, 9));
    }
}
