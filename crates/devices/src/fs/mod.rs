//! virtio-fs.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::api::{Vfs, VfsOptions};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};

use crate::control::Cache;
use crate::device::{Device, DeviceError, EventFlags, EventRegistry, Queues};

/// The tag under which the guest mounts the device.
pub const TAG: &str = "hull";

/// The shares of an fs device.
#[derive(Clone)]
pub struct Shares {
    vfs: Arc<Vfs>,
    fds: Arc<Mutex<HashMap<String, OwnedFd>>>,
}

impl Shares {
    /// Adds a directory.
    pub fn add(&self, name: &str, directory: OwnedFd, cache: Cache) -> io::Result<()> {
        let timeout = match cache {
            Cache::Private => Duration::from_secs(3600),
            Cache::Shared => Duration::from_secs(1),
        };
        let config = Config {
            attr_timeout: timeout,
            entry_timeout: timeout,
            cache_policy: CachePolicy::Auto,
            root_dir: format!("/proc/self/fd/{}/.", directory.as_raw_fd()),
            xattr: true,
            do_import: false,
            killpriv_v2: true,
            use_host_ino: true,
            ..Config::default()
        };
        let share = PassthroughFs::<()>::new(config)?;
        share.import()?;
        self.vfs
            .mount(Box::new(share), &format!("/{name}"))
            .map_err(|error| io::Error::other(error.to_string()))?;
        self.fds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned(), directory);
        Ok(())
    }

    /// Takes a share away.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.vfs
            .umount(&format!("/{name}"))
            .map_err(|error| io::Error::other(error.to_string()))?;
        self.fds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        Ok(())
    }
}

/// The device.
pub struct Fs {
    server: Server<Arc<Vfs>>,
}

impl Fs {
    /// A device without shares, and the handle that adds them.
    pub fn new() -> (Self, Shares) {
        let mut vfs = Vfs::new(VfsOptions {
            no_open: false,
            no_opendir: false,
            no_writeback: true,
            killpriv_v2: true,
            ..VfsOptions::default()
        });
        vfs.set_remove_pseudo_root();
        let vfs = Arc::new(vfs);
        (
            Self {
                server: Server::new(vfs.clone()),
            },
            Shares {
                vfs,
                fds: Arc::default(),
            },
        )
    }
}

impl Device for Fs {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &[1024, 1024]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 36];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        config.extend_from_slice(&1u32.to_le_bytes());
        config
    }

    fn register(&mut self, _events: EventRegistry) -> io::Result<()> {
        Ok(())
    }

    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        loop {
            let Some(chain) = queues.pop(queue)? else {
                if queues.rearm(queue)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let memory = queues.memory().clone();
            let written = {
                let broken = |error: fuse_backend_rs::transport::Error| DeviceError::Request {
                    queue,
                    reason: error.to_string(),
                };
                let reader = Reader::from_descriptor_chain(memory.as_ref(), chain.clone())
                    .map_err(broken)?;
                let writer = VirtioFsWriter::new(memory.as_ref(), chain).map_err(broken)?;
                match self
                    .server
                    .handle_message(reader, Writer::from(writer), None, None)
                {
                    Ok(written) => written,
                    Err(error) => {
                        tracing::warn!(%error, "fs request failed");
                        0
                    }
                }
            };
            queues.add_used(queue, head, u32::try_from(written).unwrap_or(0))?;
            queues.notify(queue)?;
        }
    }

    fn host_event(
        &mut self,
        _token: u64,
        _ready: EventFlags,
        _queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
}
