//! The device with a handwritten driver, and a socket in the tap's place, whose other end is the
//! host.
#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Descriptor, Driver, NEXT, WRITE, hostile_chains};
use hull_device_control::{LinkLocal, Policy};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const BUFFERS: u64 = 0x10_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

struct Cable {
    driver: Driver<Net>,
    handle: Handle,
    host: OwnedFd,
}

fn attach(driver: &mut Driver<Net>, handle: &Handle, options: NetOptions) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (host, tap) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let result = Arc::new(Mutex::new(None));
    let told = result.clone();
    handle.attach(
        tap,
        options,
        Box::new(move |result| *told.lock().unwrap() = Some(result)),
    );
    driver.host_events().unwrap();
    result.lock().unwrap().take().unwrap().unwrap();
    host
}

fn cable(features: u64, options: NetOptions) -> Cable {
    let (mut device, handle) = Net::new(MAC).unwrap();
    device.activate(features);
    let mut driver = Driver::new(device);
    let host = attach(&mut driver, &handle, options);
    Cable {
        driver,
        handle,
        host,
    }
}

/// A frame with its header; from `source`, of a kind that no policy knows.
fn frame(source: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(source);
    frame.extend((0..length - ETHERNET + 2).map(|byte| byte as u8));
    frame
}

impl Cable {
    /// The guest sends a frame, in several pieces.
    fn send(&mut self, frame: &[u8]) {
        let memory = &self.driver.memory;
        memory.write_slice(frame, GuestAddress(BUFFERS)).unwrap();
        let length = u32::try_from(frame.len()).unwrap();
        let rest = length.saturating_sub(20);
        let first = length - rest;
        self.driver.offer(
            TX,
            &[
                (BUFFERS, first, NEXT, 1),
                (BUFFERS + u64::from(first), rest, 0, 0),
            ],
        );
        self.driver.run(TX).unwrap();
    }

    fn host_receives(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        match rustix::io::read(&self.host, &mut bytes) {
            Ok(length) => {
                bytes.truncate(length);
                Some(bytes)
            }
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn host_sends(&mut self, frame: &[u8]) {
        rustix::io::write(&self.host, frame).unwrap();
        self.driver.host_events().unwrap();
    }

    /// The guest offers `count` buffers of one size. Each offer writes descriptor 0, so they are
    /// used one at a time.
    fn offer(&mut self, size: u32) {
        let descriptors: [Descriptor; 1] = [(BUFFERS, size, WRITE, 0)];
        self.driver.offer(RX, &descriptors);
        self.driver.run(RX).unwrap();
    }

    fn guest_sees(&mut self) -> Option<Vec<u8>> {
        let length = self.driver.used(RX)?;
        let mut bytes = vec![0; length as usize];
        let memory = &self.driver.memory;
        memory
            .read_slice(&mut bytes, GuestAddress(BUFFERS))
            .unwrap();
        Some(bytes)
    }
}

#[test]
fn frames_pass_both_ways_with_their_headers() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    for length in [60, 1514, MAX_FRAME] {
        let sent = frame(MAC, length);
        cable.send(&sent);
        assert_eq!(cable.host_receives().unwrap(), sent);
        assert_eq!(cable.driver.used(TX), Some(0));

        cable.offer(1 << 17);
        cable.host_sends(&sent);
        let mut expected = sent;
        expected[NUM_BUFFERS] = 1;
        assert_eq!(cable.guest_sees().unwrap(), expected);
    }
}

#[test]
fn a_frame_waits_for_buffers_and_nothing_behind_it_is_lost() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    for length in 100..110 {
        cable.host_sends(&frame(MAC, length));
    }
    for length in 100..110 {
        cable.offer(2000);
        let seen = cable.guest_sees().unwrap();
        assert_eq!(seen.len(), HEADER + length);
    }
    assert!(cable.guest_sees().is_none());
}

#[test]
fn a_large_frame_is_spread_over_buffers_once_there_are_enough() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    cable.host_sends(&frame(MAC, 5000));
    for expected in [
        None,
        None,
        None,
        Some([1500, 1500, 1500, HEADER as u32 + 500]),
    ] {
        cable.offer(1500);
        let Some(lengths) = expected else {
            assert_eq!(cable.driver.used(RX), None);
            continue;
        };
        for length in lengths {
            assert_eq!(cable.driver.used(RX), Some(length));
        }
    }
    // All buffers are the same memory here: the last part is what is seen.
    let last: u8 = cable.driver.memory.read_obj(GuestAddress(BUFFERS)).unwrap();
    assert_eq!(last, frame(MAC, 5000)[4500]);
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_lost_and_the_next_is_not() {
    let mut cable = cable(0, NetOptions::default());
    cable.host_sends(&frame(MAC, 5000));
    cable.host_sends(&frame(MAC, 1000));
    cable.offer(2000);
    assert_eq!(cable.driver.used(RX), Some(0));
    cable.offer(2000);
    assert_eq!(cable.driver.used(RX), Some(HEADER as u32 + 1000));
}

#[test]
fn without_a_tap_frames_are_dropped_and_a_new_tap_takes_over() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    cable.handle.detach(Box::new(|result| result.unwrap()));
    cable.driver.host_events().unwrap();
    cable.send(&frame(MAC, 100));
    assert_eq!(cable.driver.used(TX), Some(0));
    let options = NetOptions::default();
    let error = Arc::new(Mutex::new(false));
    let told = error.clone();
    let done = Box::new(move |result: io::Result<()>| *told.lock().unwrap() = result.is_err());
    cable.handle.change(options.clone(), done);
    cable.driver.host_events().unwrap();
    assert!(*error.lock().unwrap());

    cable.host = attach(&mut cable.driver, &cable.handle, options);
    assert!(cable.host_receives().is_none());
    cable.send(&frame(MAC, 200));
    assert_eq!(cable.host_receives().unwrap().len(), HEADER + 200);
}

#[test]
fn a_host_that_goes_away_is_no_harm() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    let (other, _) = rustix::pipe::pipe().unwrap();
    cable.host = other;
    cable.driver.host_events().unwrap();
    cable.send(&frame(MAC, 200));
    assert_eq!(cable.driver.used(TX), Some(0));
}

#[test]
fn a_host_that_goes_away_while_a_frame_waits_wakes_nobody() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    cable.host_sends(&frame(MAC, 200));
    let (other, _) = rustix::pipe::pipe().unwrap();
    cable.host = other;
    let mut ready = Vec::new();
    cable.driver.events().poll(&mut ready).unwrap();
    assert!(ready.is_empty(), "{ready:?}");
    cable.offer(2000);
    assert_eq!(cable.driver.used(RX), Some(HEADER as u32 + 200));
}

#[test]
fn only_frames_that_the_policy_allows_reach_the_host() {
    let policy = Policy {
        mac: MAC,
        addresses: vec!["10.0.0.2".parse().unwrap()],
        link_local: LinkLocal::None,
    };
    let mut cable = cable(
        MERGEABLE,
        NetOptions {
            policy: Some(policy),
            rate: 0,
        },
    );
    let mut own = frame(MAC, 60);
    own[HEADER + 12..HEADER + 15].copy_from_slice(&[0x08, 0x00, 0x45]);
    own[HEADER + 26..HEADER + 30].copy_from_slice(&[10, 0, 0, 2]);
    cable.send(&own);
    assert_eq!(cable.host_receives().unwrap(), own);
    own[HEADER + 29] = 3;
    cable.send(&own);
    cable.send(&frame(MAC, 60));
    assert!(cable.host_receives().is_none());
    for _ in 0..3 {
        assert_eq!(cable.driver.used(TX), Some(0));
    }
    cable
        .handle
        .change(NetOptions::default(), Box::new(|result| result.unwrap()));
    cable.driver.host_events().unwrap();
    cable.send(&own);
    assert_eq!(cable.host_receives().unwrap(), own);
}

#[test]
fn a_rate_makes_the_guest_wait_and_loses_nothing() {
    let rate = 1 << 20;
    let mut cable = cable(MERGEABLE, NetOptions { policy: None, rate });
    let begin = Instant::now();
    let sent = frame(MAC, 32 << 10);
    let total = 16;
    for _ in 0..total {
        cable.send(&sent);
        // The chain is at the same descriptors each time: it must be used before it is offered
        // again.
        while cable.driver.used(TX).is_none() {
            std::thread::sleep(Duration::from_millis(1));
            cable.driver.host_events().unwrap();
        }
        assert_eq!(cable.host_receives().unwrap().len(), sent.len());
    }
    let least = Duration::from_millis(1000 * (total * (32 << 10) - (128 << 10)) / rate);
    assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
}

#[test]
fn hostile_chains_are_dropped_or_end_the_device() {
    for queue in [RX, TX] {
        for chain in hostile_chains() {
            let mut cable = cable(MERGEABLE, NetOptions::default());
            cable.driver.offer(queue, &chain);
            let _ = cable.driver.run(queue);
            rustix::io::write(&cable.host, &frame(MAC, 3000)).unwrap();
            let _ = cable.driver.host_events();
        }
    }
}

#[test]
fn frames_of_impossible_lengths_are_dropped() {
    let mut cable = cable(MERGEABLE, NetOptions::default());
    for length in [0, 1, HEADER, HEADER + ETHERNET - 1, HEADER + MAX_FRAME + 1] {
        cable.send(&vec![0; length]);
        assert_eq!(cable.driver.used(TX), Some(0), "{length}");
        assert!(cable.host_receives().is_none(), "{length}");
    }
}
