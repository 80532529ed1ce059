//! The sandbox service of containerd 2 (`sandboxer = "shim"`): a pod without a container that holds
//! it. The machine is booted when containerd starts the sandbox, and ends when it stops it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as Service;
use containerd_shim_protos::types::platform::Platform;
use hull_oci::guest_spec::Network;
use hull_oci::limits;
use hull_sandbox::config::{CgroupConfig, EndPolicy, is_network_sysctl};
use hull_sandbox::store::{Exit, unix_time_ns};
use hull_sandbox::{Context, Error, Reason, Result};
use protobuf::MessageField;
use ttrpc::asynchronous::TtrpcContext;

use crate::boot::{self, Wanted};
use crate::bootstrap::timestamp;
use crate::metrics;
use crate::pod::{Pod, blocking};
use crate::process::lock;
use crate::stand_in::StandIn;
use crate::task::{answer, to_the_end};
use crate::wire::{Value, fields, text};

/// What the CRI plugin looks for.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// What holds a pod that has no container for that.
pub struct Holder {
    /// What containerd asked for.
    config: PodConfig,
    /// Where the pod's network is.
    network: Network,
    /// What stands for the pod on the host, once it is started.
    pub stand_in: Option<StandIn>,
    started_ns: u64,
    exit: Option<Exit>,
}

/// What of a pod's configuration decides about its machine: fields of `PodSandboxConfig` in
/// `runtime.v1` (k8s.io/cri-api), by their numbers there.
#[derive(Debug, Default, PartialEq, Eq)]
struct PodConfig {
    hostname: String,
    /// Lines of resolv.conf.
    resolver: String,
    cgroup_parent: String,
    annotations: BTreeMap<String, String>,
    sysctls: HashMap<String, String>,
    memory: i64,
    cpu_quota: i64,
    cpu_period: i64,
}

impl PodConfig {
    /// Reads it; what is not known is left out.
    fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut config = Self::default();
        fields(bytes, |number, value| {
            match (number, value) {
                (2, Value::Bytes(name)) => config.hostname = text(name),
                (4, Value::Bytes(dns)) => config.resolver = resolver(dns)?,
                (7, Value::Bytes(bytes)) => config.annotations.extend([entry(bytes)?]),
                (8, Value::Bytes(linux)) => config.linux(linux)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(config)
    }

    fn linux(&mut self, bytes: &[u8]) -> protobuf::Result<()> {
        fields(bytes, |number, value| {
            match (number, value) {
                (1, Value::Bytes(parent)) => self.cgroup_parent = text(parent),
                (3, Value::Bytes(bytes)) => self.sysctls.extend([entry(bytes)?]),
                (5, Value::Bytes(resources)) => fields(resources, |number, value| {
                    match (number, value) {
                        (1, Value::Number(period)) => self.cpu_period = period.cast_signed(),
                        (2, Value::Number(quota)) => self.cpu_quota = quota.cast_signed(),
                        (4, Value::Number(memory)) => self.memory = memory.cast_signed(),
                        _ => {}
                    }
                    Ok(())
                })?,
                _ => {}
            }
            Ok(())
        })
    }
}

/// An entry of a map of texts.
fn entry(bytes: &[u8]) -> protobuf::Result<(String, String)> {
    let (mut name, mut content) = (String::new(), String::new());
    fields(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => name = text(bytes),
            (2, Value::Bytes(bytes)) => content = text(bytes),
            _ => {}
        }
        Ok(())
    })?;
    Ok((name, content))
}

/// A resolv.conf (resolv.conf(5)) of a `DNSConfig`.
fn resolver(bytes: &[u8]) -> protobuf::Result<String> {
    let (mut servers, mut searches, mut options) = (String::new(), Vec::new(), Vec::new());
    fields(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(server)) => {
                servers.push_str(&format!("nameserver {}\n", text(server)))
            }
            (2, Value::Bytes(search)) => searches.push(text(search)),
            (3, Value::Bytes(option)) => options.push(text(option)),
            _ => {}
        }
        Ok(())
    })?;
    for (word, values) in [("search", searches), ("options", options)] {
        if !values.is_empty() {
            servers.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    }
    Ok(servers)
}

/// The service of a pod's shim.
pub struct SandboxService(pub Arc<Pod>);

impl SandboxService {
    fn create(&self, request: &CreateSandboxRequest) -> Result<()> {
        let options = &request.options.get_or_default().value;
        let config = PodConfig::parse(options).context(|| "read the pod's configuration")?;
        if let Some(name) = config.sysctls.keys().find(|name| !is_network_sysctl(name)) {
            return Err(Error::unsupported(format_args!(
                "kernel parameter {name} of a pod: containers have those of namespaces but the \
                 network's"
            ))
            .hint("sandboxer = \"podsandbox\""));
        }
        let network = match request.netns_path.is_empty() {
            // The pod asks for the host's.
            true => {
                return Err(Error::unsupported(
                    "a pod in the host's network: a guest has a network of its own",
                )
                .hint("without hostNetwork"));
            }
            false => Network::Path(PathBuf::from(&request.netns_path)),
        };
        let mut holder = lock(&self.0.holder);
        if holder.is_some() {
            return Err(Error::exists("the sandbox is there already"));
        }
        *holder = Some(Holder {
            config,
            network,
            stand_in: None,
            started_ns: 0,
            exit: None,
        });
        Ok(())
    }

    /// What the machine is made of, and its network.
    fn wanted(&self) -> Result<(Wanted, Network)> {
        let holder = lock(&self.0.holder);
        let Some(Holder {
            config, network, ..
        }) = &*holder
        else {
            return Err(Error::not_found("the sandbox was not created"));
        };
        let memory = u64::try_from(config.memory)
            .ok()
            .filter(|memory| *memory > 0);
        let period = u64::try_from(config.cpu_period).unwrap_or_default();
        let cpus = limits::quota(config.cpu_quota, period);
        let mut wanted = Wanted::new(&self.0, memory, cpus, &config.annotations)?;
        wanted.end = EndPolicy::Explicit;
        wanted.expect_disks();
        if !config.hostname.is_empty() {
            wanted.hostname.clone_from(&config.hostname);
        }
        if !config.cgroup_parent.is_empty() {
            wanted.cgroup = CgroupConfig::Own {
                parent: PathBuf::from(&config.cgroup_parent),
            };
        }
        Ok((wanted, network.clone()))
    }

    async fn start(&self) -> Result<StartSandboxResponse> {
        let _creating = self.0.creating.lock().await;
        self.0.stays()?;
        if self.0.sandbox().is_some() {
            return Err(Error::wrong_state("the sandbox was started before"));
        }
        let (wanted, network) = self.wanted()?;
        let stand_in = blocking(move || StandIn::start(&network)).await?;
        let (sandbox, hold) = wanted.boot(&self.0, Vec::new()).await?;
        if let Err(error) = boot::connect(&self.0, &sandbox, &stand_in).await {
            sandbox.shutdown(Reason::Removed);
            sandbox.ended().await;
            self.0.set_sandbox(None);
            return Err(error);
        }
        drop(hold);
        let pid = stand_in.pid;
        let started_ns = unix_time_ns();
        if let Some(holder) = &mut *lock(&self.0.holder) {
            holder.stand_in = Some(stand_in);
            holder.started_ns = started_ns;
        }
        let pod = self.0.clone();
        tokio::spawn(async move {
            let ended = sandbox.ended().await;
            if let Some(holder) = &mut *lock(&pod.holder) {
                holder.exit = Some(Exit::because(0, ended.reason));
            }
        });
        Ok(StartSandboxResponse {
            pid: pid.unsigned_abs(),
            created_at: MessageField::some(timestamp(started_ns)),
            ..StartSandboxResponse::default()
        })
    }

    async fn wait(&self) -> Result<Exit> {
        let sandbox = self.0.sandbox();
        let sandbox = sandbox.ok_or_else(|| Error::not_found("the sandbox was not started"))?;
        let ended = sandbox.ended().await;
        Ok(Exit::because(0, ended.reason))
    }

    fn status(&self, id: &str) -> Result<SandboxStatusResponse> {
        let holder = lock(&self.0.holder);
        let Some(holder) = &*holder else {
            return Err(Error::not_found(format!("there is no sandbox {id:?}")));
        };
        let ready = holder.stand_in.is_some() && holder.exit.is_none();
        let exited = holder.exit.as_ref().map_or(0, |exit| exit.at_ns);
        let pid = holder.stand_in.as_ref().map_or(0, |stand_in| stand_in.pid);
        let reason = holder.exit.as_ref().and_then(|exit| exit.reason.clone());
        Ok(SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            pid: pid.unsigned_abs(),
            state: if ready { READY } else { NOT_READY }.to_owned(),
            info: reason
                .map(|reason| HashMap::from([("reason".to_owned(), reason)]))
                .unwrap_or_default(),
            created_at: MessageField::some(timestamp(holder.started_ns)),
            exited_at: MessageField::some(timestamp(exited)),
            ..SandboxStatusResponse::default()
        })
    }

    fn answer<T>(&self, result: Result<T>) -> ttrpc::Result<T> {
        answer(&self.0, result)
    }
}

impl Pod {
    /// What containerd knows as the process id of the pod itself.
    pub fn holder_pid(&self) -> Option<i32> {
        let holder = lock(&self.holder);
        Some(holder.as_ref()?.stand_in.as_ref()?.pid)
    }

    /// Files that containers of a pod have which no container holds: elsewhere the CRI plugin
    /// writes them. Path and content.
    pub fn files(&self) -> Vec<(&'static str, String)> {
        let holder = lock(&self.holder);
        let Some(Holder { config, .. }) = &*holder else {
            return Vec::new();
        };
        let hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
        let mut files = vec![
            ("/etc/hosts", hosts.to_owned()),
            ("/etc/hostname", format!("{}\n", config.hostname)),
        ];
        if !config.resolver.is_empty() {
            files.push(("/etc/resolv.conf", config.resolver.clone()));
        }
        files
    }

    /// Kernel parameters of a pod that has no container which names them.
    pub fn sysctls(&self) -> HashMap<String, String> {
        let holder = lock(&self.holder);
        holder
            .as_ref()
            .map(|holder| holder.config.sysctls.clone())
            .unwrap_or_default()
    }
}

#[async_trait]
impl Service for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let created = self.create(&request);
        self.answer(created.map(|()| CreateSandboxResponse::default()))
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let service = Self(self.0.clone());
        to_the_end(&self.0, async move { service.start().await }).await
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".to_owned(),
                architecture: architecture.to_owned(),
                ..Platform::default()
            }),
            ..PlatformResponse::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        _: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.0.clone();
        let stopping = async move {
            // What is just being created is ended, too.
            let _creating = pod.creating.lock().await;
            pod.end(Reason::Terminated).await;
            Ok(StopSandboxResponse::default())
        };
        to_the_end(&self.0, stopping).await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.answer(self.wait().await)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.answer(self.status(&request.sandbox_id))
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> ttrpc::Result<PingResponse> {
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.0.clone();
        let ending = async move {
            pod.end(Reason::Removed).await;
            pod.leave();
            Ok(ShutdownSandboxResponse::default())
        };
        to_the_end(&self.0, ending).await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let metrics = async {
            let metrics = metrics::of_pod(&self.0).await?;
            let data = metrics::encode(&metrics).context(|| "encode the metrics")?;
            let mut response = SandboxMetricsResponse::default();
            // The message's type has no public name.
            let metric = response.metrics.mut_or_insert_default();
            metric.timestamp = MessageField::some(timestamp(unix_time_ns()));
            metric.id = request.sandbox_id;
            metric.data = MessageField::some(data);
            Ok(response)
        };
        self.answer(metrics.await)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_pod_s_configuration_is_read_by_its_numbers() {
        // hostname "web"; linux: cgroup_parent "/p", sysctls {"a": "1"}, resources 100000, 50000
        // and 256 bytes; a field that is not known.
        let resources = [
            0x08, 0xa0, 0x8d, 0x06, 0x10, 0xd0, 0x86, 0x03, 0x20, 0x80, 0x02,
        ];
        let mut linux = vec![
            0x0a, 2, b'/', b'p', 0x1a, 6, 0x0a, 1, b'a', 0x12, 1, b'1', 0x2a,
        ];
        linux.push(resources.len() as u8);
        linux.extend(resources);
        // And dns: a server, two domains and an option.
        let dns = [0x0a, 1, b'9', 0x12, 1, b'a', 0x12, 1, b'b', 0x1a, 1, b'o'];
        let mut pod = vec![0x12, 3, b'w', b'e', b'b', 0x78, 1, 0x22, dns.len() as u8];
        pod.extend(dns);
        pod.extend([0x42, linux.len() as u8]);
        pod.extend(linux);
        let config = PodConfig::parse(&pod).unwrap();
        assert_eq!(config.hostname, "web");
        assert_eq!(config.resolver, "nameserver 9\nsearch a b\noptions o\n");
        assert_eq!(config.cgroup_parent, "/p");
        assert_eq!(config.sysctls["a"], "1");
        let numbers = (config.cpu_period, config.cpu_quota, config.memory);
        assert_eq!(numbers, (100_000, 50_000, 256));
        assert!(PodConfig::parse(&[0x12, 200, 1]).is_err());
        assert_eq!(PodConfig::parse(&[]).unwrap(), PodConfig::default());
    }
}
