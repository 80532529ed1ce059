//! A hostile device process: whatever it sends, the sandbox's calls end when it does, and the
//! sandbox keeps a bounded number of what came with its messages.
#![no_main]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hull_device_control::{DeviceControl, Setup};
use hull_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// Messages of one run.
const MESSAGES: usize = 32;
/// Connections that wait to be taken.
const MAX_INCOMING: usize = 4;

/// One message of the device process, nearly right or anything, and how many descriptors go with
/// it.
fn message(input: &mut Input<'_>) -> (Vec<u8>, usize) {
    let choice = input.u8();
    let text = match choice % 4 {
        0 => {
            let error = match choice & 0x80 {
                0 => "null".to_owned(),
                _ => format!("{:?}", String::from_utf8_lossy(&input.bytes::<8>())),
            };
            format!(
                "{{\"reply\":{{\"id\":{},\"error\":{error}}}}}",
                choice / 4 % 4
            )
            .into_bytes()
        }
        1 => {
            let (port, guest_port) = (input.u8(), input.u8());
            format!("{{\"incoming\":{{\"port\":{port},\"guest_port\":{guest_port}}}}}").into_bytes()
        }
        2 => b"@".to_vec(),
        _ => {
            let length = usize::from(input.u8()).min(input.0.len());
            let (text, rest) = input.0.split_at(length);
            input.0 = rest;
            text.to_vec()
        }
    };
    (text, usize::from(choice / 16 % 4))
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("an event loop");
    runtime.block_on(async {
        let (ours, theirs) = hull_ipc::pair().expect("a socket pair");
        let (stream, _end) = UnixStream::pair().expect("a socket pair");
        let (control, [mut incoming]) =
            DeviceControl::start(ours, &Setup::default(), &[], [7]).expect("a control");
        let device_process = async move {
            for _ in 0..MESSAGES {
                if input.is_empty() {
                    break;
                }
                let (text, fds) = message(&mut input);
                if !text.is_empty() {
                    let fd = match fds % 2 {
                        0 => theirs.as_fd(),
                        _ => stream.as_fd(),
                    };
                    let fds = vec![fd; fds];
                    hull_ipc::packet::send(&theirs, &text, &fds).expect("room in the socket");
                }
                tokio::task::yield_now().await;
            }
        };
        let calls = async {
            let call = control.remove_share("x");
            let (first, second) = tokio::join!(control.drain(), call);
            (first.is_ok(), second.is_ok())
        };
        // It ends when it has sent everything, and a call that was not answered with it.
        let both = async { tokio::join!(calls, device_process) };
        tokio::time::timeout(Duration::from_secs(5), both)
            .await
            .expect("a call ends with the device process");
        let ended = tokio::time::timeout(Duration::from_secs(5), control.drain());
        assert!(ended.await.expect("a call ends at once").is_err());
        let mut count = 0;
        while incoming.try_recv().is_ok() {
            count += 1;
        }
        assert!(count <= MAX_INCOMING);
    });
});
