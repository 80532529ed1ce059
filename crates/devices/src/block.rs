//! virtio-blk over one file or block device of the host.
//!
//! The file comes as an open descriptor. Requests are served in order, each to its end. A malformed
//! request gets an error status if it has a buffer for one; otherwise the device stops.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use hull_device_control::DeviceType;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::buffers::{Buffers, Span};
use crate::device::{Device, DeviceError, Queues};
use crate::state::{RestoreError, SaveError, SavedState};

const SECTOR: u64 = 512;
const QUEUE: usize = 0;
/// Most segments of one request: a queue of the driver's default size without header and status.
const MAX_SEGMENTS: u32 = 254;
const MAX_DISCARD_SEGMENTS: u32 = 64;
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
const HEADER: usize = 16;
const ID_LENGTH: usize = 20;

// Feature bits and numbers of the virtio specification, 5.2.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Version of [`State`].
const VERSION: u32 = 1;

/// The saved state: what the driver has read of the disk's properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    sectors: u64,
    block_size: u32,
    read_only: bool,
    serial: [u8; ID_LENGTH],
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let serial = String::from_utf8_lossy(&self.serial);
        write!(
            f,
            "disk \"{}\" of {} sectors with blocks of {} bytes, {}",
            serial.trim_end_matches('\0'),
            self.sectors,
            self.block_size,
            if self.read_only {
                "read-only"
            } else {
                "writable"
            }
        )
    }
}

/// The device.
pub struct Block {
    file: File,
    read_only: bool,
    sectors: u64,
    /// Logical block size in bytes, the unit of partition tables.
    block_size: u32,
    id: [u8; ID_LENGTH],
}

impl Block {
    /// A disk of `file`'s size, rounded down to whole sectors. `id` is the serial number that the
    /// guest sees, truncated to 20 bytes.
    pub fn new(mut file: File, read_only: bool, id: &str) -> io::Result<Self> {
        let size = file.seek(SeekFrom::End(0))?;
        // A regular file has no such size.
        let block_size = rustix::fs::ioctl_blksszget(&file).unwrap_or(SECTOR as u32);
        let mut serial = [0; ID_LENGTH];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            file,
            read_only,
            sectors: size / SECTOR,
            block_size,
            id: serial,
        })
    }

    fn state(&self) -> State {
        State {
            sectors: self.sectors,
            block_size: self.block_size,
            read_only: self.read_only,
            serial: self.id,
        }
    }

    /// The byte position of `sector`, if `length` bytes from there are on the disk.
    fn position(&self, sector: u64, length: u64) -> Result<u64, Errno> {
        let start = sector.checked_mul(SECTOR).ok_or(Errno::INVAL)?;
        let end = start.checked_add(length).ok_or(Errno::INVAL)?;
        if end > self.sectors * SECTOR || !length.is_multiple_of(SECTOR) {
            return Err(Errno::INVAL);
        }
        Ok(start)
    }

    /// Serves one request and returns its status byte.
    fn execute(&self, header: [u8; HEADER], input: &mut Span<'_>, output: &mut Span<'_>) -> u8 {
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let result = match kind {
            T_IN => self.read(sector, output),
            T_OUT => self.write(sector, input),
            T_FLUSH => rustix::fs::fdatasync(&self.file).map_err(io::Error::from),
            T_GET_ID => {
                output.copy_from(&self.id);
                Ok(())
            }
            T_DISCARD | T_WRITE_ZEROES => self.clear(kind, input),
            _ => return S_UNSUPP,
        };
        match result {
            Ok(()) => S_OK,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => S_UNSUPP,
            Err(error) => {
                tracing::debug!(%error, kind, sector, "disk request failed");
                S_IOERR
            }
        }
    }

    fn read(&self, sector: u64, output: &mut Span<'_>) -> io::Result<()> {
        let length = output.remaining();
        let position = self.position(sector, length as u64)?;
        if output.read_from(self.file.as_fd(), length, position)? != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn write(&self, sector: u64, input: &mut Span<'_>) -> io::Result<()> {
        if self.read_only {
            return Err(Errno::ROFS.into());
        }
        let length = input.remaining();
        let position = self.position(sector, length as u64)?;
        if input.write_to(self.file.as_fd(), length, position)? != length {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    fn clear(&self, kind: u32, input: &mut Span<'_>) -> io::Result<()> {
        if self.read_only {
            return Err(Errno::ROFS.into());
        }
        for _ in 0..MAX_DISCARD_SEGMENTS {
            let mut segment = [0; 16];
            if input.take_exact(&mut segment).is_none() {
                return Ok(());
            }
            let mut sector = [0; 8];
            sector.copy_from_slice(&segment[..8]);
            let count = u32::from_le_bytes([segment[8], segment[9], segment[10], segment[11]]);
            let length = u64::from(count) * SECTOR;
            let position = self.position(u64::from_le_bytes(sector), length)?;
            if length == 0 {
                continue;
            }
            let punch = || {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.file, flags, position, length)
            };
            match (kind, punch()) {
                (_, Ok(())) => {}
                // Discarding is a hint only.
                (T_DISCARD, Err(Errno::OPNOTSUPP)) => {}
                (_, Err(error)) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Device for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Disk
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        let features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        if self.read_only {
            features | F_RO
        } else {
            features | F_DISCARD | F_WRITE_ZEROES
        }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&self.block_size.to_le_bytes());
        config[34..36].copy_from_slice(&1u16.to_le_bytes());
        config[36..40].copy_from_slice(&MAX_DISCARD_SECTORS.to_le_bytes());
        config[40..44].copy_from_slice(&MAX_DISCARD_SEGMENTS.to_le_bytes());
        config[44..48].copy_from_slice(&8u32.to_le_bytes());
        config[48..52].copy_from_slice(&MAX_DISCARD_SECTORS.to_le_bytes());
        config[52..56].copy_from_slice(&MAX_DISCARD_SEGMENTS.to_le_bytes());
        config[56] = 1;
        config
    }

    fn queue_event(&mut self, _queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop_or_rearm(QUEUE)? {
            let malformed = |reason: String| DeviceError::Request {
                queue: QUEUE,
                reason,
            };
            let head = chain.head_index();
            let memory = queues.memory().clone();
            let Buffers {
                mut readable,
                mut writable,
            } = Buffers::new(&memory, chain).map_err(|error| malformed(error.to_string()))?;
            let Some(room) = writable.remaining().checked_sub(1) else {
                return Err(malformed("no room for the status".into()));
            };
            let mut status = writable.split_off(room);
            let mut header = [0; HEADER];
            let answer = match readable.take_exact(&mut header) {
                Some(()) => self.execute(header, &mut readable, &mut writable),
                None => S_IOERR,
            };
            status.copy_from(&[answer]);
            let written = writable.consumed() + 1;
            queues.add_used(QUEUE, head, u32::try_from(written).unwrap_or(u32::MAX))?;
            queues.notify(QUEUE)?;
        }
        Ok(())
    }

    /// A request is finished in the event in which it arrived.
    fn quiesce(&mut self, _queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self) -> Result<SavedState, SaveError> {
        SavedState::new(DeviceType::Disk, VERSION, self.state())
    }

    /// The restored disk must look like the saved one. Its content is not part of the state.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let (_, saved) = state.read::<State>(DeviceType::Disk, VERSION)?;
        if saved != self.state() {
            return Err(RestoreError::mismatch(
                DeviceType::Disk,
                format!("it was {saved}, and it is {} now", self.state()),
            ));
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::{Driver, hostile_chains};

    fn disk(read_only: bool) -> Driver<Block> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 * SECTOR + 17).unwrap();
        Driver::new(Block::new(file, read_only, "a serial number of many letters").unwrap())
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header
    }

    /// Runs a request; returns its data and status.
    fn call(
        driver: &mut Driver<Block>,
        kind: u32,
        sector: u64,
        data: &[u8],
        room: usize,
    ) -> (Vec<u8>, u8) {
        let mut input = header(kind, sector);
        input.extend(data);
        driver.request(QUEUE, &input, room + 1);
        // The status is the last byte of the room, whatever was written before it.
        let answer = 0x10_0000 + (input.len() as u64).next_multiple_of(8);
        let mut bytes = vec![0; room + 1];
        vm_memory::Bytes::read_slice(
            driver.memory.as_ref(),
            &mut bytes,
            vm_memory::GuestAddress(answer),
        )
        .unwrap();
        let status = bytes.pop().unwrap();
        (bytes, status)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut driver = disk(false);
        let data: Vec<u8> = (0..1024u32).map(|byte| byte as u8).collect();
        assert_eq!(call(&mut driver, T_OUT, 98, &data, 0).1, S_OK);
        assert_eq!(call(&mut driver, T_FLUSH, 0, &[], 0).1, S_OK);
        assert_eq!(call(&mut driver, T_IN, 98, &[], 1024), (data, S_OK));
        let mut segment = 98u64.to_le_bytes().to_vec();
        segment.extend(1u32.to_le_bytes());
        segment.extend([0; 4]);
        assert_eq!(call(&mut driver, T_WRITE_ZEROES, 0, &segment, 0).1, S_OK);
        assert_eq!(call(&mut driver, T_DISCARD, 0, &segment, 0).1, S_OK);
        assert_eq!(call(&mut driver, T_IN, 98, &[], 512), (vec![0; 512], S_OK));
        assert_eq!(driver.device.config()[0], 100);
    }

    #[test]
    fn nothing_outside_the_disk_is_reached() {
        let mut driver = disk(false);
        for (sector, length) in [
            (100, 512),
            (99, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
        ] {
            assert_eq!(call(&mut driver, T_IN, sector, &[], length).1, S_IOERR);
            let data = vec![1; length];
            assert_eq!(call(&mut driver, T_OUT, sector, &data, 0).1, S_IOERR);
        }
        assert_eq!(call(&mut driver, T_IN, 0, &[], 100).1, S_IOERR);
        let mut segment = 99u64.to_le_bytes().to_vec();
        segment.extend(u32::MAX.to_le_bytes());
        segment.extend([0; 4]);
        assert_eq!(call(&mut driver, T_WRITE_ZEROES, 0, &segment, 0).1, S_IOERR);
        assert_eq!(call(&mut driver, 77, 0, &[], 0).1, S_UNSUPP);
    }

    #[test]
    fn a_read_only_disk_stays_as_it_is() {
        let mut driver = disk(true);
        assert_eq!(call(&mut driver, T_OUT, 0, &[1; 512], 0).1, S_IOERR);
        assert_eq!(call(&mut driver, T_WRITE_ZEROES, 0, &[0; 16], 0).1, S_IOERR);
        assert_eq!(call(&mut driver, T_IN, 0, &[], 512).1, S_OK);
        assert_eq!(driver.device.features() & F_RO, F_RO);
    }

    #[test]
    fn the_serial_number_is_cut() {
        let mut driver = disk(false);
        let (id, status) = call(&mut driver, T_GET_ID, 0, &[], ID_LENGTH);
        assert_eq!((&id[..], status), (&b"a serial number of m"[..], S_OK));
    }

    #[test]
    fn hostile_chains_end_the_device_at_worst() {
        for chain in hostile_chains() {
            let mut driver = disk(false);
            driver.offer(QUEUE, &chain);
            let _ = driver.run(QUEUE);
        }
    }
}
