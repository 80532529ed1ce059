//! Brings Docker's name server into the guest. In a network that a user has defined, a container's
//! /etc/resolv.conf says 127.0.0.11; there dockerd listens, inside the container's network
//! namespace. The agent takes the guest's questions ([`Agent::resolve`]) and they are asked here,
//! each from a socket of its own in the namespace.
//!
//! dockerd begins to listen while its hook runs, which is before the guest is told of its network,
//! or, when a container is connected to such a network later, before the interface for that
//! appears. So it is looked for at these moments, and once more when a container starts:
//! [`Resolver::look`]. It costs a tenth of a millisecond; without a name server that is all. Once
//! begun it lasts: dockerd may end and come again.
//!
//! dockerd asks other name servers for what it does not know, and from inside the namespace too,
//! whose interfaces are the guest's. So what these answer is kept from the guest: in the namespace
//! the kernel chooses ports of a range that guests hardly use, and answers to these ports are let
//! through to it ([`mirror::admit_answers`]).
//!
//! Messages are opaque. At most [`MAX_QUESTIONS`] are asked at a time, each for at most
//! [`ANSWER_TIME`]; beyond that nothing is read from the guest.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hull_network::{Interface, Namespace, Netlink, mirror, sockets};
use hull_protocol::{MAX_QUESTIONS, NameHeader, RESOLVER, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::Result;
use crate::guest::{Agent, Devices};
use crate::network::messages::{by_stream, datagram};
use crate::network::names::Names;

/// Who answers a guest's questions.
#[derive(Debug, Clone)]
pub enum NameServer {
    /// Docker's, in the container's namespace.
    Docker(Namespace),
    /// hull, in a network of its own.
    Own(Arc<Names>),
}

impl NameServer {
    async fn ask(&self, tcp: bool, question: &[u8]) -> io::Result<Vec<u8>> {
        match (self, tcp) {
            (Self::Docker(namespace), true) => ask_by_tcp(namespace, question).await,
            (Self::Docker(namespace), false) => ask_by_udp(namespace, question).await,
            (Self::Own(names), _) => names.ask(tcp, question).await,
        }
    }
}

/// Has a guest's questions answered until the guest ends the stream.
///
/// # Errors
/// The guest does not take the stream.
pub async fn bring(server: NameServer, devices: &Devices, agent: &Agent) -> Result<JoinHandle<()>> {
    let (name, stream) = devices.connect(STREAM_PORT).await?;
    agent.resolve(name).await?;
    Ok(tokio::spawn(async move {
        let (questions, answers) = stream.into_split();
        if let Err(error) = serve(server, questions, answers).await {
            tracing::warn!("names are not resolved any more: {error}");
        }
    }))
}

/// How long the name server may take: it asks others.
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// A name server that a namespace has, or may get.
#[derive(Debug)]
pub struct Resolver {
    namespace: Namespace,
    devices: Arc<Devices>,
    agent: Agent,
    serving: Option<JoinHandle<()>>,
    /// Interfaces and taps for which the exceptions have been made.
    admitted: Vec<(u32, u32)>,
    /// From which ports the kernel chose in the namespace before.
    ports: Option<String>,
}

impl Resolver {
    /// For a guest that has come up.
    pub fn new(namespace: Namespace, devices: Arc<Devices>, agent: Agent) -> Self {
        Self {
            namespace,
            devices,
            agent,
            serving: None,
            admitted: Vec::new(),
            ports: None,
        }
    }

    /// Brings the name server into the guest if there is one and it is not there yet, and lets it
    /// ask others. `cables`: the namespace's interfaces with their taps. What fails goes to the
    /// log: a container can do without.
    pub async fn look(&mut self, netlink: &Netlink, cables: &[(&Interface, u32)]) {
        if self.serving.as_ref().is_none_or(JoinHandle::is_finished) {
            match sockets::listens(&self.namespace, *RESOLVER.ip()) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return tracing::warn!("{error}"),
            }
            let server = NameServer::Docker(self.namespace.clone());
            match bring(server, &self.devices, &self.agent).await {
                Ok(task) => self.serving = Some(task),
                Err(failure) => {
                    tracing::warn!("names of Docker's network are not resolved: {failure}");
                }
            }
        }
        if let Err(error) = self.let_ask(netlink, cables).await {
            tracing::warn!("names outside of Docker's network are not resolved: {error}");
        }
    }

    async fn let_ask(
        &mut self,
        netlink: &Netlink,
        cables: &[(&Interface, u32)],
    ) -> hull_network::Result<()> {
        if self.ports.is_none() {
            let (first, last) = sockets::OWN_PORTS.into_inner();
            let before = sockets::choose_ports(&self.namespace, &format!("{first} {last}"))?;
            self.ports = Some(before);
        }
        let there = |(interface, tap): &(&Interface, u32)| (interface.index, *tap);
        let all: Vec<_> = cables.iter().map(there).collect();
        self.admitted.retain(|admitted| all.contains(admitted));
        for (interface, tap) in cables {
            let cable = (interface.index, *tap);
            if !self.admitted.contains(&cable) {
                mirror::admit_answers(netlink, interface, *tap).await?;
                self.admitted.push(cable);
            }
        }
        Ok(())
    }

    /// Leaves the namespace as it was, but for the interfaces, which are disconnected as a whole.
    pub fn leave(&self) {
        if let Some(ports) = &self.ports
            && let Err(error) = sockets::choose_ports(&self.namespace, ports)
        {
            tracing::warn!("{error}");
        }
    }
}

/// Asks what comes until the guest ends its stream.
pub async fn serve(
    server: NameServer,
    mut questions: impl AsyncRead + Unpin,
    answers: impl AsyncWrite + Unpin + Send + 'static,
) -> io::Result<()> {
    let answers = Arc::new(Mutex::new(answers));
    let places = Arc::new(Semaphore::new(MAX_QUESTIONS.into()));
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        let mut header = [0; NameHeader::LENGTH];
        match questions.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let header = NameHeader::decode(header).ok_or(io::ErrorKind::InvalidData)?;
        let mut question = vec![0; header.length.into()];
        questions.read_exact(&mut question).await?;
        let (server, answers) = (server.clone(), answers.clone());
        tokio::spawn(async move {
            let asked = timeout(ANSWER_TIME, server.ask(header.tcp, &question)).await;
            let answer = asked.unwrap_or_else(|elapsed| Err(elapsed.into()));
            let answer = answer.unwrap_or_else(|error| {
                tracing::debug!("a question of the guest has no answer: {error}");
                Vec::new()
            });
            // The guest that asked may have gone.
            let _ = write(&answers, header, answer).await;
            drop(place);
        });
    }
}

/// One message to the guest. One that it would have no place for is no answer.
async fn write(
    to: &Mutex<impl AsyncWrite + Unpin>,
    question: NameHeader,
    answer: Vec<u8>,
) -> io::Result<()> {
    let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let mut message = NameHeader { length, ..question }.encode().to_vec();
    message.extend(answer);
    to.lock().await.write_all(&message).await
}

async fn ask_by_udp(namespace: &Namespace, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = sockets::udp(namespace, RESOLVER).map_err(io::Error::other)?;
    socket.send(question).await?;
    // That nobody is there is an error of the socket, which alone does not make it readable.
    let interest = Interest::READABLE | Interest::ERROR;
    socket.async_io(interest, || datagram(&socket)).await
}

async fn ask_by_tcp(namespace: &Namespace, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = sockets::tcp(namespace, RESOLVER).map_err(io::Error::other)?;
    by_stream(socket.connect(RESOLVER.into()).await?, question).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::{TcpListener, UdpSocket as StdUdpSocket};
    use std::thread;

    use tokio::io::{DuplexStream, duplex, split};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A namespace in which a question gets itself as answer, in capitals; by UDP when it begins
    /// with `slow`, after those that came later.
    fn namespace(test: &str) -> Option<Namespace> {
        let namespace = match Namespace::new() {
            Ok(namespace) => namespace,
            Err(error) => {
                println!("left out: {test}: {error}");
                return None;
            }
        };
        let servers = namespace.run_in(|| {
            let udp = StdUdpSocket::bind(RESOLVER).unwrap();
            (udp, TcpListener::bind(RESOLVER).unwrap())
        });
        let (udp, tcp) = servers.unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            let mut slow = Vec::new();
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let answer = buffer[..length].to_ascii_uppercase();
                if answer.starts_with(b"SLOW") {
                    slow.push((answer, from));
                    continue;
                }
                udp.send_to(&answer, from).unwrap();
                for (answer, from) in slow.drain(..) {
                    udp.send_to(&answer, from).unwrap();
                }
            }
        });
        thread::spawn(move || {
            for stream in tcp.incoming() {
                let mut stream = stream.unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut question).unwrap();
                stream.write_all(&length).unwrap();
                stream.write_all(&question.to_ascii_uppercase()).unwrap();
            }
        });
        Some(namespace)
    }

    /// The guest's end of a stream that is served, and how serving ends.
    fn serving(namespace: Namespace) -> (DuplexStream, JoinHandle<io::Result<()>>) {
        let (guest, host) = duplex(1 << 10);
        let (questions, answers) = split(host);
        (
            guest,
            tokio::spawn(serve(NameServer::Docker(namespace), questions, answers)),
        )
    }

    async fn ask(guest: &mut DuplexStream, slot: u16, tcp: bool, question: &[u8]) {
        let length = question.len() as u16;
        let header = NameHeader { slot, tcp, length }.encode();
        guest.write_all(&header).await.unwrap();
        guest.write_all(question).await.unwrap();
    }

    async fn answer(guest: &mut DuplexStream) -> (u16, Vec<u8>) {
        let read = async {
            let mut header = [0; NameHeader::LENGTH];
            guest.read_exact(&mut header).await.unwrap();
            let header = NameHeader::decode(header).unwrap();
            let mut answer = vec![0; header.length.into()];
            guest.read_exact(&mut answer).await.unwrap();
            (header.slot, answer)
        };
        timeout(SOON, read).await.unwrap()
    }

    #[tokio::test]
    async fn questions_are_asked_in_the_namespace_and_none_waits_for_another() {
        let Some(namespace) = namespace("questions_are_asked_in_the_namespace…") else {
            return;
        };
        let (mut guest, served) = serving(namespace);
        ask(&mut guest, 1, false, b"slow").await;
        // That one is there first.
        tokio::time::sleep(Duration::from_millis(100)).await;
        ask(&mut guest, 2, false, b"quick").await;
        assert_eq!(answer(&mut guest).await, (2, b"QUICK".to_vec()));
        assert_eq!(answer(&mut guest).await, (1, b"SLOW".to_vec()));
        for length in [1, 9000, 60_000] {
            ask(&mut guest, 3, false, &vec![b'x'; length]).await;
            assert_eq!(answer(&mut guest).await, (3, vec![b'X'; length]));
        }
        ask(&mut guest, 63, true, &vec![b'x'; 65535]).await;
        assert_eq!(answer(&mut guest).await, (63, vec![b'X'; 65535]));
        drop(guest);
        timeout(SOON, served).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_nobody_answers_has_an_empty_answer() {
        let Ok(namespace) = Namespace::new() else {
            return println!("left out: what_nobody_answers…: no namespace to be had");
        };
        let (mut guest, _served) = serving(namespace);
        for tcp in [false, true] {
            ask(&mut guest, 5, tcp, b"anybody there?").await;
            assert_eq!(answer(&mut guest).await, (5, Vec::new()));
        }
    }

    #[tokio::test]
    async fn a_guest_that_says_something_else_is_not_listened_to_any_more() {
        let Some(namespace) = namespace("a_guest_that_says_something_else…") else {
            return;
        };
        for garbage in [[0xff; 5], [0, 64, 0, 0, 0], [0, 0, 7, 0, 0]] {
            let (mut guest, served) = serving(namespace.clone());
            guest.write_all(&garbage).await.unwrap();
            let ended = timeout(SOON, served).await.unwrap().unwrap();
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        // One that asks and does not listen is stopped, and others of this process go on.
        let (mut guest, served) = serving(namespace);
        let flood = async {
            for number in 0.. {
                ask(&mut guest, number % MAX_QUESTIONS, false, &[b'x'; 512]).await;
            }
        };
        let flooded = timeout(Duration::from_millis(500), flood).await;
        assert!(flooded.is_err() && !served.is_finished());
    }
}
