//! Builds tar archives for tests, including malformed ones.

#![allow(dead_code, clippy::unwrap_used)] // each test binary uses a part

/// An archive under construction.
pub struct Tar {
    bytes: Vec<u8>,
    next: Meta,
}

/// Metadata of the next entry.
#[derive(Clone)]
pub struct Meta {
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub device: (u32, u32),
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            device: (0, 0),
        }
    }
}

impl Tar {
    pub fn new() -> Self {
        Self {
            bytes: Vec::new(),
            next: Meta::default(),
        }
    }

    pub fn meta(mut self, meta: Meta) -> Self {
        self.next = meta;
        self
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.next.mode = mode;
        self
    }

    /// Appends a header and its data, as given.
    pub fn raw(
        mut self,
        name: impl AsRef<[u8]>,
        kind: u8,
        link: impl AsRef<[u8]>,
        data: &[u8],
    ) -> Self {
        let header = self.header(name.as_ref(), kind, link.as_ref(), data.len() as u64);
        self.bytes.extend(header);
        self.data(data)
    }

    /// Appends a header only, which announces `size` bytes.
    pub fn header_only(mut self, name: &str, kind: u8, size: u64) -> Self {
        let header = self.header(name.as_bytes(), kind, b"", size);
        self.bytes.extend(header);
        self
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn header(&mut self, name: &[u8], kind: u8, link: &[u8], size: u64) -> [u8; 512] {
        let meta = std::mem::take(&mut self.next);
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name);
        let octal = |header: &mut [u8; 512], at: usize, width: usize, value: u64| {
            let text = format!("{value:0width$o}", width = width - 1);
            header[at..at + width - 1].copy_from_slice(text.as_bytes());
        };
        octal(&mut header, 100, 8, u64::from(meta.mode));
        octal(&mut header, 108, 8, meta.uid);
        octal(&mut header, 116, 8, meta.gid);
        octal(&mut header, 124, 12, size);
        octal(&mut header, 136, 12, meta.mtime);
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link);
        header[257..265].copy_from_slice(b"ustar\x0000");
        octal(&mut header, 329, 8, u64::from(meta.device.0));
        octal(&mut header, 337, 8, u64::from(meta.device.1));
        Self::seal(&mut header);
        header
    }

    /// Sets the checksum.
    pub fn seal(header: &mut [u8]) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    pub fn file(self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.raw(name, b'0', "", content.as_ref())
    }

    pub fn dir(mut self, name: impl AsRef<[u8]>) -> Self {
        if self.next.mode == 0o644 {
            self.next.mode = 0o755;
        }
        self.raw(name, b'5', "", b"")
    }

    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.raw(name, b'2', target, b"")
    }

    pub fn hard_link(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.raw(name, b'1', target, b"")
    }

    pub fn device(mut self, name: &str, kind: u8, major: u32, minor: u32) -> Self {
        self.next.device = (major, minor);
        self.raw(name, kind, "", b"")
    }

    /// Appends PAX records for the next entry. (The last `meta` applies to the entry, not to this
    /// header.)
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        let meta = self.next.clone();
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length.to_string().len() + rest != length {
                length = length.to_string().len() + rest;
            }
            data.extend(format!("{length} {key}=").into_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        self = self.raw("pax", b'x', "", &data);
        self.next = meta;
        self
    }

    /// The archive with its end blocks.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }

    /// The archive without its end blocks.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }
}
