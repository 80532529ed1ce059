//! The task service: containerd's calls about containers and their processes. The messages of
//! versions 2 and 3 are the same; both names are answered.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::shim_async::Task;
use hull_oci::bundle::process_for_guest;
use hull_oci::commands::wall;
use hull_oci::container::state;
use hull_oci::{guest_spec, hooks, update};
use hull_sandbox::config::{ProcessConfig, RawArgs, Stdio, TerminalSize};
use hull_sandbox::store::{Exit, State};
use hull_sandbox::{Context, Error, ErrorKind, Result};
use oci_spec::runtime::LinuxResources;
use protobuf::{EnumOrUnknown, MessageField};
use serde_json::Value;
use serde_json::value::to_raw_value;
use ttrpc::asynchronous::TtrpcContext;

use crate::bootstrap::timestamp;
use crate::pod::{Container, Pod};
use crate::process::{Process, lock};
use crate::stdio::Paths;
use crate::{create, metrics, text};

const SIGKILL: u32 = 9;

/// The service of a pod's shim.
pub struct TaskService(pub Arc<Pod>);

impl TaskService {
    fn answer<T>(&self, result: Result<T>) -> ttrpc::Result<T> {
        answer(&self.0, result)
    }

    fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>> {
        self.0.container(id)?.process(exec)
    }

    async fn start_init(&self, container: &Arc<Container>) -> Result<()> {
        let init = &container.init;
        let _announcing = init.announcing.lock().await;
        container.inner.start().await.map_err(with_words)?;
        self.0.events.publish(&TaskStart {
            container_id: container.id.clone(),
            pid: init.pid.unsigned_abs(),
            ..TaskStart::default()
        });
        run_hooks(container, State::Running).await;
        Ok(())
    }

    async fn start_exec(&self, container: &Arc<Container>, exec: Arc<Process>) -> Result<()> {
        let _announcing = exec.announcing.lock().await;
        let Some(added) = lock(&exec.added).take() else {
            return Err(Error::wrong_state(format!(
                "process {} was started before",
                exec.exec
            )));
        };
        let started = async {
            let opened = exec
                .paths
                .open(&container.id, &self.0.namespace, &self.0.streams)
                .await?;
            let config = ProcessConfig {
                container: container.id.clone(),
                process: added,
                raw: RawArgs::default(),
                stdio: Stdio::Handover {
                    terminal: exec.paths.terminal,
                    stdin: exec.paths.terminal || opened.has_stdin(),
                },
                keeper: None,
                size: None,
            };
            let mut process = container.inner.exec(config).await.map_err(with_words)?;
            match opened.connect(process.take_streams()) {
                Ok(io) => Ok(exec.enter(process, io)),
                Err(error) => {
                    // It may have ended already.
                    let _ = process.kill().await;
                    process.wait().await;
                    Err(error)
                }
            }
        };
        let process = started.await.inspect_err(|_| exec.failed())?;
        self.0.events.publish(&TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: exec.exec.clone(),
            pid: exec.pid.unsigned_abs(),
            ..TaskExecStarted::default()
        });
        let pod = self.0.clone();
        tokio::spawn(create::conclude_exec(pod, exec.clone(), process));
        Ok(())
    }

    async fn delete_init(&self, container: &Arc<Container>) -> Result<Exit> {
        let mut deleted = container.deleted.lock().await;
        if let Some(exit) = &*deleted {
            return Ok(exit.clone());
        }
        let state = container.inner.state();
        if !matches!(state, State::Stopped | State::Created) {
            return Err(Error::wrong_state(format!(
                "cannot delete container {} that is {state}",
                container.id
            )));
        }
        // Frozen processes cannot end.
        let record = lock(&container.record).clone();
        record.details.groups.thaw();
        container.inner.delete().await?;
        let exit = container.init.ended().await;
        container.init.drained().await;
        run_hooks(container, State::Stopped).await;
        self.0.let_go_of(record.details.groups).await;
        if let Err(error) = container.stored.remove() {
            tracing::warn!("{error}");
        }
        self.0.remove(container);
        self.tell_deleted(&container.init, &exit);
        *deleted = Some(exit.clone());
        Ok(exit)
    }

    fn tell_deleted(&self, process: &Process, exit: &Exit) {
        self.0.events.publish(&TaskDelete {
            container_id: process.container.clone(),
            id: process.exec.clone(),
            pid: process.pid.unsigned_abs(),
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..TaskDelete::default()
        });
    }

    async fn delete_process(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = match process.is_init() {
            true => self.delete_init(&container).await?,
            false => {
                // Not while it is being started.
                let _started = process.announcing.lock().await;
                let exit = match (process.exit(), process.inner()) {
                    (Some(exit), _) => exit,
                    // It was never started.
                    (None, None) => Exit::now(0),
                    (None, Some(_)) => {
                        return Err(Error::wrong_state(format!(
                            "cannot delete process {} that is running",
                            process.exec
                        )));
                    }
                };
                process.drained().await;
                lock(&container.execs).remove(&process.exec);
                exit
            }
        };
        Ok(DeleteResponse {
            pid: process.pid.unsigned_abs(),
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..DeleteResponse::default()
        })
    }

    fn add_exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.0.container(&request.id)?;
        if container.inner.state() != State::Running {
            return Err(Error::wrong_state(format!(
                "cannot exec in a container that is {}",
                container.inner.state()
            )));
        }
        let spec = request.spec.get_or_default();
        let mut process: Value =
            serde_json::from_slice(&spec.value).context(|| "read the process")?;
        for note in process_for_guest(&mut process) {
            tracing::warn!("{note}");
        }
        if let Some(object) = process.as_object_mut() {
            object.insert("terminal".to_owned(), request.terminal.into());
        }
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let stand_in = container.stand_in.another()?;
        let mut exec = Process::new(&request.id, &request.exec_id, stand_in.pid, paths);
        exec.stand_in = Some(stand_in);
        *lock(&exec.added) = Some(to_raw_value(&process).context(|| "encode the process")?);
        let mut execs = lock(&container.execs);
        if execs.contains_key(&request.exec_id) {
            return Err(Error::exists(format!(
                "process {:?} exists already",
                request.exec_id
            )));
        }
        execs.insert(request.exec_id.clone(), Arc::new(exec));
        drop(execs);
        self.0.events.publish(&TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    async fn signal(&self, request: KillRequest) -> Result<()> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        if !process.is_init() {
            // Not while it is being started.
            drop(process.announcing.lock().await);
        }
        // containerd looks for this kind.
        let finished = || Error::not_found("process already finished");
        if process.exit().is_some() {
            return Err(finished());
        }
        let signalled = match (process.is_init(), process.inner()) {
            (true, _) => {
                if request.signal == SIGKILL {
                    // As in runc: whoever is killed may be frozen from outside.
                    lock(&container.record).details.groups.thaw();
                }
                let all = request.all || request.signal == SIGKILL;
                container.inner.signal(request.signal, all).await
            }
            (false, Some(inner)) => inner.signal(request.signal).await,
            (false, None) => {
                return Err(Error::wrong_state(format!(
                    "process {} is not started",
                    process.exec
                )));
            }
        };
        signalled.map_err(|error| match error.kind {
            ErrorKind::NotFound | ErrorKind::WrongState => finished(),
            _ => error,
        })
    }

    async fn freeze(&self, id: &str, frozen: bool) -> Result<()> {
        let container = self.0.container(id)?;
        container.inner.set_frozen(frozen).await?;
        match frozen {
            true => self.0.events.publish(&TaskPaused {
                container_id: container.id.clone(),
                ..TaskPaused::default()
            }),
            false => self.0.events.publish(&TaskResumed {
                container_id: container.id.clone(),
                ..TaskResumed::default()
            }),
        }
        Ok(())
    }

    async fn freeze_to_the_end(&self, id: String, frozen: bool) -> ttrpc::Result<Empty> {
        let service = Self(self.0.clone());
        let freezing = async move { service.freeze(&id, frozen).await.map(empty) };
        to_the_end(&self.0, freezing).await
    }

    async fn limit(&self, request: UpdateTaskRequest) -> Result<()> {
        let container = self.0.container(&request.id)?;
        let change = &request.resources.get_or_default().value;
        let mut change: LinuxResources =
            serde_json::from_slice(change).context(|| "read the resources")?;
        let record = lock(&container.record).clone();
        let current = container.stored.resources(&record)?;
        update::complete(&mut change, &current);
        let (guest, notes) = guest_spec::limits(&change)?;
        for note in notes {
            tracing::warn!("{note}");
        }
        container.inner.update(&guest).await?;
        // The others of a pod have no control group on the host.
        if record.details.bounds.is_some() {
            let groups = &record.details.groups;
            groups.apply(&change, wall(&record, &change))?;
        }
        let record = {
            let mut record = lock(&container.record);
            record.details.resources = Some(update::merge(&current, &change)?);
            record.clone()
        };
        container.stored.store(&record)
    }

    fn state_of(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let status = match (&exit, process.is_init(), process.inner()) {
            (Some(_), ..) => Status::STOPPED,
            (None, true, _) => match container.inner.state() {
                State::Creating | State::Created => Status::CREATED,
                State::Running => Status::RUNNING,
                State::Paused => Status::PAUSED,
                // Its end is being announced.
                State::Stopped => Status::RUNNING,
            },
            (None, false, Some(_)) => Status::RUNNING,
            (None, false, None) => Status::CREATED,
        };
        let exit = exit.unwrap_or_else(|| Exit {
            at_ns: 0,
            ..Exit::now(0)
        });
        Ok(StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: container.bundle.clone(),
            pid: process.pid.unsigned_abs(),
            status: EnumOrUnknown::new(status),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..StateResponse::default()
        })
    }

    async fn resize(&self, request: ResizePtyRequest) -> Result<()> {
        let process = self.process(&request.id, &request.exec_id)?;
        let number = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let size = TerminalSize {
            rows: number(request.height),
            columns: number(request.width),
        };
        match process.inner() {
            Some(inner) => inner.resize(size).await,
            // The size comes with the start.
            None => {
                let mut added = lock(&process.added);
                let Some(spec) = &*added else { return Ok(()) };
                let mut spec: Value =
                    serde_json::from_str(spec.get()).context(|| "read the process")?;
                spec["consoleSize"] = size.to_oci();
                *added = Some(to_raw_value(&spec).context(|| "encode the process")?);
                Ok(())
            }
        }
    }
}

/// An error as containerd knows it.
pub fn answer<T>(pod: &Pod, result: Result<T>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        match error.kind {
            // containerd asks to be sure.
            ErrorKind::NotFound => tracing::debug!("{}", text(&error)),
            _ => tracing::warn!("{}", text(&error)),
        }
        let code = (pod.settings.grpc)(error.kind);
        let code = <ttrpc::Code as protobuf::Enum>::from_i32(code);
        let code = code.unwrap_or(ttrpc::Code::UNKNOWN);
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, text(&error)))
    })
}

/// Makes a call to its end, whether or not containerd still waits for the answer: a deadline of the
/// kubelet, or a restart of containerd, leaves nothing half done.
pub async fn to_the_end<T: Send + 'static>(
    pod: &Arc<Pod>,
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let work = pod.work();
    let calling = tokio::spawn(async move {
        let result = call.await;
        drop(work);
        result
    });
    let result = calling.await.context(|| "make the call");
    answer(pod, result.and_then(|result| result))
}

/// The words that engines look for when a command is not there.
fn with_words(error: Error) -> Error {
    hull_oci::commands::with_runc_wording(error)
}

/// Hooks whose failures are logged and nothing else, as the specification says.
async fn run_hooks(container: &Arc<Container>, to: State) {
    let Some(hooks) = create::hooks_of(&container.stored) else {
        return;
    };
    let pid = match to {
        State::Stopped => 0,
        _ => container.init.pid,
    };
    let state = state(&lock(&container.record), to, pid);
    let running = tokio::task::spawn_blocking(move || {
        let warn = |warning: &str| tracing::warn!("{warning}");
        match to {
            State::Stopped => hooks::run_all("poststop", hooks.poststop().as_ref(), &state, warn),
            _ => hooks::run_all("poststart", hooks.poststart().as_ref(), &state, warn),
        }
    });
    // A hook does not panic.
    let _ = running.await;
}

fn empty<T>(_: T) -> Empty {
    Empty::default()
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.0.clone();
        let creating = async move {
            let created = create::create(&pod, &request).await.map_err(with_words);
            created.map(|container| CreateTaskResponse {
                pid: container.init.pid.unsigned_abs(),
                ..CreateTaskResponse::default()
            })
        };
        to_the_end(&self.0, creating).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let service = Self(self.0.clone());
        let starting = async move {
            let container = service.0.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
            match process.is_init() {
                true => service.start_init(&container).await?,
                false => service.start_exec(&container, process.clone()).await?,
            }
            Ok(StartResponse {
                pid: process.pid.unsigned_abs(),
                ..StartResponse::default()
            })
        };
        to_the_end(&self.0, starting).await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let service = Self(self.0.clone());
        let deleting = async move { service.delete_process(request).await };
        to_the_end(&self.0, deleting).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.answer(self.add_exec(request).map(empty))
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.answer(self.resize(request).await.map(empty))
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.answer(self.state_of(&request))
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        // Process ids of the guest mean nothing on the host, where containerd's clients look them
        // up.
        let pids = self.0.container(&request.id).map(|container| PidsResponse {
            processes: vec![ProcessInfo {
                pid: container.init.pid.unsigned_abs(),
                ..ProcessInfo::default()
            }],
            ..PidsResponse::default()
        });
        self.answer(pids)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.freeze_to_the_end(request.id, true).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.freeze_to_the_end(request.id, false).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.answer(Err(Error::unsupported("checkpoints of containers")))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let service = Self(self.0.clone());
        let signalling = async move { service.signal(request).await.map(empty) };
        to_the_end(&self.0, signalling).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let closed = self.process(&request.id, &request.exec_id).map(|process| {
            if request.stdin
                && let Some(io) = process.io()
            {
                io.close_input();
            }
        });
        self.answer(closed.map(empty))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let service = Self(self.0.clone());
        let limiting = async move { service.limit(request).await.map(empty) };
        to_the_end(&self.0, limiting).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.answer(self.process(&request.id, &request.exec_id))?;
        let exit = process.ended().await;
        Ok(WaitResponse {
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = async {
            let container = self.0.container(&request.id)?;
            let metrics = match container.holds_pod {
                true => metrics::overhead(&self.0).await?,
                false => container.inner.metrics().await?,
            };
            Ok(StatsResponse {
                stats: MessageField::some(
                    metrics::encode(&metrics).context(|| "encode the metrics")?,
                ),
                ..StatsResponse::default()
            })
        };
        self.answer(stats.await)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let container = self.0.container(&request.id).ok();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.map_or(0, |container| container.init.pid.unsigned_abs()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // containerd says so after each container that it deletes.
        self.0.leave_if_over();
        Ok(api::Empty::default())
    }
}
