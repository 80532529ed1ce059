//! A queue of the vhost-user library as devices see it.

use std::io;
use std::sync::OnceLock;

use vhost_user_backend::VringT;
use virtio_queue::{Error, QueueT};

use super::vring::Vring;
use crate::device::{Chain, Memory, Ring};
use crate::state::QueueState;

/// One queue. The library provides it with the first event; until then it is empty.
#[derive(Default)]
pub struct VhostRing(OnceLock<Vring>);

impl VhostRing {
    /// Connects it to the library's queue. Only the first call has an effect.
    pub fn bind(&self, vring: &Vring) {
        self.0.get_or_init(|| vring.clone());
    }

    /// The device has failed: its requests in flight never complete.
    pub fn abandon(&self) {
        if let Some(vring) = self.0.get() {
            vring.in_flight().abandon();
        }
    }
}

impl Ring for VhostRing {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, Error> {
        let Some(ring) = self.0.get() else {
            return Ok(None);
        };
        let mut vring = ring.get_mut();
        if !vring.is_enabled() || !vring.get_queue().ready() {
            return Ok(None);
        }
        ring.in_flight().pop(vring.get_queue_mut(), memory)
    }

    fn undo_pop(&self) {
        if let Some(ring) = self.0.get() {
            ring.in_flight().undo_pop(ring.get_mut().get_queue_mut());
        }
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        let Some(ring) = self.0.get() else {
            return Ok(());
        };
        let mut vring = ring.get_mut();
        // It may be disabled or not ready only when it was stopped.
        ring.in_flight()
            .add_used(vring.get_queue_mut(), memory, head, len)
    }

    fn notify(&self, memory: &Memory) -> Result<(), Error> {
        let Some(ring) = self.0.get() else {
            return Ok(());
        };
        let mut vring = ring.get_mut();
        if !vring.get_queue().ready() {
            return Ok(());
        }
        if vring.get_queue_mut().needs_notification(memory.as_ref())?
            && let Err(error) = vring.signal_used_queue()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            // A full pipe or counter means that a notification is pending already; a broken one
            // that the front end is disconnecting, which its socket reports.
            tracing::debug!(%error, "cannot notify the driver");
        }
        Ok(())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, Error> {
        let Some(ring) = self.0.get() else {
            return Ok(false);
        };
        let mut vring = ring.get_mut();
        if !vring.get_queue().ready() || !vring.is_enabled() {
            return Ok(false);
        }
        ring.in_flight().rearm(vring.get_queue_mut(), memory)
    }

    fn silence(&self, memory: &Memory) -> Result<(), Error> {
        let Some(ring) = self.0.get() else {
            return Ok(());
        };
        let mut vring = ring.get_mut();
        if !vring.get_queue().ready() {
            return Ok(());
        }
        vring.get_queue_mut().disable_notification(memory.as_ref())
    }

    fn state(&self) -> QueueState {
        match self.0.get() {
            Some(ring) => QueueState::from(ring.get_mut().get_queue()),
            None => QueueState::unused(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::testing::{Guest, WRITE};
    use crate::transport::vring::AtomicMemory;

    /// A ring over queue 0 of a guest, with requests in it.
    fn ring(requests: u16) -> (Guest, Vring, VhostRing) {
        let mut guest = Guest::new(&[64]);
        for head in 0..requests {
            guest.offer_at(0, head, &[(0x10_0000, 16, WRITE, 0)]);
        }
        let vring = Vring::new(AtomicMemory::new(guest.memory().as_ref().clone()), 64).unwrap();
        *vring.get_mut().get_queue_mut() = guest.rings()[0].state().try_into().unwrap();
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        let ring = VhostRing::default();
        ring.bind(&vring);
        (guest, vring, ring)
    }

    fn pop(ring: &VhostRing, guest: &Guest) -> Option<u16> {
        let chain = ring.pop(guest.memory()).unwrap();
        chain.map(|chain| chain.head_index())
    }

    #[test]
    fn stopping_waits_for_requests_in_flight_and_then_none_completes() {
        let (mut guest, vring, ring) = ring(3);
        assert_eq!(pop(&ring, &guest), Some(0));
        assert_eq!(pop(&ring, &guest), Some(1));
        ring.undo_pop();
        let ring = Arc::new(ring);
        let memory = guest.memory().clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                assert!(pop(&ring, &guest).is_none());
                ring.add_used(&memory, 0, 1).unwrap();
            });
            vring.set_queue_ready(false);
        });
        assert_eq!(guest.all_used(0), [0]);
        assert_eq!(vring.queue_next_avail(), 1);
        ring.add_used(guest.memory(), 1, 1).unwrap();
        assert!(guest.all_used(0).is_empty());
        // It goes on where it stopped.
        vring.set_queue_ready(true);
        assert_eq!(pop(&ring, &guest), Some(1));
        ring.add_used(guest.memory(), 1, 1).unwrap();
        vring.set_enabled(false);
        assert_eq!(pop(&ring, &guest), None);
        vring.set_enabled(true);
        assert_eq!(pop(&ring, &guest), Some(2));
        assert_eq!(guest.all_used(0), [1]);
    }

    #[test]
    fn a_driver_cannot_have_more_requests_in_flight_than_its_queue_has_entries() {
        let (mut guest, _vring, ring) = ring(64);
        for head in 0..64 {
            assert_eq!(pop(&ring, &guest), Some(head));
        }
        assert_eq!(pop(&ring, &guest), None);
        // A head that has not come back is made available again.
        guest.offer_at(0, 7, &[(0x10_0000, 16, WRITE, 0)]);
        for _ in 0..2 {
            let refused = ring.pop(guest.memory()).map(drop).unwrap_err();
            assert!(matches!(refused, Error::InvalidAvailRingIndex), "{refused}");
        }
        ring.add_used(guest.memory(), 7, 1).unwrap();
        assert_eq!(pop(&ring, &guest), Some(7));
    }

    #[test]
    fn a_failed_device_does_not_keep_its_ring_from_stopping() {
        let (mut guest, vring, ring) = ring(2);
        assert_eq!(pop(&ring, &guest), Some(0));
        ring.abandon();
        vring.set_queue_ready(false);
        vring.set_queue_ready(true);
        assert_eq!(pop(&ring, &guest), None);
        ring.add_used(guest.memory(), 0, 1).unwrap();
        assert!(guest.all_used(0).is_empty());
    }

    #[test]
    fn descriptors_that_block_stall_nothing() {
        let (mut guest, vring, ring) = ring(1);
        // Blocking, empty and full.
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let counter = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&counter, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (_read_end, pipe) = rustix::pipe::pipe().unwrap();
        let size = rustix::pipe::fcntl_getpipe_size(&pipe).unwrap();
        rustix::io::write(&pipe, &vec![0; size]).unwrap();
        vring.set_kick(Some(kick.into()));
        let (sender, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            assert!(vring.read_kick().unwrap());
            assert_eq!(pop(&ring, &guest), Some(0));
            ring.add_used(guest.memory(), 0, 1).unwrap();
            for call in [counter, pipe] {
                vring.set_call(Some(call.into()));
                ring.notify(guest.memory()).unwrap();
                let full = vring.signal_used_queue().unwrap_err();
                assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
            }
            sender.send(guest.all_used(0)).unwrap();
        });
        assert_eq!(done.recv_timeout(Duration::from_secs(10)).unwrap(), [0]);
    }

    #[test]
    fn a_ring_is_empty_until_it_is_bound() {
        let (guest, _, _) = ring(1);
        let ring = VhostRing::default();
        assert_eq!(pop(&ring, &guest), None);
        assert!(!ring.rearm(guest.memory()).unwrap());
        ring.notify(guest.memory()).unwrap();
        assert_eq!(ring.state(), QueueState::unused());
    }
}
