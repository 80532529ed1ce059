//! What a device process reads from its control socket: its setup with descriptors, and requests.
//!
//! Looks for panics, for messages that are others when they are sent on, and for a setup that is
//! accepted with other descriptors than it needs.
#![no_main]

use std::os::fd::AsFd;

use hull_device_control::{
    DeviceConfig, MAX_DISKS, MAX_NETS, REQUEST_LIMITS, Request, SETUP_LIMITS, Setup,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [choice, fds, text @ ..] = data else {
        return;
    };
    if text.is_empty() {
        return;
    }
    let (sandbox, devices) = hull_ipc::pair().expect("a socket pair");
    let attached = vec![devices.as_fd(); usize::from(*fds)];
    if hull_ipc::packet::send(&sandbox, text, &attached).is_err() {
        return;
    }
    if choice & 1 == 0 {
        let Ok(Some(received)) = hull_ipc::receive::<Request>(&devices, REQUEST_LIMITS) else {
            return;
        };
        assert!(received.fds.len() <= 1);
        let text = serde_json::to_vec(&received.message).expect("it is JSON");
        let again: Request = serde_json::from_slice(&text).expect("it is a request");
        assert_eq!(again, received.message);
        return;
    }
    let Ok(Some(received)) = hull_ipc::receive::<Setup>(&devices, SETUP_LIMITS) else {
        return;
    };
    let count = received.message.devices.len();
    assert_eq!(received.message.names().count(), count);
    let given = received.fds.len();
    if let Ok(assigned) = received.message.assign(received.fds) {
        assert_eq!(assigned.len(), count);
        let of_disks = |(config, _): &&_| matches!(config, DeviceConfig::Disk { .. });
        let disks = assigned.iter().filter(of_disks).count();
        assert_eq!(count + disks, given);
        assert!(disks <= MAX_DISKS && count <= 3 + MAX_DISKS + MAX_NETS);
    }
});
