//! Output of containers that was kept.

use std::io::{self, Write};
use std::os::fd::AsFd;

use hull_engine::container::{self, Container};
use hull_engine::error::{Context, Error};
use hull_engine::log::{self, Followed, Follower, Lines};
use hull_engine::time;
use hull_engine::values;
use hull_sandbox::log::{Reader, Stream};
use hull_sandbox::store::State as ContainerState;

use super::find;
use crate::Shared;
use crate::attach::kind;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};

/// What is wanted of it.
struct Wanted {
    lines: Lines,
    /// Output and error.
    streams: [bool; 2],
    /// Each piece says which stream it is of.
    framed: bool,
}

impl Wanted {
    /// Passes on what there is.
    fn pass(&mut self, reader: &mut Reader, to: &mut impl Write) -> io::Result<()> {
        while let Some(entry) = reader.next_entry()? {
            let index = match entry.stream {
                Stream::Output => 0,
                Stream::Error => 1,
            };
            if !self.streams[index] {
                continue;
            }
            let text = self.lines.format(&entry);
            if text.is_empty() {
                continue;
            }
            match self.framed {
                true => to.write_all(&frame(index as u8 + 1, &text))?,
                false => to.write_all(&text)?,
            }
        }
        Ok(())
    }
}

/// A piece of a stream with its head.
pub fn frame(stream: u8, text: &[u8]) -> Vec<u8> {
    // Entries of the log are short.
    let mut piece = vec![stream, 0, 0, 0];
    piece.extend((text.len() as u32).to_be_bytes());
    piece.extend(text);
    piece
}

fn open(container: &Container) -> Result<Option<Reader>> {
    match Reader::open(container.directory.try_clone()?) {
        Ok(reader) => Ok(Some(reader)),
        // Created when the container starts.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Ok(Err(error).context(|| "read the output")?),
    }
}

/// Writes all that was kept, for a caller that attaches.
pub fn replay(container: &Container, mut to: impl Write, streams: [bool; 2]) -> Result<()> {
    let mut wanted = Wanted {
        lines: Lines::new(None, None, false),
        streams,
        framed: !container.record.details.terminal,
    };
    if let Some(mut reader) = open(container)? {
        wanted
            .pass(&mut reader, &mut to)
            .context(|| "pass on the output")?;
    }
    Ok(())
}

/// Sends output.
pub fn logs(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let details = &container.record.details;
    let query = &call.query;
    let streams = [query.flag("stdout"), query.flag("stderr")];
    if streams == [false; 2] {
        return Err(Failure::bad(
            "Bad parameters: you must choose at least one stream",
        ));
    }
    if details
        .options
        .as_ref()
        .is_some_and(|options| options.log.off)
    {
        return Err(Error::wrong_state(format!(
            "nothing is kept of the output of container {}: its log driver is none",
            details.name
        ))
        .into());
    }
    let moment = |name: &str| match query.get(name) {
        None | Some("0") => Ok(None),
        Some(text) => time::parse_since(text).map(Some).map_err(Failure::bad),
    };
    let (since, until) = (moment("since")?, moment("until")?);
    let mut wanted = Wanted {
        lines: Lines::new(since, until, query.flag("timestamps")),
        streams,
        framed: !details.terminal,
    };
    if query.flag("details") {
        wanted.lines.details = log::details(&container)?;
    }
    let tail = values::tail(query.get("tail").unwrap_or("all")).map_err(Failure::bad)?;
    // Watch before reading, so that no output is missed.
    let is_over = until.is_some_and(|until| until <= time::now());
    let follows =
        query.flag("follow") && !is_over && container.status.state != ContainerState::Stopped;
    let follower = match follows && !container::is_idle(&container) {
        true => Some(Follower::new(&container, until)?),
        false => None,
    };
    if let values::Tail(Some(most)) = tail
        && let Some(mut counter) = open(&container)?
    {
        let mut counted = Wanted {
            lines: Lines::new(since, until, false),
            streams,
            framed: false,
        };
        counted
            .pass(&mut counter, &mut io::sink())
            .context(|| "read the output")?;
        wanted.lines.skip = counted.lines.begun.saturating_sub(most);
    }
    let reader = open(&container)?;
    let kind = kind(details.terminal);
    let mut stream = call.stream(kind)?;
    let Some(mut reader) = reader else {
        stream.finish();
        return Ok(Reply::Taken);
    };
    let doing = || "pass on the output";
    wanted.pass(&mut reader, &mut stream).context(doing)?;
    let Some(follower) = follower else {
        stream.finish();
        return Ok(Reply::Taken);
    };
    loop {
        match follower.wait(stream.as_fd())? {
            Followed::More => wanted.pass(&mut reader, &mut stream).context(doing)?,
            Followed::Ended => break,
            Followed::Unread => return Ok(Reply::Taken),
        }
    }
    wanted.pass(&mut reader, &mut stream).context(doing)?;
    stream.finish();
    Ok(Reply::Taken)
}
