//! A client of containerd's CRI service, as the kubelet is one: of its messages, what the tests
//! need, by the numbers of `runtime.v1` (k8s.io/cri-api).

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

use crate::BUSYBOX;

/// Name and place of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Unique.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Its namespace in Kubernetes.
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// A pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodConfig {
    /// Its name.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodMetadata>,
    /// Its host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where logs of its containers are.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// How names are resolved.
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    /// What others know of it.
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    /// What only Linux has.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPod>,
}

/// How names are resolved.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    /// Addresses of servers.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Domains that are tried.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
}

/// What only Linux has.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPod {
    /// Control group above those of its containers.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
    /// Namespaces.
    #[prost(message, optional, tag = "2")]
    pub security: Option<PodSecurity>,
    /// Kernel parameters.
    #[prost(map = "string, string", tag = "3")]
    pub sysctls: HashMap<String, String>,
    /// The sum of what its containers ask for.
    #[prost(message, optional, tag = "5")]
    pub resources: Option<Resources>,
}

/// Namespaces of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodSecurity {
    /// Which ones are shared.
    #[prost(message, optional, tag = "1")]
    pub namespaces: Option<Namespaces>,
}

/// Which namespaces are shared: 0 by the pod, 1 by nobody, 2 with the host, 3 with a container.
#[derive(Clone, PartialEq, Message)]
pub struct Namespaces {
    /// The network.
    #[prost(int32, tag = "1")]
    pub network: i32,
    /// Processes.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// IPC.
    #[prost(int32, tag = "3")]
    pub ipc: i32,
    /// The container, for 3.
    #[prost(string, tag = "4")]
    pub target: String,
    /// Users.
    #[prost(message, optional, tag = "5")]
    pub users: Option<Users>,
}

/// A user namespace.
#[derive(Clone, PartialEq, Message)]
pub struct Users {
    /// 0: the pod's own.
    #[prost(int32, tag = "1")]
    pub mode: i32,
    /// Maps of users.
    #[prost(message, repeated, tag = "2")]
    pub uids: Vec<IdMapping>,
    /// Maps of groups.
    #[prost(message, repeated, tag = "3")]
    pub gids: Vec<IdMapping>,
}

/// A range of ids.
#[derive(Clone, PartialEq, Message)]
pub struct IdMapping {
    /// The first of the host.
    #[prost(uint32, tag = "1")]
    pub host: u32,
    /// The first of the container.
    #[prost(uint32, tag = "2")]
    pub container: u32,
    /// How many.
    #[prost(uint32, tag = "3")]
    pub length: u32,
}

impl Namespaces {
    /// What a pod has that says nothing: all but processes are shared.
    pub fn own_processes() -> Self {
        Self {
            pid: 1,
            ..Self::default()
        }
    }
}

/// Limits.
#[derive(Clone, PartialEq, Message)]
pub struct Resources {
    /// Microseconds.
    #[prost(int64, tag = "1")]
    pub cpu_period: i64,
    /// Microseconds per period.
    #[prost(int64, tag = "2")]
    pub cpu_quota: i64,
    /// Bytes.
    #[prost(int64, tag = "4")]
    pub memory: i64,
}

/// A container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerConfig {
    /// Its name.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<ContainerMetadata>,
    /// Its image.
    #[prost(message, optional, tag = "2")]
    pub image: Option<Image>,
    /// Its command.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// Directories and files of the host.
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    /// Name of its log in the pod's directory.
    #[prost(string, tag = "11")]
    pub log_path: String,
    /// What only Linux has.
    #[prost(message, optional, tag = "15")]
    pub linux: Option<LinuxContainer>,
}

/// A container of the image [`BUSYBOX`] that runs a shell script.
pub fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(Image {
            image: BUSYBOX.to_owned(),
        }),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        log_path: format!("{name}.log"),
        linux: Some(linux(0, Namespaces::own_processes())),
        ..ContainerConfig::default()
    }
}

/// A limit of memory (bytes; 0: none), and namespaces.
pub fn linux(memory: i64, namespaces: Namespaces) -> LinuxContainer {
    LinuxContainer {
        resources: Some(Resources {
            memory,
            ..Resources::default()
        }),
        security: Some(ContainerSecurity {
            namespaces: Some(namespaces),
            ..ContainerSecurity::default()
        }),
    }
}

/// Name of a container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerMetadata {
    /// The name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// How often it was restarted.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
}

/// An image by name.
#[derive(Clone, PartialEq, Message)]
pub struct Image {
    /// The name.
    #[prost(string, tag = "1")]
    pub image: String,
}

/// A directory or file of the host.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    /// Where it is in the container.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Where it is on the host.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Only for reading.
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    /// Maps of users.
    #[prost(message, repeated, tag = "6")]
    pub uids: Vec<IdMapping>,
    /// Maps of groups.
    #[prost(message, repeated, tag = "7")]
    pub gids: Vec<IdMapping>,
}

/// What only Linux has.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxContainer {
    /// Limits.
    #[prost(message, optional, tag = "1")]
    pub resources: Option<Resources>,
    /// Namespaces.
    #[prost(message, optional, tag = "2")]
    pub security: Option<ContainerSecurity>,
}

/// Privileges and namespaces of a container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerSecurity {
    /// All privileges.
    #[prost(bool, tag = "2")]
    pub privileged: bool,
    /// Which namespaces are shared.
    #[prost(message, optional, tag = "3")]
    pub namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<PodConfig>,
    #[prost(string, tag = "2")]
    handler: String,
}

/// A request with an id and nothing else, and an answer with one.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct Pods {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Id>,
}

#[derive(Clone, PartialEq, Message)]
struct Create {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct Stop {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Update {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "2")]
    linux: Option<Resources>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSync {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

/// What a command in a container printed, and its exit status.
#[derive(Clone, PartialEq, Message)]
pub struct Executed {
    /// Standard output.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// Standard error.
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    /// Exit status.
    #[prost(int32, tag = "3")]
    pub status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

/// What is known of a container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatus {
    /// 0 created, 1 running, 2 exited, 3 unknown.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Its exit status.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// Why it has ended, in one word.
    #[prost(string, tag = "10")]
    pub reason: String,
    /// The same for people.
    #[prost(string, tag = "11")]
    pub message: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<PodStatus>,
}

/// What is known of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodStatus {
    /// 0 ready, 1 not ready.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Its network.
    #[prost(message, optional, tag = "5")]
    pub network: Option<PodNetwork>,
}

/// The network of a pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodNetwork {
    /// Its address.
    #[prost(string, tag = "1")]
    pub ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatsAnswer {
    #[prost(message, optional, tag = "1")]
    stats: Option<Stats>,
}

/// What a container uses.
#[derive(Clone, PartialEq, Message)]
pub struct Stats {
    /// Processors.
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<Cpu>,
    /// Memory.
    #[prost(message, optional, tag = "3")]
    pub memory: Option<Memory>,
}

/// Use of processors.
#[derive(Clone, PartialEq, Message)]
pub struct Cpu {
    /// Nanoseconds in all.
    #[prost(message, optional, tag = "2")]
    pub usage: Option<Number>,
}

/// Use of memory.
#[derive(Clone, PartialEq, Message)]
pub struct Memory {
    /// Bytes that are needed.
    #[prost(message, optional, tag = "2")]
    pub working_set: Option<Number>,
}

/// A number that may be absent.
#[derive(Clone, PartialEq, Message)]
pub struct Number {
    /// The number.
    #[prost(uint64, tag = "1")]
    pub value: u64,
}

/// A connection to a CRI service.
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

type Answer<T> = Result<T, String>;

impl Cri {
    /// Connects to a socket.
    pub fn connect(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
        let endpoint = endpoint.timeout(Duration::from_secs(60));
        let channel = runtime.block_on(endpoint.connect()).unwrap();
        Self { runtime, channel }
    }

    fn call<Q, A>(&self, method: &str, request: Q) -> Answer<A>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let path = format!("/runtime.v1.RuntimeService/{method}");
        let path: PathAndQuery = path.parse().unwrap();
        self.runtime.block_on(async {
            let mut client = Grpc::new(self.channel.clone());
            client.ready().await.map_err(|error| error.to_string())?;
            let codec = tonic_prost::ProstCodec::<Q, A>::default();
            let answer = client.unary(tonic::Request::new(request), path, codec);
            let answer = answer.await.map_err(|status| status.message().to_owned())?;
            Ok(answer.into_inner())
        })
    }

    /// Starts a pod; its id.
    pub fn run_pod(&self, config: &PodConfig, handler: &str) -> Answer<String> {
        let request = RunPod {
            config: Some(config.clone()),
            handler: handler.to_owned(),
        };
        Ok(self.call::<_, Id>("RunPodSandbox", request)?.id)
    }

    /// Stops and removes a pod, with its containers.
    pub fn remove_pod(&self, id: &str) -> Answer<()> {
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            self.call::<_, Nothing>(method, Id { id: id.into() })?;
        }
        Ok(())
    }

    /// Ids of all pods.
    pub fn pods(&self) -> Vec<String> {
        let pods: Pods = self.call("ListPodSandbox", Nothing {}).unwrap();
        pods.items.into_iter().map(|pod| pod.id).collect()
    }

    /// What is known of a pod.
    pub fn pod(&self, id: &str) -> PodStatus {
        let answer: PodStatusAnswer = self.call("PodSandboxStatus", Id { id: id.into() }).unwrap();
        answer.status.unwrap()
    }

    /// Creates a container in a pod; its id.
    pub fn create(&self, pod: &str, of: &PodConfig, config: ContainerConfig) -> Answer<String> {
        let request = Create {
            pod: pod.to_owned(),
            config: Some(config),
            pod_config: Some(of.clone()),
        };
        Ok(self.call::<_, Id>("CreateContainer", request)?.id)
    }

    /// Starts a container.
    pub fn start(&self, id: &str) -> Answer<()> {
        self.call::<_, Nothing>("StartContainer", Id { id: id.into() })
            .map(drop)
    }

    /// Stops a container.
    pub fn stop(&self, id: &str, timeout: i64) -> Answer<()> {
        let id = id.to_owned();
        self.call::<_, Nothing>("StopContainer", Stop { id, timeout })
            .map(drop)
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Answer<()> {
        self.call::<_, Nothing>("RemoveContainer", Id { id: id.into() })
            .map(drop)
    }

    /// Changes limits.
    pub fn update(&self, id: &str, linux: Resources) -> Answer<()> {
        let request = Update {
            id: id.to_owned(),
            linux: Some(linux),
        };
        self.call::<_, Nothing>("UpdateContainerResources", request)
            .map(drop)
    }

    /// Executes a command.
    pub fn exec(&self, id: &str, command: &[&str]) -> Answer<Executed> {
        let request = ExecSync {
            id: id.to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 30,
        };
        self.call("ExecSync", request)
    }

    /// What is known of a container.
    pub fn container(&self, id: &str) -> ContainerStatus {
        let answer: ContainerStatusAnswer =
            self.call("ContainerStatus", Id { id: id.into() }).unwrap();
        answer.status.unwrap()
    }

    /// What a container uses.
    pub fn stats(&self, id: &str) -> Stats {
        let answer: StatsAnswer = self.call("ContainerStats", Id { id: id.into() }).unwrap();
        answer.stats.unwrap()
    }
}
