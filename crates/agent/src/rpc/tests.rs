//! The whole agent, with real containers, and a host whose connections break. TCP stands for vsock:
//! a stream has a port by which it is named, and a connection can be reset, losing all that is on
//! its way.
//!
//! The agent is PID 1 of a PID namespace, with mounts and control groups of its own. That needs
//! root, a kernel with cgroup v2, and busybox; where one is missing the tests report it and pass.
#![allow(clippy::unwrap_used, unsafe_code)]

mod harness;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_protocol::PROTOCOL_VERSION;
use hull_protocol::agent::*;
use ttrpc::Code;

use self::harness::{Host, Stream, StreamPorts, exec_request, pattern};

/// How often connections break in a test.
const CUTS: u64 = 100;

#[test]
fn versions_are_exchanged() {
    harness::test(|agent| async move {
        let host = Host::new(agent).await;
        let mut request = HelloRequest::new();
        request.protocol_version = PROTOCOL_VERSION;
        let first = host.hello(&request).await.unwrap();
        assert_eq!(first.protocol_version, PROTOCOL_VERSION);
        assert_eq!(first.boot_id.len(), 36);
        host.cut().await;
        assert_eq!(host.hello(&request).await.unwrap().boot_id, first.boot_id);
        request.protocol_version = 0;
        let refused = host.hello(&request).await.unwrap_err();
        assert_eq!(refused.code(), Code::FAILED_PRECONDITION);
    });
}

/// All events of a host that has seen none.
async fn all_events(host: &Host, exits: usize) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    while events.iter().filter(|event| event.has_exit()).count() < exits {
        let after = events.last().map_or(0, |event| event.sequence);
        let more = host.events(after).await.unwrap();
        assert!(more.first_kept <= after + 1, "events are lost");
        events.extend(more.events);
    }
    events
}

#[test]
fn the_agent_s_connection_is_cut_under_load() {
    const NUMBERS: usize = 30_000;
    harness::test(|agent| async move {
        let host = Host::new(agent).await;
        let (mut stdin, mut stdout) = (host.stream(), host.stream());
        let ports = StreamPorts {
            stdin: stdin.port,
            stdout: stdout.port,
            ..StreamPorts::default()
        };
        let script =
            format!("i=0; while [ $i -lt {NUMBERS} ]; do echo $i; i=$((i+1)); done; exec cat");
        host.create("c1", &script, ports).await.unwrap();
        host.create("c2", "exec sleep 1000", StreamPorts::default())
            .await
            .unwrap();
        let init = tokio::spawn(async move { stdout.read_to_end().await });

        let over = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let (host, over) = (host.clone(), over.clone());
                tokio::spawn(async move {
                    let mut done = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        let id = format!("{worker}-{}", done.len());
                        let status = done.len() as i32 % 100;
                        let script =
                            format!("echo {id} >> /marks; yes {id} | head -n 500; exit {status}");
                        let (ended, output) = host.run("c1", &id, &script).await;
                        assert_eq!(ended, status, "{id}");
                        assert!(output == format!("{id}\n").repeat(500).into_bytes(), "{id}");
                        done.push((id, status));
                    }
                    done
                })
            })
            .collect();
        // A pause that is executed twice fails: the container is paused already.
        let freezer = tokio::spawn({
            let (host, over) = (host.clone(), over.clone());
            async move {
                while !over.load(Ordering::Relaxed) {
                    host.freeze("c2", true).await.unwrap();
                    host.freeze("c2", false).await.unwrap();
                }
            }
        });

        while host.connections() < CUTS {
            tokio::time::sleep(Duration::from_millis(host.connections() % 7 * 5)).await;
            host.cut().await;
        }
        over.store(true, Ordering::Relaxed);
        freezer.await.unwrap();
        let mut executed = HashMap::new();
        for worker in workers {
            executed.extend(worker.await.unwrap());
        }
        assert!(executed.len() >= 20, "only {} executed", executed.len());

        stdin.write(b"the end\n").await.unwrap();
        stdin.half_close().await;
        let written = String::from_utf8(init.await.unwrap()).unwrap();
        let expected: String = (0..NUMBERS).map(|n| format!("{n}\n")).collect();
        assert!(written == expected + "the end\n");
        assert_eq!(host.wait("c1", "").await.unwrap().exit_status, 0);

        // Each was executed once, and each exit was reported once.
        let marks = std::fs::read_to_string(host.agent.root.join("marks")).unwrap();
        assert_eq!(marks.lines().count(), executed.len());
        let marks: HashSet<&str> = marks.lines().collect();
        assert!(executed.keys().all(|id| marks.contains(id.as_str())));
        let events = all_events(&host, executed.len() + 1).await;
        for (place, event) in (1..).zip(&events) {
            assert_eq!(event.sequence, place);
            let exit = event.exit();
            let status = match exit.exec_id.as_str() {
                "" => 0,
                id => executed.remove(id).expect("an exit of its own"),
            };
            assert_eq!(
                (exit.container_id.as_str(), exit.exit_status),
                ("c1", status)
            );
            assert!(event.time_ns > 1_600_000_000_000_000_000);
        }
        assert!(executed.is_empty());
        host.delete("c1").await.unwrap();
        host.delete("c2").await.unwrap();
    });
}

/// A process whose input comes back as its output, and a host that sends and receives a pattern.
struct Echo {
    host: Arc<Host>,
    exec: &'static str,
    length: usize,
    received: Vec<u8>,
}

impl Echo {
    /// Attaches new streams, and returns the position from which the input is to be sent.
    async fn reattach(&self, ports: StreamPorts) -> usize {
        let mut request = ReattachStreamsRequest::new();
        request.container_id = "c1".into();
        request.exec_id = self.exec.into();
        request.streams = ports.message();
        let received = self.received.len() as u64;
        match ports.terminal {
            0 => request.stdout_received = received,
            _ => request.terminal_received = received,
        }
        let taken = self.host.reattach(&request).await.unwrap().input_received;
        taken as usize
    }

    /// Receives `count` bytes or more while the rest of the pattern is sent; then resets both.
    async fn carry(&mut self, taken: usize, input: Stream, output: Stream, count: usize) {
        let rest = pattern(taken..self.length);
        let until = self.received.len() + count;
        let sending = input.send(&rest);
        let receiving = async {
            while self.received.len() < until.min(self.length) {
                let piece = output.receive(9000).await;
                assert!(!piece.is_empty(), "the output has ended");
                self.received.extend(piece);
            }
        };
        tokio::pin!(receiving);
        tokio::select! {
            () = &mut receiving => {}
            () = sending => receiving.await,
        }
        output.reset();
        input.reset();
    }
}

#[test]
fn every_connection_is_reset_and_no_byte_is_lost() {
    const LENGTH: usize = 4 << 20;
    harness::test(|agent| async move {
        let host = Host::new(agent).await;
        host.create("c1", "exec sleep 1000", StreamPorts::default())
            .await
            .unwrap();
        let mut echo = Echo {
            host: host.clone(),
            exec: "cat",
            length: LENGTH,
            received: Vec::new(),
        };
        let (mut input, mut output) = (host.stream(), host.stream());
        let ports = |input: &Stream, output: &Stream| StreamPorts {
            stdin: input.port,
            stdout: output.port,
            ..StreamPorts::default()
        };
        let request = exec_request("c1", "cat", "exec cat", ports(&input, &output));
        host.exec(&request).await.unwrap();
        let mut taken = 0;
        for round in 0..CUTS as usize {
            echo.carry(taken, input, output, round * 331).await;
            host.cut().await;
            (input, output) = (host.stream(), host.stream());
            taken = echo.reattach(ports(&input, &output)).await;
        }
        echo.carry(taken, input, output, LENGTH).await;

        // The process ends with the connections broken, and Wait waits for its output.
        (input, output) = (host.stream(), host.stream());
        echo.reattach(ports(&input, &output)).await;
        output.reset();
        input.half_close().await;
        let waiting = tokio::spawn({
            let host = host.clone();
            async move { host.wait("c1", "cat").await.unwrap().exit_status }
        });
        (input, output) = (host.stream(), host.stream());
        echo.received.truncate(LENGTH - 1000);
        echo.reattach(ports(&input, &output)).await;
        echo.received.extend(output.read_to_end().await);
        assert!(echo.received == pattern(0..LENGTH));
        assert_eq!(waiting.await.unwrap(), 0);
        host.delete("c1").await.unwrap();
    });
}

#[test]
fn a_terminal_is_attached_again() {
    harness::test(|agent| async move {
        let host = Host::new(agent).await;
        host.create("c1", "exec sleep 1000", StreamPorts::default())
            .await
            .unwrap();
        let ports = |terminal: &Stream| StreamPorts {
            terminal: terminal.port,
            ..StreamPorts::default()
        };
        let mut terminal = host.stream();
        let script = "stty raw -echo; echo; exec cat";
        let request = exec_request("c1", "cat", script, ports(&terminal));
        host.exec(&request).await.unwrap();
        assert_eq!(terminal.read(1).await, b"\n");
        let (mut sent, mut received) = (0, 1);
        for round in 1..30 {
            // All of it: of two users of one socket only one would get TCP's reset.
            let piece = pattern(sent..sent + round * 331);
            terminal.send(&piece).await;
            let mut echo = Vec::new();
            while echo.len() < piece.len() {
                echo.extend(terminal.receive(9000).await);
            }
            assert!(echo == piece);
            sent += piece.len();
            received += piece.len();
            terminal.reset();
            host.cut().await;
            terminal = host.stream();
            let mut request = ReattachStreamsRequest::new();
            request.container_id = "c1".into();
            request.exec_id = "cat".into();
            request.streams = ports(&terminal).message();
            request.terminal_received = received as u64 - 10;
            let attached = host.reattach(&request).await.unwrap();
            assert_eq!(attached.input_received, sent as u64);
            assert_eq!(terminal.read(10).await, piece[piece.len() - 10..]);
        }
        host.delete("c1").await.unwrap();
    });
}

#[test]
fn what_cannot_be_attached_is_refused_by_name() {
    harness::test(|agent| async move {
        let host = Host::new(agent).await;
        host.create("c1", "exec sleep 1000", StreamPorts::default())
            .await
            .unwrap();
        let output = host.stream();
        let ports = StreamPorts {
            stdout: output.port,
            ..StreamPorts::default()
        };
        let script = "echo hello; exec sleep 1000";
        host.exec(&exec_request("c1", "e1", script, ports))
            .await
            .unwrap();
        let mut output = output;
        assert_eq!(output.read(100).await, b"hello\n");

        let attach = async |exec: &str, received: u64, stdin: bool| {
            let stream = host.stream();
            let mut ports = StreamPorts::default();
            match stdin {
                true => ports.stdin = stream.port,
                false => ports.stdout = stream.port,
            }
            let mut request = ReattachStreamsRequest::new();
            request.container_id = "c1".into();
            request.exec_id = exec.into();
            request.streams = ports.message();
            request.stdout_received = received;
            let attached = host.reattach(&request).await;
            attached.map(|_| stream).map_err(|status| status.code())
        };
        assert_eq!(attach("e1", 7, false).await.err(), Some(Code::OUT_OF_RANGE));
        let refused = attach("e1", 0, true).await.err();
        assert_eq!(refused, Some(Code::FAILED_PRECONDITION));
        assert_eq!(attach("e2", 0, false).await.err(), Some(Code::NOT_FOUND));
        // Refusals have changed nothing: the process still has the old stream.
        let mut again = attach("e1", 2, false).await.unwrap();
        assert_eq!(again.read(100).await, b"llo\n");
        assert_eq!(output.read_to_end().await, b"");
        let gone = host.events(1000).await.unwrap_err();
        assert_eq!(gone.code(), Code::OUT_OF_RANGE);
        host.delete("c1").await.unwrap();
    });
}
