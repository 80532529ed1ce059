//! Files in and out of containers, as archives.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hull_engine::changes;
use hull_engine::copy::{ArchiveReader, ArchiveWriter, EntryKind};
use hull_engine::time;
use hyper::StatusCode;
use serde_json::{Value, json};

use super::find;
use crate::Shared;
use crate::call::{Call, JSON, Reply};
use crate::failure::{Failure, Result};

/// Where it is said what a path names.
const STAT: &str = "x-docker-container-path-stat";

/// Bits of Go's `os.FileMode`.
const DIRECTORY: u32 = 1 << 31;
const SYMLINK: u32 = 1 << 27;
const DEVICE: u32 = 1 << 26;
const NAMED_PIPE: u32 = 1 << 25;
const CHAR_DEVICE: u32 = 1 << 21;
const SETUID: u32 = 1 << 23;
const SETGID: u32 = 1 << 22;
const STICKY: u32 = 1 << 20;

fn path(call: &Call) -> Result<String> {
    let path = call.query.get("path");
    let path = path.ok_or_else(|| Failure::bad("path: it is needed"))?;
    Ok(match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/{path}"),
    })
}

/// What a path names, as the value of a header.
fn stat_of(state: &Shared, id: &str, path: &str) -> Result<String> {
    let container = find(state, id)?;
    let paths = state.config.paths();
    let reader = ArchiveReader::ask(&paths, &container, path.to_owned(), false)?;
    let entry = reader.first().map_err(|error| missing(error, path, id))?;
    let kind = match entry.kind {
        EntryKind::Directory => DIRECTORY,
        EntryKind::Symlink => SYMLINK,
        EntryKind::CharDevice => DEVICE | CHAR_DEVICE,
        EntryKind::BlockDevice => DEVICE,
        EntryKind::Fifo => NAMED_PIPE,
        _ => 0,
    };
    let special = [(0o4000, SETUID), (0o2000, SETGID), (0o1000, STICKY)];
    let special = special
        .iter()
        .filter(|(bit, _)| entry.mode & bit != 0)
        .fold(0, |mode, (_, bit)| mode | bit);
    let trimmed = path.trim_end_matches("/.").trim_end_matches('/');
    let name = trimmed.rsplit('/').next().unwrap_or_default();
    let (seconds, nanoseconds) = entry.mtime;
    let stat = json!({
        "name": if name.is_empty() { "/" } else { name },
        "size": entry.sparse.as_ref().map_or(entry.stored, |sparse| sparse.size),
        "mode": kind | special | (entry.mode & 0o777),
        "mtime": time::format_rfc3339(
            i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds),
        ),
        "linkTarget": String::from_utf8_lossy(&entry.link),
    });
    Ok(STANDARD.encode(stat.to_string()))
}

/// The guest says that there is no such path by an error of its own.
fn missing(error: hull_engine::error::Error, path: &str, id: &str) -> Failure {
    let mut failure = Failure::from(error);
    if failure.status == StatusCode::NOT_FOUND {
        failure.message = format!("Could not find the file {path} in container {id}");
    }
    failure
}

/// Says what a path names.
pub fn stat(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let stat = stat_of(state, id, &path(call)?)?;
    if let Some(answer) = call.answer.take() {
        answer.whole(StatusCode::OK, JSON, vec![(STAT, stat)], <_>::default());
    }
    Ok(Reply::Taken)
}

/// Sends the archive of a path.
pub fn get(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let path = path(call)?;
    let stat = stat_of(state, id, &path)?;
    let container = find(state, id)?;
    // Docker names what is in a directory that is asked for so by its path in it.
    let is_content = path.ends_with("/.");
    let mut reader = ArchiveReader::ask(&state.config.paths(), &container, path, false)?;
    let mut stream = call.stream_with("application/x-tar", vec![(STAT, stat)])?;
    match is_content {
        true => changes::content(reader, &mut stream)?,
        false => reader.copy_to(&mut stream)?,
    }
    stream.finish();
    Ok(Reply::Taken)
}

/// Unpacks an archive in a directory.
pub fn put(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let path = path(call)?;
    let paths = state.config.paths();
    let mut writer = ArchiveWriter::ask(&paths, &container, path.clone())?;
    let mut archive = crate::transfer::decompressed(&mut call.body)?;
    writer.copy_from(&mut archive)?;
    writer.finish().map_err(|error| missing(error, &path, id))?;
    Ok(Reply::Json(StatusCode::OK, Value::Null))
}
