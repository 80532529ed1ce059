//! A reader for the tar dialects of layers: ustar, GNU and PAX, with sparse files.
//!
//! Called by the unpacker, and for the outer archive of `docker-archive:`. Does not interpret
//! names, which are passed on as bytes. Its memory usage is limited: see `crate::limits` and
//! `MAX_SEGMENTS`.

mod pax;

use std::io::{self, Read};

use pax::{Extensions, RecordError, SparseRecords};

use crate::limits::{ATTRIBUTES, EXTENSION_BYTES, EXTENSIONS};

const BLOCK: usize = 512;
/// Most segments of a sparse file.
const MAX_SEGMENTS: usize = 1 << 18;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The underlying stream failed.
    #[error("cannot read the archive: {0}")]
    Io(io::Error),
    /// It ends inside an entry.
    #[error("archive is truncated")]
    Truncated,
    /// It is not a tar archive, or damaged.
    #[error("archive is damaged at byte {position}: {reason}")]
    Malformed {
        /// Offset in the uncompressed archive.
        position: u64,
        /// The reason.
        reason: String,
    },
    /// The archive exceeds a limit of this reader.
    #[error("archive exceeds a limit at byte {position}: {reason}")]
    Limit {
        /// Offset in the uncompressed archive.
        position: u64,
        /// The limit.
        reason: String,
    },
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }
}

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A type that layers cannot contain.
    Other(u8),
}

/// Header of an entry, with extensions applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Type of the entry.
    pub kind: Kind,
    /// Its name as written.
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Size of its data in the archive.
    pub stored: u64,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Layout of the data, if the file has holes.
    pub sparse: Option<Sparse>,
}

/// Layout of a sparse file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sparse {
    /// Offset and length of each segment, ascending.
    pub segments: Vec<(u64, u64)>,
    /// Size of the file including holes.
    pub size: u64,
}

/// Reads entries one after the other; between two calls of [`TarReader::next`], reads the entry's
/// data.
pub struct TarReader<R> {
    inner: R,
    position: u64,
    data_left: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    /// Starts at the current position of `inner`.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            position: 0,
            data_left: 0,
            padding: 0,
        }
    }

    /// Returns the stream.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// Offset of the next byte in the archive.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Unread bytes of the current entry's data and padding, for callers that can seek.
    pub fn unread(&self) -> u64 {
        self.data_left + self.padding
    }

    /// Tells that the caller moved the stream forward by [`TarReader::unread`] bytes.
    pub fn skipped(&mut self) {
        self.position += self.unread();
        (self.data_left, self.padding) = (0, 0);
    }

    /// The stream, to seek in it.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The next entry, or `None` at the end of the archive.
    #[allow(clippy::should_implement_trait)] // an iterator could not lend its data
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        let mut extension_bytes = 0u64;
        for _ in 0..=EXTENSIONS {
            self.skip_rest()?;
            let start = self.position;
            let Some(header) = self.read_header()? else {
                return Ok(None);
            };
            let size = number(&header[124..136]).ok_or_else(|| self.malformed(start, "size"))?;
            if matches!(header[156], b'x' | b'g' | b'V' | b'L' | b'K') {
                extension_bytes = extension_bytes.saturating_add(size);
                if extension_bytes > EXTENSION_BYTES {
                    return Err(self.limit(format!(
                        "extension headers of {extension_bytes} bytes before one entry \
                         (at most {EXTENSION_BYTES})"
                    )));
                }
            }
            match header[156] {
                b'x' => {
                    let records = self.read_extension(size)?;
                    extensions
                        .add_records(&records)
                        .map_err(|error| match error {
                            RecordError::Malformed(what) => self.malformed(start, what),
                            RecordError::Attributes => self.limit(format!(
                                "extended attributes of more than {ATTRIBUTES} bytes for one entry"
                            )),
                        })?;
                }
                // Global records do not concern a single file; Docker ignores them, too. 'V' is a
                // volume label.
                b'g' | b'V' => self.begin_data(size),
                b'L' => extensions.path = Some(until_nul(&self.read_extension(size)?).to_vec()),
                b'K' => extensions.link = Some(until_nul(&self.read_extension(size)?).to_vec()),
                _ => return self.entry(start, &header, size, extensions).map(Some),
            }
        }
        Err(self.limit(format!("more than {EXTENSIONS} extension headers in a row")))
    }

    fn entry(
        &mut self,
        start: u64,
        header: &[u8; BLOCK],
        size: u64,
        extensions: Extensions,
    ) -> Result<Entry, TarError> {
        let field = |range: std::ops::Range<usize>, name: &'static str| {
            number(&header[range]).ok_or_else(|| self.malformed(start, name))
        };
        let narrow = |value: u64, name: &'static str| {
            u32::try_from(value).map_err(|_| self.malformed(start, name))
        };
        let mode = field(100..108, "mode")? as u32 & 0o7777;
        let uid = match extensions.uid {
            Some(uid) => uid,
            None => narrow(field(108..116, "uid")?, "uid")?,
        };
        let gid = match extensions.gid {
            Some(gid) => gid,
            None => narrow(field(116..124, "gid")?, "gid")?,
        };
        let mtime = match extensions.mtime {
            Some(mtime) => mtime,
            None => (
                signed_number(&header[136..148]).ok_or_else(|| self.malformed(start, "mtime"))?,
                0,
            ),
        };
        let mut path = match extensions.path {
            Some(path) => path,
            None => header_path(header),
        };
        let link = extensions
            .link
            .unwrap_or_else(|| until_nul(&header[157..257]).to_vec());
        let kind = match header[156] {
            // Before POSIX, a directory was a file whose name ends with a slash.
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => (
                narrow(field(329..337, "device number")?, "device number")?,
                narrow(field(337..345, "device number")?, "device number")?,
            ),
            _ => (0, 0),
        };
        // Only files have data, although some writers set a size for links and directories.
        let stored = match kind {
            Kind::File | Kind::Other(_) => extensions.size.unwrap_or(size),
            _ => 0,
        };
        let old_sparse = header[156] == b'S';
        self.begin_data(stored);
        let mut entry = Entry {
            kind,
            path: Vec::new(),
            link,
            mode,
            uid,
            gid,
            mtime,
            stored,
            device,
            xattrs: extensions.xattrs.into_vec(),
            sparse: None,
        };
        if old_sparse {
            entry.sparse = Some(self.old_gnu_sparse(start, header)?);
        } else if extensions.sparse.seen {
            let (sparse, name) = self.pax_sparse(start, extensions.sparse)?;
            entry.sparse = Some(sparse);
            path = name.unwrap_or(path);
        }
        if let Some(sparse) = &entry.sparse {
            entry.stored = self.data_left;
            sparse
                .check(entry.stored)
                .map_err(|reason| self.malformed(start, reason))?;
        }
        entry.path = path;
        Ok(entry)
    }

    fn begin_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self.unread();
        let skipped = io::copy(&mut (&mut self.inner).take(rest), &mut io::sink())?;
        self.position += skipped;
        (self.data_left, self.padding) = (0, 0);
        if skipped == rest {
            Ok(())
        } else {
            Err(TarError::Truncated)
        }
    }

    /// Reads a header block and verifies its checksum; `None` at a zero block or at the end.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let start = self.position;
        let mut header = [0; BLOCK];
        if !self.read_block(&mut header)? || header.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum: u32 = header
            .iter()
            .enumerate()
            .map(|(index, &byte)| {
                if (148..156).contains(&index) {
                    32
                } else {
                    u32::from(byte)
                }
            })
            .sum();
        match number(&header[148..156]) {
            Some(expected) if expected == u64::from(sum) => Ok(Some(header)),
            _ => Err(self.malformed(start, "header checksum")),
        }
    }

    /// Reads a whole block; `false` at the end of the stream.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(TarError::Truncated),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += BLOCK as u64;
        Ok(true)
    }

    /// The caller has checked the size.
    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        self.begin_data(size);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        if self.data_left > 0 {
            Err(TarError::Truncated)
        } else {
            Ok(bytes)
        }
    }

    /// The map in an old GNU sparse header and the blocks that follow it.
    fn old_gnu_sparse(&mut self, start: u64, header: &[u8; BLOCK]) -> Result<Sparse, TarError> {
        let mut segments = Vec::new();
        let size = number(&header[483..495]).ok_or_else(|| self.malformed(start, "sparse size"))?;
        let mut add = |fields: &[u8]| {
            for pair in fields.chunks_exact(24) {
                if pair[0] == 0 || pair[12] == 0 {
                    return Some(());
                }
                segments.push((number(&pair[..12])?, number(&pair[12..])?));
            }
            Some(())
        };
        add(&header[386..482]).ok_or_else(|| self.malformed(start, "sparse map"))?;
        let mut more = header[482] != 0;
        let mut blocks = 0;
        while more {
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? {
                return Err(TarError::Truncated);
            }
            blocks += 1;
            if blocks * 21 > MAX_SEGMENTS {
                return Err(self.limit(format!("sparse file of more than {MAX_SEGMENTS} pieces")));
            }
            add(&block[..504]).ok_or_else(|| self.malformed(start, "sparse map"))?;
            more = block[504] != 0;
        }
        Ok(Sparse { segments, size })
    }

    /// The map of a PAX sparse file: in the records (0.0, 0.1) or before the data (1.0).
    fn pax_sparse(
        &mut self,
        start: u64,
        records: SparseRecords,
    ) -> Result<(Sparse, Option<Vec<u8>>), TarError> {
        let size = records
            .size
            .ok_or_else(|| self.malformed(start, "sparse size"))?;
        let numbers = match records.major {
            0 => records.numbers,
            1 => {
                let count = self.sparse_line(start)?;
                if count > MAX_SEGMENTS as u64 {
                    return Err(self.limit(format!("sparse file of {count} pieces")));
                }
                let mut numbers = Vec::new();
                for _ in 0..count * 2 {
                    numbers.push(self.sparse_line(start)?);
                }
                // The map is padded to whole blocks.
                let used = self.position % BLOCK as u64;
                let mut padding = [0; BLOCK];
                if used > 0 {
                    let padding = &mut padding[..BLOCK - used as usize];
                    self.read_exact(padding).map_err(|_| TarError::Truncated)?;
                }
                numbers
            }
            _ => return Err(self.malformed(start, "sparse format")),
        };
        if numbers.len() % 2 != 0 {
            return Err(self.malformed(start, "sparse map"));
        }
        let segments = numbers
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect();
        Ok((Sparse { segments, size }, records.name))
    }

    fn sparse_line(&mut self, start: u64) -> Result<u64, TarError> {
        let mut value: u64 = 0;
        for _ in 0..21 {
            let mut byte = [0];
            self.read_exact(&mut byte)
                .map_err(|_| TarError::Truncated)?;
            match byte[0] {
                b'\n' => return Ok(value),
                digit @ b'0'..=b'9' => {
                    value = value
                        .checked_mul(10)
                        .and_then(|value| value.checked_add(u64::from(digit - b'0')))
                        .ok_or_else(|| self.malformed(start, "sparse map"))?;
                }
                _ => break,
            }
        }
        Err(self.malformed(start, "sparse map"))
    }

    fn malformed(&self, position: u64, reason: impl Into<String>) -> TarError {
        TarError::Malformed {
            position,
            reason: format!("bad {}", reason.into()),
        }
    }

    fn limit(&self, reason: String) -> TarError {
        TarError::Limit {
            position: self.position,
            reason,
        }
    }
}

/// Reads the data of the current entry.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = (buffer.len() as u64).min(self.data_left) as usize;
        if want == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..want])?;
        self.data_left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

impl Sparse {
    /// Checks that segments ascend, fit into the file, and have the length of the stored data.
    fn check(&self, stored: u64) -> Result<(), &'static str> {
        if self.size > i64::MAX as u64 {
            return Err("sparse size");
        }
        let (mut end, mut total) = (0u64, 0u64);
        for &(offset, length) in &self.segments {
            if offset < end {
                return Err("sparse map (pieces overlap)");
            }
            end = offset.checked_add(length).ok_or("sparse map")?;
            total = total.checked_add(length).ok_or("sparse map")?;
        }
        if end > self.size {
            return Err("sparse map (piece behind the end)");
        }
        if total != stored {
            return Err("sparse map (does not fit the stored size)");
        }
        Ok(())
    }
}

/// Name of a ustar header: prefix and name.
fn header_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    // GNU headers ("ustar  ") use these bytes for other fields.
    let prefix = match &header[257..263] {
        b"ustar\0" => until_nul(&header[345..500]),
        _ => &[],
    };
    if prefix.is_empty() {
        name.to_vec()
    } else {
        [prefix, b"/", name].concat()
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    &bytes[..end]
}

/// A nonnegative octal field, or a binary one if its first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    u64::try_from(signed_number(field)?).ok()
}

fn signed_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // Two's complement, big endian; the topmost bit only marks it as binary.
        let negative = first & 0x40 != 0;
        let mut value: i128 = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        for &byte in &field[1..] {
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let digits = field.iter().skip_while(|&&byte| byte == b' ');
    let mut value: i64 = 0;
    for &byte in digits {
        match byte {
            b'0'..=b'7' => value = value.checked_mul(8)?.checked_add(i64::from(byte - b'0'))?,
            b' ' | 0 => break,
            _ => return None,
        }
    }
    Some(value)
}

#[cfg(test)]
#[path = "tar_reader_tests.rs"]
mod tests;
