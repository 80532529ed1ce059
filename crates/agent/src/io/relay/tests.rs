#![allow(clippy::unwrap_used)]
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::{ENDED_REPLAY, STREAM_REPLAY};
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use tokio::sync::watch;

use super::*;
use crate::processes::reaper::Exit;

type ExitSender = watch::Sender<Option<Exit>>;

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), test)
            .await
            .unwrap()
    });
}

/// The agent's end, non-blocking, and the other one.
fn stream() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours.into(), theirs)
}

/// A connection that can be reset as a vsock device does it: what is on its way is lost.
fn resettable() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours.into(), host)
}

fn reset(host: TcpStream) {
    let linger = Some(Duration::ZERO);
    rustix::net::sockopt::set_socket_linger(&host, linger).unwrap();
}

/// Reading end, writing end.
fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap()
}

fn unblocked(fd: OwnedFd) -> OwnedFd {
    rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).unwrap();
    fd
}

fn pattern(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|place| (place % 251) as u8).collect()
}

struct Outgoing {
    output: Output,
    process: std::fs::File,
    exit: ExitSender,
    progress: watch::Receiver<Progress>,
}

fn outgoing(sink: OwnedFd) -> Outgoing {
    outgoing_with(sink, Arc::default())
}

fn outgoing_with(sink: OwnedFd, ended: Arc<EndedOutputs>) -> Outgoing {
    let (source, process) = pipe();
    let (exit, exit_seen) = watch::channel(None);
    let output = Output::start(unblocked(source), sink, exit_seen, ended);
    Outgoing {
        progress: output.progress(),
        output,
        process: process.into(),
        exit,
    }
}

async fn reach(progress: &mut watch::Receiver<Progress>, wanted: Progress) {
    progress.wait_for(|now| *now == wanted).await.unwrap();
}

/// Until the relay has nothing to do.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

#[test]
fn output_arrives_and_then_its_end() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.process.write_all(b"hello").unwrap();
        drop(out.process);
        reach(&mut out.progress, Progress::Ended).await;
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    });
}

#[test]
fn a_slow_host_stops_the_process_and_loses_nothing() {
    run(async {
        const LENGTH: usize = 8 << 20;
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        let mut process = out.process;
        let writer = std::thread::spawn(move || {
            process.write_all(&pattern(0..LENGTH)).unwrap();
        });
        settle().await;
        assert!(!writer.is_finished());
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).unwrap();
            bytes
        });
        reach(&mut out.progress, Progress::Ended).await;
        writer.join().unwrap();
        assert!(reader.join().unwrap() == pattern(0..LENGTH));
    });
}

#[test]
fn output_that_others_hold_open_is_drained_when_the_process_has_ended() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.process.write_all(b"mine").unwrap();
        tokio::task::yield_now().await;
        assert_eq!(*out.progress.borrow(), Progress::Flowing);
        out.exit.send_replace(Some(Exit::UNKNOWN));
        reach(&mut out.progress, Progress::Drained).await;
        let mut text = [0; 4];
        host.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"mine");
        out.process.write_all(b"descendant's").unwrap();
        drop(out.process);
        reach(&mut out.progress, Progress::Ended).await;
        let mut rest = String::new();
        host.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "descendant's");
    });
}

#[test]
fn output_that_others_hold_open_ends_soon_after_the_process() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.process.write_all(b"mine").unwrap();
        out.exit.send_replace(Some(Exit::UNKNOWN));
        reach(&mut out.progress, Progress::Ended).await;
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "mine");
        // More than a pipe takes: somebody reads it.
        let mut process = out.process;
        let writer = std::thread::spawn(move || process.write_all(&[0; 200 << 10]));
        while !writer.is_finished() {
            settle().await;
        }
        writer.join().unwrap().unwrap();
    });
}

#[test]
fn a_descendant_that_never_stops_writing_does_not_keep_output_from_ending() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.process.write_all(b"mine").unwrap();
        let mut process = out.process;
        std::thread::spawn(move || while process.write_all(&[b'y'; 4096]).is_ok() {});
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).unwrap();
            bytes
        });
        settle().await;
        out.exit.send_replace(Some(Exit::UNKNOWN));
        reach(&mut out.progress, Progress::Ended).await;
        assert!(reader.join().unwrap().starts_with(b"mineyyy"));
    });
}

#[test]
fn a_host_that_has_closed_breaks_the_pipe() {
    run(async {
        let (sink, host) = stream();
        let mut out = outgoing(sink);
        drop(host);
        out.process.write_all(b"x").unwrap();
        reach(&mut out.progress, Progress::Ended).await;
        assert_eq!(
            out.process.write_all(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    });
}

#[test]
fn output_goes_on_at_the_byte_that_the_host_names() {
    run(async {
        let (sink, mut host) = resettable();
        let mut out = outgoing(sink);
        out.process.write_all(&pattern(0..5000)).unwrap();
        settle().await;
        host.read_exact(&mut [0; 1234]).unwrap();
        reset(host);
        // While there is no connection, and after the process has noticed nothing of it.
        settle().await;
        out.process.write_all(&pattern(5000..9000)).unwrap();
        settle().await;
        out.exit.send_replace(Some(Exit::UNKNOWN));
        drop(out.process);
        settle().await;
        assert_eq!(*out.progress.borrow(), Progress::Flowing);

        let (sink, mut host) = resettable();
        let stopped = out.output.stop().await;
        assert!(stopped.sendable_from().contains(&1234));
        stopped.attach(sink, 1234);
        reach(&mut out.progress, Progress::Ended).await;
        let mut bytes = Vec::new();
        host.read_to_end(&mut bytes).unwrap();
        assert!(bytes == pattern(1234..9000));

        // Once more, after the end.
        let (sink, mut host) = resettable();
        out.output.stop().await.attach(sink, 8999);
        settle().await;
        bytes.clear();
        host.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, pattern(8999..9000));
    });
}

#[test]
fn a_relay_that_is_stopped_and_not_attached_goes_on() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.process.write_all(b"one").unwrap();
        settle().await;
        out.output.stop().await.resume();
        out.process.write_all(b"two").unwrap();
        drop(out.process);
        reach(&mut out.progress, Progress::Ended).await;
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "onetwo");
    });
}

#[test]
fn ended_outputs_share_what_they_keep() {
    run(async {
        let ended = Arc::new(EndedOutputs::default());
        let mut outputs = Vec::new();
        for _ in 0..ENDED_REPLAY / STREAM_REPLAY + 1 {
            let (sink, mut host) = stream();
            let mut out = outgoing_with(sink, ended.clone());
            let reader = std::thread::spawn(move || host.read_to_end(&mut Vec::new()).unwrap());
            let mut process = out.process;
            let writer =
                std::thread::spawn(move || process.write_all(&pattern(0..2 * STREAM_REPLAY)));
            reach(&mut out.progress, Progress::Ended).await;
            assert_eq!(reader.join().unwrap(), 2 * STREAM_REPLAY);
            writer.join().unwrap().unwrap();
            outputs.push(out.output);
        }
        settle().await;
        let kept = async |output: &Output| {
            let stopped = output.stop().await;
            let range = stopped.sendable_from();
            stopped.resume();
            range.end() - range.start()
        };
        assert_eq!(kept(&outputs[0]).await, 0);
        assert!(kept(outputs.last().unwrap()).await >= STREAM_REPLAY as u64);
    });
}

#[test]
fn a_closed_output_ends_and_breaks_the_pipe() {
    run(async {
        let (sink, mut host) = stream();
        let mut out = outgoing(sink);
        out.output.close().await;
        reach(&mut out.progress, Progress::Ended).await;
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        assert!(out.process.write_all(b"x").is_err());
    });
}

#[test]
fn input_arrives_and_then_its_end() {
    run(async {
        let (process, sink) = pipe();
        let (source, mut host) = stream();
        let (_exit, exit_seen) = watch::channel(None);
        let input = Input::start(Way::Splice, source, unblocked(sink), exit_seen);
        host.write_all(b"hello").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            std::fs::File::from(process)
                .read_to_string(&mut text)
                .unwrap();
            text
        });
        while !reader.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(reader.join().unwrap(), "hello");
        assert_eq!(input.stop().await.received(), 5);
    });
}

#[test]
fn input_ends_with_its_process() {
    run(async {
        let (process, sink) = pipe();
        let (source, mut host) = stream();
        let (exit, exit_seen) = watch::channel(None);
        let _input = Input::start(Way::Splice, source, unblocked(sink), exit_seen);
        tokio::task::yield_now().await;
        exit.send_replace(Some(Exit::UNKNOWN));
        settle().await;
        drop(process);
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    });
}

#[test]
fn input_goes_on_at_the_byte_that_the_agent_names() {
    for way in [Way::Splice, Way::Copy] {
        run(async {
            const LENGTH: usize = 3 << 20;
            let (process, sink) = pipe();
            let (_exit, exit_seen) = watch::channel(None);
            let (source, mut host) = resettable();
            let input = Input::start(way, source, unblocked(sink), exit_seen);
            let mut process = std::fs::File::from(process);
            let reader = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                // Slowly, so that the input piles up on its way.
                let mut piece = [0; 10_000];
                loop {
                    match process.read(&mut piece).unwrap() {
                        0 => return bytes,
                        n => bytes.extend_from_slice(&piece[..n]),
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            for _ in 0..20 {
                let writer = std::thread::spawn({
                    let stopped = input.stop().await;
                    let received = stopped.received() as usize;
                    let (source, next) = resettable();
                    stopped.attach(source);
                    reset(std::mem::replace(&mut host, next.try_clone().unwrap()));
                    move || {
                        let until = LENGTH.min(received + 150_000);
                        (&next).write_all(&pattern(received..until)).unwrap();
                    }
                });
                while !writer.is_finished() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                writer.join().unwrap();
                reset(host);
                host = resettable().1;
                settle().await;
            }
            let stopped = input.stop().await;
            let received = stopped.received() as usize;
            let (source, host) = resettable();
            stopped.attach(source);
            let writer = std::thread::spawn(move || {
                (&host).write_all(&pattern(received..LENGTH)).unwrap();
            });
            while !reader.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
                // A terminal has no end of file: the pipe that stands for it is closed.
                if way == Way::Copy && writer.is_finished() {
                    let stopped = input.stop().await;
                    match stopped.received() as usize {
                        LENGTH if stopped.is_taken() => {
                            drop(stopped);
                            input.close().await;
                        }
                        _ => stopped.resume(),
                    }
                }
            }
            writer.join().unwrap();
            assert!(reader.join().unwrap() == pattern(0..LENGTH));
        });
    }
}
