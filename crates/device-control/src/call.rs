//! Requests to a running device process, and its events.

use serde::{Deserialize, Serialize};

use crate::net::NetOptions;
use crate::setup::DeviceType;

/// A request to the device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the sandbox; repeated in the reply.
    pub id: u64,
    /// The operation.
    pub call: Call,
}

/// Operations that the sandbox can request. Each has at most one descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Adds a directory to the root of the fs device. The descriptor is the directory (`O_PATH`);
    /// whether it is read-only is a property of the host mount that it is on.
    AddShare {
        /// Name of the directory in the device's root.
        name: String,
        /// How much the guest may cache.
        cache: Cache,
    },
    /// Removes a share. Files in it that the guest still has open fail with ESTALE.
    RemoveShare {
        /// Name of the share.
        name: String,
    },
    /// Attaches a tap, the descriptor, to a net device. Replaces an earlier one.
    AttachNet {
        /// Number of the device.
        device: u8,
        /// Options for its frames.
        options: NetOptions,
    },
    /// Changes the options of a net device that has a tap.
    ChangeNet {
        /// Number of the device.
        device: u8,
        /// The new options.
        options: NetOptions,
    },
    /// Detaches the tap of a net device.
    DetachNet {
        /// Number of the device.
        device: u8,
    },
    /// Gives a spare disk its file or block device, the descriptor, opened with the guest's access
    /// mode.
    AttachDisk {
        /// Number of the disk.
        disk: u8,
        /// The guest may only read.
        read_only: bool,
    },
    /// Opens a vsock connection to the guest. The descriptor is one end of a connected stream
    /// socket, whose other end becomes the host's side of the connection. Answered when the guest
    /// has accepted or refused, or has not answered within the connection timeout.
    Connect {
        /// Port that the guest listens on.
        guest_port: u32,
        /// Port that the guest sees as its peer's.
        host_port: u32,
        /// The other end is a server of the host, to which the guest's bytes come from this user
        /// and group. It may read them or not: nothing waits for that.
        #[serde(default)]
        user: Option<(u32, u32)>,
    },
    /// Answered when everything that the guest has sent over vsock is in the host's ends of its
    /// connections.
    Drain,
    /// Resets the vsock connections of one port of the host.
    CutStream {
        /// The port.
        port: u32,
    },
    /// Ends all vsock connections and has the guest close its sockets (a transport reset).
    ResetStreams,
    /// Finds the socket that a node of the fs device is. Answered by [`Event::Socket`].
    FindSocket {
        /// Number of the node, which the guest has chosen.
        node: u64,
    },
    /// Lets the guest connect to this port of the host. All others are refused.
    Listen {
        /// The port.
        port: u32,
    },
    /// Lists the devices that are served. Answered by [`Event::Devices`].
    List,
}

/// Which other writers a share has, which determines how long the guest may cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Usually only this guest: names and attributes stay valid for long.
    Private,
    /// Usually only this guest, and occasionally the host on behalf of a user (`hull cp`): the
    /// guest sees such a change within a second.
    Brief,
    /// The host or other guests, at any time: the guest looks up a file again at each use of its
    /// name, and a directory after a short time.
    Shared,
}

/// A device that has a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServedDevice {
    /// Its type.
    pub device: DeviceType,
    /// Its number among those of its type.
    pub number: usize,
    /// Sizes of its queues.
    pub queues: Vec<u16>,
}

impl ServedDevice {
    /// Name of its thread. Those of further ones begin with it and a hyphen.
    pub fn thread(&self) -> String {
        self.device.unique_name(self.number)
    }
}

/// Messages from the device process. Each has at most one descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The answer to a request.
    Reply {
        /// Id of the request.
        id: u64,
        /// Reason of a failure; `None` on success.
        error: Option<String>,
    },
    /// A socket was found. The descriptor (`O_PATH`) is its file.
    Socket {
        /// Id of the request.
        id: u64,
    },
    /// The devices that are served.
    Devices {
        /// Id of the request.
        id: u64,
        /// In the order in which they were started.
        devices: Vec<ServedDevice>,
    },
    /// The guest connected to a port of the host. The descriptor is the stream of the connection.
    Incoming {
        /// Port of the host.
        port: u32,
        /// Port of the guest that it connected from.
        guest_port: u32,
    },
}
