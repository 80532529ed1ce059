//! Relays bytes between two connections, both ways. Called by `loopback` and `host_sockets`.
//! Bounded in memory, and once one direction has ended, in what it waits for.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::vsock::Connection;

/// Largest piece moved at once.
const PIECE: usize = 16 * 1024;

/// How often a peer is looked after that has only closed one direction.
const HANG_UP_INTERVAL: Duration = Duration::from_secs(5);

/// What ends a connection of which one direction has ended.
#[derive(Debug, Clone, Copy)]
pub enum HalfClosed {
    /// Nothing moves for so long.
    Idle(Duration),
    /// Who is to take what may still come is gone.
    HungUp,
}

/// Relays both directions until both have ended, or one has failed.
pub async fn carry(one: Connection, other: Connection, half_closed: HalfClosed) {
    let carrier = Carrier {
        half_closed,
        half: AtomicBool::new(false),
    };
    // A failure is for the peers: they see a connection that ends.
    let _ = tokio::try_join!(carrier.pass(&one, &other), carrier.pass(&other, &one));
}

struct Carrier {
    half_closed: HalfClosed,
    /// One direction has ended.
    half: AtomicBool,
}

impl Carrier {
    /// Relays one direction to its end. An error ends the other one as well.
    async fn pass(&self, mut from: &Connection, mut to: &Connection) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let taker = to;
        loop {
            let reading = from.read(&mut piece);
            let length = match self.waiting(Step::Read, reading, taker).await? {
                Some(length) => length?,
                None => return self.give_up(from),
            };
            if length == 0 {
                break;
            }
            let writing = to.write_all(&piece[..length]);
            match self.waiting(Step::Write, writing, taker).await? {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return self.give_up(from),
            }
        }
        if matches!(self.half_closed, HalfClosed::HungUp) && from.is_deaf() {
            // It was not only done with sending: what the other one sends has no use.
            return Err(Errno::PIPE.into());
        }
        self.half.store(true, Ordering::Relaxed);
        to.shutdown().await
    }

    /// Nobody takes what `from` sends, which it is told. What the other one has sent before it went
    /// is still there.
    fn give_up(&self, from: &Connection) -> io::Result<()> {
        self.half.store(true, Ordering::Relaxed);
        from.stop_receiving();
        Ok(())
    }

    /// Waits for a step of the direction to `to`. `None` when nobody is there to take anything.
    async fn waiting<T>(
        &self,
        kind: Step,
        step: impl Future<Output = T>,
        to: &Connection,
    ) -> io::Result<Option<T>> {
        let interval = match self.half_closed {
            HalfClosed::Idle(limit) => limit,
            HalfClosed::HungUp => HANG_UP_INTERVAL,
        };
        let mut step = pin!(step);
        loop {
            if let Ok(done) = timeout(interval, step.as_mut()).await {
                return Ok(Some(done));
            }
            let half = self.half.load(Ordering::Relaxed);
            match self.half_closed {
                HalfClosed::Idle(_) if half => return Err(Errno::TIMEDOUT.into()),
                HalfClosed::HungUp if (half || kind == Step::Write) && to.is_deaf() => {
                    return Ok(None);
                }
                HalfClosed::Idle(_) | HalfClosed::HungUp => {}
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Read,
    Write,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// A connection, and its peer.
    fn connection() -> (Connection, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let limit = Some(Duration::from_secs(20));
        peer.set_read_timeout(limit).unwrap();
        (
            Connection::new(ours.into(), Default::default()).unwrap(),
            peer,
        )
    }

    /// Calls `talk` with the peers of a connection that is carried, until that has ended.
    fn carried(half_closed: HalfClosed, talk: impl FnOnce(UnixStream, UnixStream) + Send) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        thread::scope(|scope| {
            runtime.block_on(async {
                let ((one, client), (other, server)) = (connection(), connection());
                scope.spawn(move || talk(client, server));
                let carrying = carry(one, other, half_closed);
                timeout(Duration::from_secs(30), carrying).await.unwrap();
            });
        });
    }

    #[test]
    fn both_ways_are_carried_and_each_ends_by_itself() {
        const LENGTH: usize = 1 << 20;
        for half_closed in [HalfClosed::HungUp, HalfClosed::Idle(Duration::from_secs(9))] {
            carried(half_closed, |mut client, mut server| {
                let serving = thread::spawn(move || {
                    let mut question = Vec::new();
                    server.read_to_end(&mut question).unwrap();
                    assert_eq!(question.len(), LENGTH);
                    server.write_all(&question).unwrap();
                });
                let question: Vec<u8> = (0..=250u8).cycle().take(LENGTH).collect();
                client.write_all(&question).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                client.read_to_end(&mut answer).unwrap();
                assert!(answer == question);
                serving.join().unwrap();
            });
        }
    }

    #[test]
    fn who_goes_away_takes_the_other_along() {
        carried(HalfClosed::HungUp, |client, mut server| {
            drop(client);
            // The server does not close: it sees that nobody is there.
            let mut rest = Vec::new();
            server.read_to_end(&mut rest).unwrap();
            while server.write_all(&[0; 4096]).is_ok() {}
        });
    }

    #[test]
    fn who_only_waits_for_an_answer_may_wait_and_then_go_away() {
        carried(HalfClosed::HungUp, |mut client, mut server| {
            client.write_all(b"question").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut question = Vec::new();
            server.read_to_end(&mut question).unwrap();
            thread::sleep(HANG_UP_INTERVAL + Duration::from_secs(1));
            server.write_all(b"answer").unwrap();
            let mut answer = [0; 6];
            client.read_exact(&mut answer).unwrap();
            drop(client);
            // Kept open until the other one is seen to be gone.
            while server.write_all(b"more").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
    }

    #[test]
    fn an_answer_is_whole_however_slowly_it_is_read() {
        const LENGTH: usize = 3 << 20;
        carried(HalfClosed::HungUp, |mut client, mut server| {
            client.shutdown(Shutdown::Write).unwrap();
            server.read_to_end(&mut Vec::new()).unwrap();
            let serving = thread::spawn(move || server.write_all(&vec![7; LENGTH]).unwrap());
            thread::sleep(HANG_UP_INTERVAL + Duration::from_secs(1));
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert_eq!(answer.len(), LENGTH);
            serving.join().unwrap();
        });
    }

    #[test]
    fn an_answer_to_a_question_that_nobody_reads_to_its_end_arrives() {
        carried(HalfClosed::HungUp, |mut client, mut server| {
            let mut asking = client.try_clone().unwrap();
            let asking = thread::spawn(move || while asking.write_all(&[0; 4096]).is_ok() {});
            server.read_exact(&mut [0; 4096]).unwrap();
            server.write_all(b"too long").unwrap();
            server.shutdown(Shutdown::Read).unwrap();
            let mut answer = [0; 8];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"too long");
            asking.join().unwrap();
        });
    }

    #[test]
    fn half_a_connection_on_which_nothing_moves_ends() {
        carried(
            HalfClosed::Idle(Duration::from_millis(50)),
            |client, server| {
                client.shutdown(Shutdown::Write).unwrap();
                let mut byte = [0];
                assert_eq!((&server).read(&mut byte).unwrap(), 0);
                assert_eq!((&client).read(&mut byte).unwrap(), 0);
            },
        );
    }
}
