//! What containerd is told: events in the order in which they happened, kept while containerd is
//! restarted.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use hull_sandbox::store::unix_time_ns;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField, MessageFull};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::bootstrap::timestamp;
use crate::flags::Flags;

/// Events that wait for containerd. A guest decides how many there are: further ones are lost.
const AHEAD: usize = 2048;

/// How often an event is tried, and the first pause, which doubles: within a quarter of a minute a
/// containerd that is restarted is back.
const TRIES: u32 = 6;
const PAUSE: Duration = Duration::from_millis(500);

/// How long containerd may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An event of a task, with its topic.
pub trait TaskEvent: MessageFull {
    /// Its topic.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:expr),* $(,)?) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = $topic;
        })*
    };
}

topics! {
    TaskCreate => topics::TASK_CREATE_EVENT_TOPIC,
    TaskStart => topics::TASK_START_EVENT_TOPIC,
    TaskOOM => topics::TASK_OOM_EVENT_TOPIC,
    TaskExit => topics::TASK_EXIT_EVENT_TOPIC,
    TaskDelete => topics::TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => topics::TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => topics::TASK_RESUMED_EVENT_TOPIC,
}

/// Tells containerd what happens.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
}

/// How containerd is reached.
enum Way {
    /// Its ttrpc socket.
    Ttrpc(String),
    /// Its executable, as before containerd 1.5.
    Binary {
        executable: PathBuf,
        address: String,
    },
    /// Not at all: CRI-O asks instead.
    None,
}

impl Publisher {
    /// Begins, with the task that publishes: it ends when this is dropped and all is told.
    pub fn start(flags: &Flags) -> (Self, JoinHandle<()>) {
        let way = match std::env::var("TTRPC_ADDRESS") {
            Ok(address) if !address.is_empty() => Way::Ttrpc(match address.contains("://") {
                true => address,
                false => format!("unix://{address}"),
            }),
            _ if flags.publish_binary.as_os_str().is_empty() => Way::None,
            _ => Way::Binary {
                executable: flags.publish_binary.clone(),
                address: flags.address.clone(),
            },
        };
        let (queue, waiting) = mpsc::channel(AHEAD);
        let publishing = tokio::spawn(publish_all(way, waiting));
        let publisher = Self {
            namespace: flags.namespace.clone(),
            queue,
        };
        (publisher, publishing)
    }

    /// Tells of an event that a guest can make happen as often as it wants: further ones are left
    /// out while many others wait.
    pub fn publish_if_idle<E: TaskEvent>(&self, event: &E) {
        if self.queue.capacity() > AHEAD / 2 {
            self.publish(event);
        }
    }

    /// Tells of an event that happens now.
    pub fn publish<E: TaskEvent>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!("cannot encode an event: {error}"),
        };
        let event = Any {
            type_url: E::descriptor().full_name().to_owned(),
            value,
            ..Any::default()
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(unix_time_ns())),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::warn!(
                "an event is lost ({}): containerd does not take them",
                E::TOPIC
            );
        }
    }
}

async fn publish_all(way: Way, mut waiting: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = waiting.recv().await {
        let mut pause = PAUSE;
        for tried in 1.. {
            let outcome = match &way {
                Way::None => break,
                Way::Ttrpc(address) => forward(address, &mut client, &envelope).await,
                Way::Binary {
                    executable,
                    address,
                } => execute(executable.clone(), address.clone(), envelope.clone()).await,
            };
            let Err(error) = outcome else { break };
            client = None;
            if tried == TRIES {
                tracing::warn!("an event is lost ({}): {error}", envelope.topic);
                break;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: &Envelope,
) -> Result<(), String> {
    if client.is_none() {
        let connected = Client::connect(address).await;
        *client = Some(EventsClient::new(
            connected.map_err(|error| error.to_string())?,
        ));
    }
    let Some(events) = client else { return Ok(()) };
    let mut context = ttrpc::context::with_duration(TIMEOUT);
    context.set(
        "containerd-namespace-ttrpc".to_owned(),
        vec![envelope.namespace.clone()],
    );
    let request = ForwardRequest {
        envelope: MessageField::some(envelope.clone()),
        ..ForwardRequest::default()
    };
    let answer = events.forward(context, &request).await;
    answer.map(drop).map_err(|error| error.to_string())
}

async fn execute(executable: PathBuf, address: String, envelope: Envelope) -> Result<(), String> {
    let publishing = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        use std::io::Write;
        let mut child = Command::new(&executable)
            .args(["--address", &address, "publish", "--topic", &envelope.topic])
            .args(["--namespace", &envelope.namespace])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            let event = envelope.event.get_or_default().write_to_bytes();
            stdin.write_all(&event.map_err(std::io::Error::other)?)?;
        }
        match child.wait()?.success() {
            true => Ok(()),
            false => Err(std::io::Error::other(format!(
                "{} publish failed",
                executable.display()
            ))),
        }
    });
    match publishing.await {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}
