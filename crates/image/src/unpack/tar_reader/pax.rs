//! PAX extension headers: records that override the fields of the next header.
//!
//! Called by the parent module.

use std::collections::BTreeMap;

use crate::limits::ATTRIBUTES;

/// Overrides for the next entry from extension headers.
#[derive(Default)]
pub(super) struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<(i64, u32)>,
    pub xattrs: Xattrs,
    pub sparse: SparseRecords,
}

/// Extended attributes by name; not more than [`ATTRIBUTES`] bytes.
#[derive(Default)]
pub(super) struct Xattrs {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
}

/// Why records cannot be applied.
pub(super) enum RecordError {
    /// This part is malformed.
    Malformed(&'static str),
    /// The extended attributes are too large.
    Attributes,
}

impl From<&'static str> for RecordError {
    fn from(what: &'static str) -> Self {
        Self::Malformed(what)
    }
}

#[derive(Default)]
pub(super) struct SparseRecords {
    pub major: u64,
    pub name: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub numbers: Vec<u64>,
    pub seen: bool,
}

impl Extensions {
    /// Applies `LENGTH KEY=VALUE\n` records.
    pub(super) fn add_records(&mut self, mut records: &[u8]) -> Result<(), RecordError> {
        const BAD: &str = "PAX record";
        while !records.is_empty() {
            let space = records
                .iter()
                .take(20)
                .position(|&byte| byte == b' ')
                .ok_or(BAD)?;
            let length = decimal(&records[..space]).ok_or(BAD)? as usize;
            if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
                return Err(BAD.into());
            }
            let record = &records[space + 1..length - 1];
            let equals = record.iter().position(|&byte| byte == b'=').ok_or(BAD)?;
            self.add_record(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(())
    }

    fn add_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), RecordError> {
        const XATTR: &[u8] = b"SCHILY.xattr.";
        if let Some(name) = key.strip_prefix(XATTR) {
            return self.xattrs.insert(name, value);
        }
        if value.is_empty() {
            // An empty value cancels an earlier record.
            match key {
                b"path" => self.path = None,
                b"linkpath" => self.link = None,
                b"size" => self.size = None,
                b"uid" => self.uid = None,
                b"gid" => self.gid = None,
                b"mtime" => self.mtime = None,
                _ => {}
            }
            return Ok(());
        }
        let narrow = |name| {
            decimal(value)
                .and_then(|value| u32::try_from(value).ok())
                .ok_or(name)
        };
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => {
                let size = decimal(value).filter(|&size| size <= i64::MAX as u64);
                self.size = Some(size.ok_or("PAX size")?);
            }
            b"uid" => self.uid = Some(narrow("PAX uid")?),
            b"gid" => self.gid = Some(narrow("PAX gid")?),
            b"mtime" => self.mtime = Some(pax_time(value).ok_or("PAX mtime")?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.add(key, value).ok_or("PAX sparse record")?;
                }
            }
        }
        Ok(())
    }
}

impl Xattrs {
    fn insert(&mut self, name: &[u8], value: &[u8]) -> Result<(), RecordError> {
        // The record's bytes are in memory, so this is a small number.
        let bytes = self.bytes + name.len() + value.len();
        let replaced = self
            .values
            .get(name)
            .map_or(0, |old| name.len() + old.len());
        let bytes = bytes - replaced;
        if bytes > ATTRIBUTES {
            return Err(RecordError::Attributes);
        }
        self.bytes = bytes;
        self.values.insert(name.to_vec(), value.to_vec());
        Ok(())
    }

    /// Names and values, in the order of the names.
    pub(super) fn into_vec(self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.values.into_iter().collect()
    }
}

impl SparseRecords {
    fn add(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        self.seen = true;
        match key {
            b"major" => self.major = decimal(value)?,
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"offset" | b"numbytes" => self.numbers.push(decimal(value)?),
            b"map" => {
                self.numbers = value
                    .split(|&byte| byte == b',')
                    .map(decimal)
                    .collect::<Option<_>>()?;
            }
            _ => {}
        }
        Some(())
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `SECONDS[.FRACTION]`, possibly negative.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let (negative, digits) = match whole.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, whole),
    };
    let seconds = i64::try_from(decimal(digits.as_bytes())?).ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}
