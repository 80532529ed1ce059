//! Stands in the guest for Docker's name server, which is in the container's network namespace on
//! the host: questions that come here, by UDP or TCP, go to the host in one stream, and its answers
//! back to the program that asked. Called by `Loopback`.
//!
//! Messages are not parsed. At most [`MAX_QUESTIONS`] wait for their answers; then no further ones
//! are read. The host answers each within a time limit, which frees its slot.

use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_protocol::{MAX_QUESTIONS, NameHeader, RESOLVER};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, acceptfrom_with, bind,
    getsockname, listen, recvfrom, sendto, socket_with,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, split};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connection;
use super::dns_redirect::Translation;
use crate::io::reactor;
use crate::io::vsock::Connection;

/// Most connections of programs that ask by TCP, each of which has one question at a time.
const MAX_CONNECTIONS: usize = 16;

/// How long a program that asks by TCP may take for a question, and to take its answer.
const TCP_TIMEOUT: Duration = Duration::from_secs(15);

/// Ports tried until one is free for both.
const ATTEMPTS: usize = 8;

/// A program that waits for an answer.
enum Asker {
    Udp(SocketAddrV4),
    Tcp(oneshot::Sender<Vec<u8>>),
}

/// Questions in flight.
struct Questions<W> {
    host: tokio::sync::Mutex<W>,
    waiting: Mutex<Vec<Option<Asker>>>,
    free: Semaphore,
}

impl<W: AsyncWrite + Unpin> Questions<W> {
    fn new(host: W) -> Self {
        let places = usize::from(MAX_QUESTIONS);
        Self {
            host: tokio::sync::Mutex::new(host),
            waiting: Mutex::new((0..places).map(|_| None).collect()),
            free: Semaphore::new(places),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Option<Asker>>> {
        // Nothing panics while it is held; and a panic ends the machine anyway.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the host, as soon as there is a free slot.
    async fn ask(&self, asker: Asker, question: &[u8]) -> io::Result<()> {
        let length = u16::try_from(question.len()).map_err(io::Error::other)?;
        let place = self.free.acquire().await.map_err(io::Error::other)?;
        let tcp = matches!(asker, Asker::Tcp(_));
        let slot = {
            let mut waiting = self.waiting();
            let slot = waiting.iter().position(Option::is_none);
            let slot = slot.ok_or(Errno::BUSY)?;
            waiting[slot] = Some(asker);
            slot as u16
        };
        // Released when the answer comes.
        place.forget();
        let mut message = NameHeader { slot, tcp, length }.encode().to_vec();
        message.extend(question);
        self.host.lock().await.write_all(&message).await
    }

    /// Takes the program that asked, and frees its slot.
    fn asked(&self, slot: u16) -> Option<Asker> {
        let asker = self.waiting().get_mut(usize::from(slot))?.take()?;
        self.free.add_permits(1);
        Some(asker)
    }
}

/// Starts listening, and answers until the host ends its stream.
pub fn start(host: Connection) -> io::Result<()> {
    let (udp, tcp, port) = sockets()?;
    let translation = Translation::begin(port)?;
    tokio::spawn(async move {
        if let Err(error) = serve(host, &udp, &tcp).await {
            crate::log::error!("names are not resolved any more: {error}");
        }
        drop(translation);
    });
    Ok(())
}

/// Sockets for both protocols on a port that is free for both, and the port.
fn sockets() -> io::Result<(AsyncFd<OwnedFd>, AsyncFd<OwnedFd>, u16)> {
    let socket = |kind, port| -> io::Result<OwnedFd> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, kind, flags, None)?;
        bind(&socket, &SocketAddrV4::new(*RESOLVER.ip(), port))?;
        Ok(socket)
    };
    let mut attempt = 1;
    loop {
        let udp = socket(SocketType::DGRAM, 0)?;
        let port = SocketAddr::try_from(getsockname(&udp)?)?.port();
        match socket(SocketType::STREAM, port) {
            Ok(tcp) => {
                listen(&tcp, MAX_CONNECTIONS as i32)?;
                let udp = reactor::watch(udp, Interest::READABLE)?;
                return Ok((udp, reactor::watch(tcp, Interest::READABLE)?, port));
            }
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(_taken) => attempt += 1,
        }
    }
}

async fn serve(host: Connection, udp: &AsyncFd<OwnedFd>, tcp: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let (answers, host) = split(host);
    let questions = Arc::new(Questions::new(host));
    tokio::select! {
        ended = pass_answers(answers, &questions, udp) => ended,
        failed = take_datagrams(&questions, udp) => failed,
        failed = take_connections(&questions, tcp) => failed,
    }
}

/// Passes the host's answers on until it ends the stream.
async fn pass_answers<W: AsyncWrite + Unpin>(
    mut host: impl AsyncRead + Unpin,
    questions: &Questions<W>,
    udp: &impl AsFd,
) -> io::Result<()> {
    let mut header = [0; NameHeader::LENGTH];
    loop {
        match host.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let header = NameHeader::decode(header).ok_or(io::ErrorKind::InvalidData)?;
        let mut answer = vec![0; header.length.into()];
        host.read_exact(&mut answer).await?;
        match questions.asked(header.slot) {
            // A program that has gone, or whose buffer is full, gets none, as in any network.
            Some(Asker::Udp(asker)) if !answer.is_empty() => {
                let _ = sendto(udp, &answer, SendFlags::DONTWAIT, &asker);
            }
            Some(Asker::Tcp(asker)) => drop(asker.send(answer)),
            _ => {}
        }
    }
}

/// Receives questions over UDP.
async fn take_datagrams<W: AsyncWrite + Unpin>(
    questions: &Questions<W>,
    udp: &AsyncFd<OwnedFd>,
) -> io::Result<()> {
    loop {
        let mut ready = udp.readable().await?;
        match datagram(udp) {
            Ok(Some((question, asker))) => questions.ask(Asker::Udp(asker), &question).await?,
            Ok(None) => {}
            Err(Errno::AGAIN) => ready.clear_ready(),
            // An earlier answer was refused.
            Err(Errno::INTR | Errno::CONNREFUSED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// One datagram, and its sender.
fn datagram(udp: &impl AsFd) -> Result<Option<(Vec<u8>, SocketAddrV4)>, Errno> {
    // Only the received part is touched.
    let mut buffer = [MaybeUninit::<u8>::uninit(); 1 << 16];
    let ((received, _), _, from) = recvfrom(udp, &mut buffer[..], RecvFlags::empty())?;
    let from = from.and_then(|from| SocketAddrV4::try_from(from).ok());
    Ok(from.map(|from| (received.to_vec(), from)))
}

/// Accepts connections of programs that ask over TCP.
async fn take_connections<W: AsyncWrite + Unpin + Send + 'static>(
    questions: &Arc<Questions<W>>,
    tcp: &AsyncFd<OwnedFd>,
) -> io::Result<()> {
    let mut conversations = JoinSet::new();
    loop {
        if conversations.len() >= MAX_CONNECTIONS {
            conversations.join_next().await;
            continue;
        }
        let accepted = tokio::select! {
            Some(_ended) = conversations.join_next() => continue,
            accepted = tcp.async_io(Interest::READABLE, |tcp| {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                Ok(acceptfrom_with(tcp, flags)?.0)
            }) => accepted,
        };
        match accepted.and_then(connection) {
            Ok(stream) => {
                conversations.spawn(converse(questions.clone(), stream));
            }
            // The connection is gone again; or there are no descriptors, which passes.
            Err(error) => {
                crate::log::info!("a question by TCP was not taken: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Answers the questions of one connection, one after the other.
async fn converse<W: AsyncWrite + Unpin>(questions: Arc<Questions<W>>, mut stream: Connection) {
    let mut turn = async || -> io::Result<()> {
        let question = async {
            let mut question = vec![0; stream.read_u16().await?.into()];
            stream.read_exact(&mut question).await?;
            Ok::<_, io::Error>(question)
        };
        let question = timeout(TCP_TIMEOUT, question).await??;
        let (asker, answer) = oneshot::channel();
        questions.ask(Asker::Tcp(asker), &question).await?;
        let answer = answer.await.map_err(io::Error::other)?;
        if answer.is_empty() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut message = (answer.len() as u16).to_be_bytes().to_vec();
        message.extend(answer);
        timeout(TCP_TIMEOUT, stream.write_all(&message)).await?
    };
    // Until the program ends the connection, is too slow, or cannot be answered.
    while turn().await.is_ok() {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::{TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// Runs the proxy while a test on another thread is the host, on the stream, and asks at the
    /// address.
    fn serving(test: impl FnOnce(UnixStream, SocketAddrV4) + Send + 'static) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (udp, tcp, port) = sockets().unwrap();
            let (ours, host) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.set_read_timeout(Some(SOON)).unwrap();
            let address = SocketAddrV4::new(*RESOLVER.ip(), port);
            let testing = std::thread::spawn(move || test(host, address));
            let served = serve(connection(ours.into()).unwrap(), &udp, &tcp);
            timeout(3 * SOON, served).await.unwrap().unwrap();
            testing.join().unwrap();
        });
    }

    fn udp(address: SocketAddrV4) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.connect(address).unwrap();
        socket
    }

    fn question(host: &mut UnixStream) -> (NameHeader, Vec<u8>) {
        let mut header = [0; NameHeader::LENGTH];
        host.read_exact(&mut header).unwrap();
        let header = NameHeader::decode(header).unwrap();
        let mut question = vec![0; header.length.into()];
        host.read_exact(&mut question).unwrap();
        (header, question)
    }

    fn answer(host: &mut UnixStream, to: NameHeader, answer: &[u8]) {
        let length = answer.len() as u16;
        let header = NameHeader { length, ..to };
        host.write_all(&header.encode()).unwrap();
        host.write_all(answer).unwrap();
    }

    #[test]
    fn each_gets_the_answer_to_its_question() {
        serving(|mut host, address| {
            let askers: Vec<UdpSocket> = (0..5).map(|_| udp(address)).collect();
            for (number, asker) in askers.iter().enumerate() {
                asker.send(format!("{number}?").as_bytes()).unwrap();
            }
            let mut questions: Vec<_> = askers.iter().map(|_| question(&mut host)).collect();
            questions.reverse();
            for (header, question) in questions {
                assert!(!header.tcp);
                answer(&mut host, header, &[b"re ", &question[..]].concat());
            }
            for (number, asker) in askers.iter().enumerate() {
                let mut buffer = [0; 16];
                let length = asker.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], format!("re {number}?").as_bytes());
            }
        });
    }

    #[test]
    fn a_connection_has_one_question_after_the_other() {
        serving(|mut host, address| {
            let mut asker = TcpStream::connect(address).unwrap();
            asker.set_read_timeout(Some(SOON)).unwrap();
            for length in [1, 65535] {
                let text = vec![length as u8; length];
                asker.write_all(&(length as u16).to_be_bytes()).unwrap();
                asker.write_all(&text).unwrap();
                let (header, asked) = question(&mut host);
                assert!(header.tcp && asked == text);
                answer(&mut host, header, &text);
                let mut answered = vec![0; 2 + length];
                asker.read_exact(&mut answered).unwrap();
                assert!(answered[2..] == text);
            }
            asker.write_all(&[0, 1, b'x']).unwrap();
            let (header, _) = question(&mut host);
            answer(&mut host, header, &[]);
            assert_eq!(asker.read(&mut [0; 1]).unwrap(), 0, "there is no answer");
        });
    }

    #[test]
    fn questions_that_wait_are_bounded_and_an_answer_makes_place() {
        serving(|mut host, address| {
            let asker = udp(address);
            for number in 0..=MAX_QUESTIONS {
                asker.send(&number.to_be_bytes()).unwrap();
            }
            let first = question(&mut host);
            for _ in 1..MAX_QUESTIONS {
                question(&mut host);
            }
            host.set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            assert!(host.read(&mut [0; 1]).is_err(), "no place for one more");
            host.set_read_timeout(Some(SOON)).unwrap();
            // An answer to no question, and an empty one.
            answer(&mut host, first.0, &[]);
            answer(&mut host, first.0, b"again");
            let (last, text) = question(&mut host);
            assert_eq!(
                (last.slot, text),
                (first.0.slot, MAX_QUESTIONS.to_be_bytes().into())
            );
        });
    }
}
