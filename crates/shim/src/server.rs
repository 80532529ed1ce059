//! The process that stays: the shim of a pod, from its first to its last moment.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use hull_sandbox::{BoundedLog, Context, Error, Reason, Result, role};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::{Server, transport};

use crate::Settings;
use crate::bootstrap::TOLD;
use crate::events::Publisher;
use crate::flags::Flags;
use crate::pod::Pod;
use crate::sandbox::SandboxService;
use crate::streaming;
use crate::task::TaskService;

/// The names of the task service. Its messages are the same in both.
const TASKS: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long what is created may take to come to its end when the shim is told to end.
const CREATING: Duration = Duration::from_secs(30);

/// How long work beside the event loop may go on at the end.
const LAST_WORK: Duration = Duration::from_secs(5);

/// How long containerd may take to read the last events.
const LAST_EVENTS: Duration = Duration::from_secs(10);

/// Runs the server until it has nothing left to do. Its standard input is the listening socket, its
/// standard output a pipe from `start`.
///
/// # Errors
/// Socket or pipe did not come, or cannot be served.
pub fn run(flags: Flags, settings: impl FnOnce() -> Result<Settings>) -> Result<()> {
    // It is executed as /proc/self/exe; people and their tools look for this name.
    let _ = rustix::thread::set_name(c"containerd-shim");
    // `start` has made it a process group of its own, whose leader cannot lead a session: signals
    // to containerd's group do not come here. If this fails, starting the machine reports a limit
    // that is too low.
    let _ = hull_jail::raise_open_files();
    log(&flags)?;
    let settings = settings()?;
    let (listener, starter) = inherited()?;
    let address = listener.local_addr().ok();
    let socket = address
        .as_ref()
        .and_then(|address| address.as_pathname())
        .map(PathBuf::from)
        .unwrap_or_default();
    role::enter_mount_namespace()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop")?;
    let served = runtime.block_on(serve(flags, settings, listener, socket, starter));
    // A hook that hangs keeps nobody here.
    runtime.shutdown_timeout(LAST_WORK);
    served
}

/// Messages go to the log that containerd reads; standard error is the sandbox's from its boot on.
fn log(flags: &Flags) -> Result<()> {
    let level = match flags.debug {
        true => tracing::Level::DEBUG,
        false => tracing::Level::INFO,
    };
    let log = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3);
    let log = File::from(log.context(|| "keep the log")?);
    // Standard error becomes that of the sandbox.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    // A second one is not set.
    let _ = tracing_subscriber::fmt()
        .with_writer(Arc::new(BoundedLog::on(Some(log), flags.debug)))
        .with_ansi(false)
        .log_internal_errors(false)
        .with_max_level(level)
        .try_init();
    Ok(())
}

/// The listening socket and the pipe from `start`, which are not passed on to processes that are
/// started here.
fn inherited() -> Result<(StdListener, OwnedFd)> {
    let take = |descriptor| {
        rustix::io::fcntl_dupfd_cloexec(descriptor, 3).context(|| "take what start has left")
    };
    let listener = take(rustix::stdio::stdin())?;
    let starter = take(rustix::stdio::stdout())?;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .context(|| "open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .context(|| "let go of what start has left")?;
    let listener = StdListener::from(listener);
    match listener.local_addr() {
        Ok(_) => Ok((listener, starter)),
        Err(_) => Err(Error::invalid(
            "this process is started by containerd-shim-hull-v2 start, with a socket",
        )
        .hint("configure containerd with runtime_type = \"io.containerd.hull.v2\"")),
    }
}

/// Returns when `start` has ended before containerd knew of this server; else never. Nor when
/// another `start` has told it of the server meanwhile.
async fn abandoned(starter: OwnedFd, pod: &Pod) {
    let told = async {
        rustix::io::ioctl_fionbio(&starter, true)?;
        let mut byte = [0];
        let mut pipe = Receiver::from_owned_fd(starter)?;
        pipe.read(&mut byte)
            .await
            .map(|read| read == 1 && byte[0] == TOLD)
    };
    match told.await {
        Ok(true) => std::future::pending().await,
        Ok(false) if !pod.is_over() => std::future::pending().await,
        Ok(false) => tracing::info!("the process that started this shim was killed"),
        Err(error) => tracing::warn!("cannot read from the process that started this: {error}"),
    }
}

async fn serve(
    flags: Flags,
    settings: Settings,
    listener: StdListener,
    socket: PathBuf,
    starter: OwnedFd,
) -> Result<()> {
    let (events, publishing) = Publisher::start(&flags);
    let pod = Arc::new(Pod::new(settings, &flags, socket, events));
    let mut services = create_task(Arc::new(TaskService(pod.clone())));
    for name in TASKS {
        if !services.contains_key(name) {
            let mut other = create_task(Arc::new(TaskService(pod.clone())));
            if let Some(service) = other.drain().next() {
                services.insert(name.to_owned(), service.1);
            }
        }
    }
    services.insert(streaming::SERVICE.to_owned(), pod.streams.service());
    services.extend(create_sandbox(Arc::new(SandboxService(pod.clone()))));
    listener
        .set_nonblocking(true)
        .context(|| "watch the socket")?;
    let listener = UnixListener::from_std(listener).context(|| "watch the socket")?;
    let mut server = Server::new()
        .add_listener(transport::Listener::from(listener))
        .register_service(services);
    let started = server.start().await;
    started.map_err(|error| Error::new(format!("cannot serve the socket: {error}")))?;
    let mut terminate = signal(SignalKind::terminate()).context(|| "listen for SIGTERM")?;
    tokio::select! {
        () = pod.done.notified() => {}
        _ = terminate.recv() => pod.leave(),
        () = abandoned(starter, &pod) => pod.leave(),
    }
    server.stop_listen().await;
    // What is being created is there then, or is not begun: both can be ended.
    let creating = tokio::time::timeout(CREATING, pod.creating.lock()).await;
    pod.end(Reason::Terminated).await;
    pod.clean_up().await;
    drop(creating);
    pod.streams.close();
    // The answer to the last call is on its way.
    server.disconnect().await;
    drop(server);
    // What publishes ends with the last who has something to tell.
    drop(pod);
    if tokio::time::timeout(LAST_EVENTS, publishing).await.is_err() {
        tracing::warn!("containerd did not take the last events");
    }
    Ok(())
}
