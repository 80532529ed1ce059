//! Guest memory.
//!
//! It is private and anonymous; files that the guest boots from are mapped over parts of it, copied
//! by the host's kernel page by page when the guest writes to them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hull_devices::device::Memory;
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::Error;
use crate::sys;
use crate::x86_64::layout::{HIGH_MEMORY, LOW_MEMORY_END};

/// Granularity of mappings.
pub const PAGE: u64 = 4096;

/// Runs of pages that are not all zeros, and where each begins.
fn used(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let page = PAGE as usize;
    let is_used = move |data: &[u8]| {
        data.chunks(page)
            .next()
            .is_some_and(|page| page.iter().any(|byte| *byte != 0))
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && !is_used(bytes.get(at..)?) {
            at += page;
        }
        let first = at;
        while at < bytes.len() && is_used(bytes.get(at..)?) {
            at += page;
        }
        let run = bytes.get(first..at.min(bytes.len()))?;
        (!run.is_empty()).then_some((first, run))
    })
}

/// Bytes that are saved at once.
const CHUNK: u64 = 1 << 20;

/// The memory of a guest.
#[derive(Clone)]
pub struct GuestRam(Memory);

impl GuestRam {
    /// Memory of `size` bytes, but whole pages: below the devices, and the rest above 4 GiB.
    ///
    /// # Errors
    /// The host has no address space left.
    pub fn new(size: u64) -> Result<Self, Error> {
        let size = size / PAGE * PAGE;
        let low = size.min(LOW_MEMORY_END);
        let mut regions = vec![region(0, low)?];
        if size > low {
            regions.push(region(HIGH_MEMORY, size - low)?);
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|_| Error::Kernel("its memory has an invalid size"))?;
        Ok(Self(Arc::new(memory)))
    }

    /// Memory of `size` bytes with the content of `file`, which [`GuestRam::save`] wrote. What the
    /// guest changes is its own.
    ///
    /// # Errors
    /// The file has another size, or cannot be mapped.
    pub fn restored(size: u64, file: &File) -> Result<Self, Error> {
        let ram = Self::new(size)?;
        let length = file
            .metadata()
            .map_err(Error::host("measure the saved memory"))?
            .len();
        if length != ram.size() {
            return Err(Error::Snapshot(format!(
                "its memory has {length} bytes, and not {}",
                ram.size()
            )));
        }
        for (start, length, offset) in ram.in_file() {
            ram.map("the saved memory", file, offset, length, start)?;
        }
        Ok(ram)
    }

    /// Writes all of it to a file that is empty. Pages of zeros become holes. Nothing may write to
    /// it meanwhile.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, file: &File) -> Result<(), Error> {
        let failed = || Error::host("write the memory of the guest");
        file.set_len(self.size()).map_err(failed())?;
        let mut buffer = vec![0; CHUNK as usize];
        for (start, length, offset) in self.in_file() {
            for done in (0..length).step_by(CHUNK as usize) {
                let buffer = &mut buffer[..CHUNK.min(length - done) as usize];
                self.0
                    .read_slice(buffer, GuestAddress(start + done))
                    .map_err(|_| self.too_little("its own memory"))?;
                for (at, data) in used(buffer) {
                    file.write_all_at(data, offset + done + at as u64)
                        .map_err(failed())?;
                }
            }
        }
        Ok(())
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.0.iter().map(|region| region.len()).sum()
    }

    /// Guest address and length of its parts, and where they are in a file.
    fn in_file(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.ranges().scan(0, |offset, (start, length)| {
            let here = *offset;
            *offset += length;
            Some((start, length, here))
        })
    }

    /// What devices see of it.
    pub fn memory(&self) -> &Memory {
        &self.0
    }

    /// End of the memory below the devices.
    pub fn low_end(&self) -> u64 {
        self.0.iter().next().map_or(0, |region| region.len())
    }

    /// Its parts: guest address and length.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
    }

    /// The slots to be given to KVM.
    pub fn slots(&self) -> impl Iterator<Item = kvm_userspace_memory_region> {
        (0..)
            .zip(self.0.iter())
            .map(|(slot, region)| kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            })
    }

    /// Writes to guest memory.
    ///
    /// # Errors
    /// [`Error::TooLittleMemory`] if it is not there.
    pub fn write(&self, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.0
            .write_slice(bytes, GuestAddress(at))
            .map_err(|_| self.too_little(what))
    }

    /// Puts `length` bytes of `file` from `offset` to guest address `at`: whole pages are mapped
    /// where the offsets within a page are the same, everything else is copied.
    ///
    /// # Errors
    /// [`Error::TooLittleMemory`] if that memory is not there, or the file cannot be read or
    /// mapped.
    pub fn load(
        &self,
        what: &'static str,
        file: &File,
        offset: u64,
        length: u64,
        at: u64,
    ) -> Result<(), Error> {
        let end = at
            .checked_add(length)
            .ok_or_else(|| self.too_little(what))?;
        if end > self.low_end() {
            return Err(self.too_little(what));
        }
        let first = at.next_multiple_of(PAGE);
        let last = end / PAGE * PAGE;
        if offset % PAGE != at % PAGE || first >= last {
            return self.copy(what, file, offset, length, at);
        }
        self.copy(what, file, offset, first - at, at)?;
        self.map(what, file, offset + (first - at), last - first, first)?;
        self.copy(what, file, offset + (last - at), end - last, last)
    }

    fn map(
        &self,
        what: &'static str,
        file: &File,
        offset: u64,
        length: u64,
        at: u64,
    ) -> Result<(), Error> {
        let target = self
            .0
            .get_slice(
                GuestAddress(at),
                usize::try_from(length).unwrap_or(usize::MAX),
            )
            .map_err(|_| self.too_little(what))?;
        sys::map_over(&target, file.as_fd(), offset)
            .map_err(Error::errno("map a file into the guest's memory"))
    }

    fn copy(
        &self,
        what: &'static str,
        file: &File,
        offset: u64,
        length: u64,
        at: u64,
    ) -> Result<(), Error> {
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| self.too_little(what))?];
        file.read_exact_at(&mut bytes, offset)
            .map_err(Error::host("read the guest kernel or its initramfs"))?;
        self.write(what, at, &bytes)
    }

    /// The error of something that does not fit.
    pub fn too_little(&self, what: &'static str) -> Error {
        Error::TooLittleMemory {
            what,
            memory: self.ranges().map(|(_, length)| length).sum(),
        }
    }
}

fn region(at: u64, size: u64) -> Result<GuestRegionMmap<()>, Error> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let mapping = sys::reserve(size).map_err(Error::errno("reserve the guest's memory"))?;
    GuestRegionMmap::new(mapping, GuestAddress(at))
        .ok_or(Error::Kernel("its memory has an invalid size"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;

    use super::*;

    fn file(pages: u8) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            file.write_all(&[page + 1; PAGE as usize]).unwrap();
        }
        file
    }

    fn bytes(ram: &GuestRam, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    #[test]
    fn saved_memory_is_the_same_and_zeros_take_no_place() {
        let size = 3 * CHUNK + PAGE;
        let ram = GuestRam::new(size).unwrap();
        for at in [5, PAGE * 7, CHUNK - 3, CHUNK * 2, size - 1] {
            ram.write("a mark", at, &[1]).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        ram.save(&file).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), size);
        assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 <= 6 * PAGE);
        let restored = GuestRam::restored(size, &file).unwrap();
        let content = |ram: &GuestRam| {
            let mut bytes = vec![0; size as usize];
            ram.memory()
                .read_slice(&mut bytes, GuestAddress(0))
                .unwrap();
            bytes
        };
        assert!(content(&restored) == content(&ram));
        // What one changes, neither the file nor another one sees.
        restored.write("a mark", 0, &[9]).unwrap();
        assert!(content(&GuestRam::restored(size, &file).unwrap()) == content(&ram));
        assert!(GuestRam::restored(size + PAGE, &file).is_err());
    }

    #[test]
    fn runs_of_used_pages_are_found() {
        let page = PAGE as usize;
        let mut bytes = vec![0; 6 * page];
        let runs = |bytes: &[u8]| -> Vec<(usize, usize)> {
            used(bytes)
                .map(|(at, run)| (at / page, run.len() / page))
                .collect()
        };
        assert_eq!(runs(&bytes), []);
        bytes[page] = 1;
        bytes[3 * page - 1] = 1;
        bytes[6 * page - 1] = 1;
        assert_eq!(runs(&bytes), [(1, 2), (5, 1)]);
    }

    #[test]
    fn a_file_is_the_same_mapped_and_copied() {
        for (offset, at) in [(0, 0x1000), (10, 0x100a), (10, 0x1003), (4090, 0x2ffa)] {
            let ram = GuestRam::new(1 << 20).unwrap();
            let length = 3 * PAGE - 20;
            ram.load("it", &file(4), offset, length, at).unwrap();
            let expected: Vec<u8> = (offset..offset + length)
                .map(|position| (position / PAGE) as u8 + 1)
                .collect();
            assert_eq!(bytes(&ram, at, length as usize), expected);
            // Nothing beside it is touched.
            assert_eq!(bytes(&ram, at - 1, 1), [0]);
            assert_eq!(bytes(&ram, at + length, 100), [0; 100]);
        }
    }

    #[test]
    fn the_file_stays_as_it_is() {
        let (ram, file) = (GuestRam::new(1 << 20).unwrap(), file(1));
        ram.load("it", &file, 0, PAGE, 0x1000).unwrap();
        ram.write("it", 0x1000, b"guest").unwrap();
        assert_eq!(bytes(&ram, 0x1000, 5), b"guest");
        let mut first = [0; 5];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [1; 5]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = GuestRam::new(1 << 20).unwrap();
        for (length, at) in [(PAGE, (1 << 20) - 1), (PAGE, u64::MAX), (2 << 20, 0)] {
            let error = ram.load("it", &file(1), 0, length, at).unwrap_err();
            assert!(matches!(error, Error::TooLittleMemory { .. }), "{error}");
        }
        assert!(ram.write("it", (1 << 20) - 1, &[0; 2]).is_err());
        // More than the file has.
        assert!(ram.load("it", &file(1), 100, PAGE, 0x1000).is_err());
    }

    #[test]
    fn memory_leaves_room_for_devices_below_4_gib() {
        let ram = GuestRam::new(LOW_MEMORY_END + (1 << 30)).unwrap();
        let ranges: Vec<_> = ram.ranges().collect();
        assert_eq!(ranges, [(0, LOW_MEMORY_END), (HIGH_MEMORY, 1 << 30)]);
        assert_eq!(GuestRam::new(64 << 20).unwrap().ranges().count(), 1);
        let odd = GuestRam::new(100_000_000).unwrap();
        assert_eq!(odd.low_end(), 99_999_744);
    }
}
