//! Virtual CPUs: a thread each, and what stops and continues it.
//!
//! ```text
//!   Outside ──── the gate is open ────► Running (KVM_RUN)
//!      ▲                                    │
//!      └──── an exit: a device, a kick ─────┘
//! ```
//!
//! A pause closes the gate and kicks all that run; it has succeeded when all are outside, where no
//! code of the guest runs. One may be serving a register there, also for long, when a device is
//! reset. A kick: `immediate_exit` is set and the thread gets a signal. If it is in the guest, the
//! signal ends KVM_RUN; if it is about to enter it, `immediate_exit` does; if it is anywhere else,
//! it looks at the gate before it enters. So no request is lost.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hull_device_control::monitor::VCPU_THREADS;
use hull_jail::{ThreadRole, restrict_thread};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::io::Errno;
use vmm_sys_util::signal::{Killable, register_signal_handler};

use crate::bus::{Bus, Effect};
use crate::error::{At, Breakdown, Error};
use crate::sys::{self, ImmediateExit};
use crate::x86_64::vcpu_state::VcpuState;

/// The signal that ends KVM_RUN. Not a real-time one: those count against a limit of the user,
/// whose other processes could use it up.
const KICK: i32 = libc::SIGUSR1;

/// How long a virtual CPU may take to leave the guest.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a processor begins. KVM for AMD resets a virtual CPU before it reports a triple fault.
const RESET_VECTOR: u64 = 0xfff0;

/// How a guest ended: it reset its machine, or broke down.
pub type End = Result<(), Breakdown>;

/// Where a virtual CPU and those who stop it meet.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

struct GateState {
    /// Whether the CPU may not enter the guest.
    closed: bool,
    /// Whether it is in the guest.
    running: bool,
    /// Cycles of the host's time stamp counter that the guest is not to see.
    forget: u64,
    /// Wanted of the CPU's thread while the gate is closed.
    request: Option<Request>,
}

/// What the thread of a virtual CPU does while its gate is closed.
enum Request {
    /// Finish what the guest has asked a device for.
    Settle(mpsc::SyncSender<()>),
    /// Read the state of the CPU, which has settled.
    Save {
        /// As [`VcpuState::save`] takes it.
        forget: u64,
        done: mpsc::SyncSender<Result<VcpuState, Error>>,
    },
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The virtual CPUs of a machine.
pub struct Vcpus(Vec<Vcpu>);

/// Result of one stay in the guest.
enum Exit {
    /// It needed this process, and has got it.
    Served,
    /// A kick, or nothing to do.
    Interrupted,
    /// The guest has ended.
    Ended(End),
}

struct Vcpu {
    gate: Arc<Gate>,
    kick: Arc<ImmediateExit>,
    thread: JoinHandle<()>,
}

/// What all virtual CPUs share.
pub struct Surroundings {
    /// The devices.
    pub bus: Bus,
    /// Told once how the guest ended.
    pub ended: Box<dyn Fn(End) + Send + Sync>,
    /// Numbers of the model-specific registers that are saved.
    pub msrs: Vec<u32>,
}

impl Vcpus {
    /// Starts the threads of virtual CPUs, which run at once unless the machine is `paused`.
    ///
    /// # Errors
    /// The host has no threads left.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        surroundings: Arc<Surroundings>,
        paused: bool,
    ) -> Result<Self, Error> {
        register_signal_handler(KICK, do_nothing)
            .map_err(|error| Error::host("handle a signal")(error.into()))?;
        let threads = (0..).zip(vcpus).map(|(number, mut fd)| {
            let gate = Arc::new(Gate {
                state: Mutex::new(GateState {
                    closed: paused,
                    running: false,
                    forget: 0,
                    request: None,
                }),
                changed: Condvar::new(),
            });
            let kick = Arc::new(ImmediateExit::of(&mut fd));
            let runner = Runner {
                number,
                fd,
                gate: gate.clone(),
                kick: kick.clone(),
                surroundings: surroundings.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("{VCPU_THREADS}{number}"))
                .spawn(move || runner.run())
                .map_err(Error::host("start the thread of a virtual CPU"))?;
            Ok(Vcpu { gate, kick, thread })
        });
        Ok(Self(threads.collect::<Result<_, Error>>()?))
    }

    /// Stops all virtual CPUs. When this returns, none of them runs.
    ///
    /// # Errors
    /// One does not stop in time; those that have stopped continue.
    pub fn pause(&self) -> Result<(), Error> {
        for vcpu in &self.0 {
            vcpu.gate.lock().closed = true;
            vcpu.kick.set(true);
            if let Err(error) = vcpu.thread.kill(KICK) {
                self.resume(0);
                return Err(Error::host("stop a virtual CPU")(error.into()));
            }
        }
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        for vcpu in &self.0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let running = |state: &mut GateState| state.running;
            let (state, timeout) = vcpu
                .gate
                .changed
                .wait_timeout_while(vcpu.gate.lock(), left, running)
                .unwrap_or_else(PoisonError::into_inner);
            drop(state);
            if timeout.timed_out() {
                self.resume(0);
                return Err(Error::host("stop a virtual CPU")(
                    io::ErrorKind::TimedOut.into(),
                ));
            }
        }
        Ok(())
    }

    /// Finishes the accesses to devices that all virtual CPUs, which are paused, have begun. None
    /// of them changes a device afterwards.
    ///
    /// # Errors
    /// The guest ends with one, or a device does not answer in time.
    pub fn settle(&self) -> Result<(), Error> {
        self.0.iter().try_for_each(|vcpu| vcpu.ask(Request::Settle))
    }

    /// The states of all virtual CPUs, which have settled. `forget` is as for [`Vcpus::resume`].
    ///
    /// # Errors
    /// KVM's.
    pub fn save(&self, forget: u64) -> Result<Vec<VcpuState>, Error> {
        let states = self.0.iter().map(|vcpu| {
            vcpu.ask(|done| Request::Save { forget, done })
                .and_then(|state| state)
        });
        states.collect()
    }

    /// Lets all virtual CPUs continue. Their time stamp counters go on as if the last `forget`
    /// cycles had not been: all by the same, or they would differ from each other.
    pub fn resume(&self, forget: u64) {
        for vcpu in &self.0 {
            let mut state = vcpu.gate.lock();
            state.closed = false;
            state.forget = state.forget.wrapping_add(forget);
            vcpu.gate.changed.notify_all();
        }
    }
}

impl Vcpu {
    /// Has the thread do something while its gate is closed.
    fn ask<T>(&self, request: impl FnOnce(mpsc::SyncSender<T>) -> Request) -> Result<T, Error> {
        let (done, answer) = mpsc::sync_channel(1);
        self.gate.lock().request = Some(request(done));
        self.gate.changed.notify_all();
        answer
            .recv_timeout(PAUSE_TIMEOUT)
            .map_err(|error| match error {
                mpsc::RecvTimeoutError::Disconnected => {
                    Error::Snapshot("the guest has ended".into())
                }
                mpsc::RecvTimeoutError::Timeout => {
                    let why = "a device does not answer a virtual CPU in time";
                    Error::Snapshot(why.into())
                }
            })
    }
}

extern "C" fn do_nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The thread of a virtual CPU.
struct Runner {
    number: u32,
    fd: VcpuFd,
    gate: Arc<Gate>,
    kick: Arc<ImmediateExit>,
    surroundings: Arc<Surroundings>,
}

impl Runner {
    fn run(mut self) {
        if let Err(error) = restrict_thread("a virtual CPU", ThreadRole::Vcpu) {
            tracing::error!(%error, "cannot confine a virtual CPU");
            self.end(Err(Breakdown::Unknown {
                vcpu: self.number,
                reason: error.to_string(),
            }));
        }
        loop {
            self.pass_gate();
            if let Exit::Ended(end) = self.enter() {
                self.end(end);
            }
        }
    }

    /// Waits as long as a pause is wanted, and does what is asked for meanwhile.
    fn pass_gate(&mut self) {
        while let Some(request) = self.wait_at_gate() {
            self.serve(request);
        }
    }

    /// Waits for the gate to open; then, the CPU may enter the guest. Or for a request.
    fn wait_at_gate(&self) -> Option<Request> {
        let mut state = self.gate.lock();
        let mut request = None;
        while state.closed {
            request = state.request.take();
            if request.is_some() {
                break;
            }
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if request.is_none() {
            state.running = true;
            // Every kick so far was for a pause that is over: the next one begins with the lock.
            self.kick.set(false);
        }
        // With a request, of a pause before, if there was no time to apply it.
        let forget = std::mem::take(&mut state.forget);
        drop(state);
        if forget > 0 {
            self.forget_time(forget);
        }
        request
    }

    /// Nobody waits for an answer any more if it took too long.
    fn serve(&mut self, request: Request) {
        match request {
            Request::Settle(done) => {
                // What the guest asked a device for is in its registers only after KVM was entered
                // again, which can lead to another such exit.
                self.kick.set(true);
                loop {
                    match self.enter() {
                        Exit::Served => {}
                        Exit::Interrupted => break,
                        Exit::Ended(end) => {
                            drop(done);
                            self.end(end);
                        }
                    }
                }
                let _ = done.send(());
            }
            Request::Save { forget, done } => {
                let saved = VcpuState::save(&self.fd, &self.surroundings.msrs, forget);
                let _ = done.send(saved);
            }
        }
    }

    /// Sets the guest's time stamp counter back by the time of a pause, and tells its kernel that
    /// it was paused, so that it does not take the time for a lockup.
    fn forget_time(&self, cycles: u64) {
        // Linux before 5.16 has no such attribute: the clock of a guest that uses the counter jumps
        // there.
        let set_back = sys::tsc_offset(&self.fd)
            .and_then(|offset| sys::set_tsc_offset(&self.fd, offset.wrapping_sub(cycles)));
        if let Err(error) = set_back {
            tracing::debug!(vcpu = self.number, %error, "cannot set the time stamp counter back");
        }
        // EINVAL: the guest does not use that clock.
        if let Err(error) = self.fd.kvmclock_ctrl() {
            tracing::debug!(vcpu = self.number, %error, "cannot tell the guest of a pause");
        }
    }

    /// Runs the guest until it needs this process.
    fn enter(&mut self) -> Exit {
        let (bus, gate) = (&self.surroundings.bus, &self.gate);
        let vcpu = self.number;
        let exit = self.fd.run();
        {
            let mut state = gate.lock();
            state.running = false;
            if state.closed {
                gate.changed.notify_all();
            }
        }
        match exit {
            Ok(VcpuExit::MmioRead(address, data)) => bus.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if bus.write_port(port, data) == Effect::Reset {
                    return Exit::Ended(Ok(()));
                }
            }
            Ok(VcpuExit::IoapicEoi(_)) => {}
            Ok(VcpuExit::Intr | VcpuExit::Hlt) => return Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => {
                let at = self.at(&[]);
                return Exit::Ended(Err(Breakdown::TripleFault { vcpu, at }));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Exit::Ended(Err(Breakdown::EntryFailure { vcpu, reason }));
            }
            Ok(VcpuExit::InternalError) => {
                return Exit::Ended(Err(self.internal_error()));
            }
            Ok(other) => {
                let reason = format!("{other:?}");
                return Exit::Ended(Err(Breakdown::Unknown { vcpu, reason }));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Exit::Interrupted;
            }
            Err(error) => {
                let errno = Errno::from_raw_os_error(error.errno());
                return Exit::Ended(Err(Breakdown::Run { vcpu, errno }));
            }
        }
        Exit::Served
    }

    /// What KVM says of its internal error.
    fn internal_error(&mut self) -> Breakdown {
        let vcpu = self.number;
        let (suberror, data) = sys::internal_error(&mut self.fd);
        let at = match (suberror, data.as_slice()) {
            (KVM_INTERNAL_ERROR_EMULATION, [flags, data @ ..])
                if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0 =>
            {
                self.at(data)
            }
            _ => self.at(&[]),
        };
        match suberror {
            KVM_INTERNAL_ERROR_EMULATION => Breakdown::Emulation { vcpu, at },
            _ => Breakdown::InternalError { vcpu, suberror, at },
        }
    }

    /// Where the virtual CPU is. `instruction` is as KVM has it: the first byte is the number of
    /// those that follow.
    fn at(&self, instruction: &[u64]) -> At {
        let mut bytes = instruction.iter().flat_map(|word| word.to_le_bytes());
        let length = bytes.next().unwrap_or_default();
        let rip = self.fd.get_regs().ok().map(|registers| registers.rip);
        At {
            rip: rip.filter(|rip| *rip != RESET_VECTOR),
            instruction: bytes.take(length.into()).collect(),
        }
    }

    /// Reports how the guest ended, and waits for the end of the process.
    fn end(&self, end: End) -> ! {
        (self.surroundings.ended)(end);
        loop {
            std::thread::park();
        }
    }
}
