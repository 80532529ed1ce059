//! Loads a kernel: an ELF file with a PVH entry (XEN_ELFNOTE_PHYS32_ENTRY, xen/elfnote.h).
//!
//! The file is the host's. A damaged one, or one that is no kernel, is an error that says so.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::Error;
use crate::memory::GuestRam;
use crate::x86_64::layout::EXTENDED_MEMORY;

/// Most program headers; a kernel has five.
const MAX_HEADERS: u16 = 64;
/// Most bytes of notes.
const MAX_NOTES: u64 = 64 << 10;

// linux/elf.h
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A kernel's file, understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Address at which it is entered, in 32-bit protected mode without paging.
    pub entry: u32,
    segments: Vec<Segment>,
}

/// A part to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

fn bad(why: &'static str) -> Error {
    Error::Kernel(why)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|found| found.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|found| found.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|found| found.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

impl Kernel {
    /// Reads the headers of a kernel's file.
    ///
    /// # Errors
    /// [`Error::Kernel`] if it is no such file.
    pub fn read(file: &File) -> Result<Self, Error> {
        let length = file
            .metadata()
            .map_err(Error::host("read the guest kernel"))?
            .len();
        let read = |at: u64, bytes: &mut [u8], what| {
            file.read_exact_at(bytes, at)
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => bad(what),
                    _ => Error::host("read the guest kernel")(error),
                })
        };
        let mut header = [0; HEADER_SIZE];
        read(0, &mut header, "it is not an ELF file")?;
        if header[..4] != MAGIC {
            return Err(bad(
                "it is not an ELF file (a compressed kernel must be unpacked: vmlinux)",
            ));
        }
        let kind = (header[4], header[5], u16_at(&header, 18));
        if kind != (CLASS_64, LITTLE_ENDIAN, EM_X86_64) {
            return Err(bad("it is not an ELF file for x86_64"));
        }
        let (table, size, count) = (
            u64_at(&header, 32),
            u16_at(&header, 54),
            u16_at(&header, 56),
        );
        if usize::from(size) != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_HEADERS {
            return Err(bad("its program headers are invalid"));
        }
        let mut headers = vec![0; usize::from(count) * PROGRAM_HEADER_SIZE];
        read(
            table,
            &mut headers,
            "its program headers are beyond its end",
        )?;

        let (mut segments, mut entry) = (Vec::new(), None);
        for header in headers.chunks_exact(PROGRAM_HEADER_SIZE) {
            let (offset, in_file) = (u64_at(header, 8), u64_at(header, 32));
            match u32_at(header, 0) {
                PT_LOAD => segments.push(Segment {
                    offset,
                    address: u64_at(header, 24),
                    in_file,
                    in_memory: u64_at(header, 40),
                }),
                PT_NOTE if in_file <= MAX_NOTES => {
                    let mut notes = vec![0; in_file as usize];
                    read(offset, &mut notes, "its notes are beyond its end")?;
                    entry = entry.or_else(|| pvh_entry(&notes));
                }
                _ => {}
            }
        }
        check(&segments, length)?;
        let entry = entry.ok_or(bad("it has no PVH entry (CONFIG_PVH)"))?;
        let within = |segment: &Segment| {
            (segment.address..segment.address + segment.in_file).contains(&u64::from(entry))
        };
        if !segments.iter().any(within) {
            return Err(bad("its PVH entry is not in the kernel"));
        }
        Ok(Self { entry, segments })
    }

    /// End of the memory that it occupies.
    pub fn end(&self) -> u64 {
        let ends = self.segments.iter();
        ends.map(|segment| segment.address + segment.in_memory)
            .max()
            .unwrap_or(0)
    }

    /// Loads it. What follows a segment in memory is zero, as guest memory is at first.
    ///
    /// # Errors
    /// It does not fit into the guest's memory, or cannot be read.
    pub fn load(&self, file: &File, ram: &GuestRam) -> Result<(), Error> {
        const WHAT: &str = "the kernel";
        if self.end() > ram.low_end() {
            return Err(ram.too_little(WHAT));
        }
        for segment in &self.segments {
            ram.load(WHAT, file, segment.offset, segment.in_file, segment.address)?;
        }
        Ok(())
    }
}

/// Segments are within the file and the memory above 1 MiB, and do not overlap.
fn check(segments: &[Segment], file_length: u64) -> Result<(), Error> {
    if segments.is_empty() {
        return Err(bad("it has nothing to load"));
    }
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for segment in segments {
        let file_end = segment.offset.checked_add(segment.in_file);
        if segment.in_file > segment.in_memory
            || file_end.is_none_or(|file_end| file_end > file_length)
        {
            return Err(bad("its segments are beyond its end"));
        }
        let end = segment.address.checked_add(segment.in_memory);
        let end = end.ok_or(bad("its segments are invalid"))?;
        if segment.address < EXTENDED_MEMORY {
            return Err(bad("it wants to be loaded below 1 MiB"));
        }
        let overlaps =
            |(start, other_end): &(u64, u64)| segment.address < *other_end && *start < end;
        if taken.iter().any(overlaps) {
            return Err(bad("its segments overlap"));
        }
        taken.push((segment.address, end));
    }
    Ok(())
}

/// The entry that a list of notes names.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let mut rest = notes;
    while rest.len() >= 12 {
        let name_size = u32_at(rest, 0) as usize;
        let value_size = u32_at(rest, 4) as usize;
        let kind = u32_at(rest, 8);
        let name_end = 12usize.checked_add(name_size)?;
        let value = name_end.checked_next_multiple_of(4)?;
        let end = value.checked_add(value_size)?;
        let found = rest.get(value..end)?;
        if rest.get(12..name_end)? == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            // Of four or eight bytes.
            return match found.len() {
                4 => Some(u32_at(found, 0)),
                8 => u32::try_from(u64_at(found, 0)).ok(),
                _ => None,
            };
        }
        rest = rest
            .get(end.checked_next_multiple_of(4)?..)
            .unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    const ADDRESS: u64 = 0x100_0000;

    /// An ELF file with one segment of one page and the note.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 0x2000];
        image[..4].copy_from_slice(&MAGIC);
        (image[4], image[5]) = (CLASS_64, LITTLE_ENDIAN);
        image[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&(PROGRAM_HEADER_SIZE as u16).to_le_bytes());
        image[56..58].copy_from_slice(&2u16.to_le_bytes());
        let mut header = |index: usize, kind: u32, values: [u64; 4]| {
            let at = 64 + index * PROGRAM_HEADER_SIZE;
            image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (offset, value) in [8, 24, 32, 40].into_iter().zip(values) {
                image[at + offset..at + offset + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        header(0, PT_LOAD, [0x1000, ADDRESS, 0x1000, 0x3000]);
        header(1, PT_NOTE, [0x800, 0, 24, 24]);
        let note = [4u32.to_le_bytes(), 8u32.to_le_bytes(), 18u32.to_le_bytes()].concat();
        image[0x800..0x80c].copy_from_slice(&note);
        image[0x80c..0x810].copy_from_slice(b"Xen\0");
        image[0x810..0x818].copy_from_slice(&(ADDRESS + 16).to_le_bytes());
        image[0x1000..0x2000].fill(7);
        image
    }

    fn read(image: &[u8]) -> Result<Kernel, Error> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        Kernel::read(&file)
    }

    #[test]
    fn a_kernel_is_loaded_where_it_says() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image()).unwrap();
        let kernel = Kernel::read(&file).unwrap();
        assert_eq!(u64::from(kernel.entry), ADDRESS + 16);
        assert_eq!(kernel.end(), ADDRESS + 0x3000);
        kernel
            .load(&file, &GuestRam::new(64 << 20).unwrap())
            .unwrap();
        let small = GuestRam::new(16 << 20).unwrap();
        let error = kernel.load(&file, &small).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot boot the guest kernel: the kernel does not fit into 16 MiB of memory"
        );
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let say = |image: &[u8]| read(image).unwrap_err().to_string();
        assert!(say(b"").contains("not an ELF file"));
        assert!(say(&[b'#'; 100]).contains("not an ELF file"));
        let mut other = image();
        other[18] = 183;
        assert!(say(&other).contains("for x86_64"));
        let mut none = image();
        none[0x808] = 17;
        assert!(say(&none).contains("no PVH entry"));
        let mut far = image();
        far[0x813] = 0x7f;
        assert!(say(&far).contains("entry is not in the kernel"));
        let mut low = image();
        low[64 + 24..64 + 32].copy_from_slice(&0x1000u64.to_le_bytes());
        assert!(say(&low).contains("below 1 MiB"));
        assert!(say(&image()[..0x1800]).contains("beyond its end"));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            changes in prop::collection::vec((0usize..0x820, any::<u8>()), 1..20),
            length in 0usize..0x2001,
        ) {
            let mut image = image();
            for (at, value) in changes {
                image[at] = value;
            }
            image.truncate(length);
            let _ = read(&image);
        }

        #[test]
        fn any_notes_end(notes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = pvh_entry(&notes);
        }
    }
}
