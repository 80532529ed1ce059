//! `hull logs`.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use hull_sandbox::log::{Entry, Reader, Stream};
use hull_sandbox::wire::Request;
use hull_sandbox::{ContainerPaths, Record, State, client};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;

use super::config_for_root;
use crate::error::{Context, Error, Result};
use crate::time::{self, UnixNanos};
use crate::values;

/// Arguments of `logs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with new output until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Show output since a time (2026-11-21T10:00:00) or for a time (42m)
    #[arg(long, value_name = "TIME", value_parser = time::parse_since)]
    since: Option<UnixNanos>,
    /// Show this many lines from the end, or "all"
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = values::tail)]
    tail: values::Tail,
    /// Begin each line with its time
    #[arg(short, long)]
    timestamps: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Prints what a container has written, each stream to its own.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    let (record, container) = client::find(&paths, &args.container)?;
    let path = container.log();
    let open = || match Reader::open(&path) {
        Ok(reader) => Ok(Some(reader)),
        // Made when the container starts.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(error).context(|| format!("cannot read the output of container {}", record.name))
        }
    };
    let mut lines = Lines::new(args.since, args.timestamps);
    // Watched before it is read: nothing that is written in between is missed.
    let follower = match args.follow && record.state != State::Stopped {
        true => Some(Follower::new(&record, &container)?),
        false => None,
    };
    let Some(mut reader) = open()? else {
        return Ok(0);
    };
    if let values::Tail(Some(wanted)) = args.tail {
        let Some(mut counter) = open()? else {
            return Ok(0);
        };
        let mut counted = Lines::new(args.since, false);
        while let Some(entry) = next(&mut counter)? {
            counted.count(&entry);
        }
        lines.skip = counted.begun.saturating_sub(wanted);
    }
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    let mut pass = |reader: &mut Reader| -> Result<()> {
        while let Some(entry) = next(reader)? {
            let text = lines.format(&entry);
            match entry.stream {
                Stream::Output => crate::output::print(&text)?,
                Stream::Error => {
                    // A closed standard error is not worth losing the rest for.
                    let _ = stderr.lock().write_all(&text);
                }
            }
        }
        Ok(())
    };
    pass(&mut reader)?;
    if let Some(follower) = follower {
        while follower.wait(stdout.as_fd())? {
            pass(&mut reader)?;
        }
        pass(&mut reader)?;
    }
    Ok(0)
}

fn next(reader: &mut Reader) -> Result<Option<Entry>> {
    reader.next_entry().context(|| "cannot read the output")
}

/// Cuts entries into lines: which are shown, and what they begin with.
#[derive(Debug)]
struct Lines {
    since: Option<UnixNanos>,
    timestamps: bool,
    /// Lines that are not shown.
    skip: usize,
    /// Lines begun so far.
    begun: usize,
    /// For each stream, whether its last line has not ended, and whether that line is shown.
    streams: [OpenLine; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct OpenLine {
    open: bool,
    shown: bool,
}

impl Lines {
    fn new(since: Option<UnixNanos>, timestamps: bool) -> Lines {
        Lines {
            since,
            timestamps,
            skip: 0,
            begun: 0,
            streams: Default::default(),
        }
    }

    fn is_too_old(&self, entry: &Entry) -> bool {
        self.since
            .is_some_and(|since| i128::from(entry.time) < since)
    }

    fn count(&mut self, entry: &Entry) {
        self.format(entry);
    }

    /// What is printed of an entry.
    fn format(&mut self, entry: &Entry) -> Vec<u8> {
        let mut text = Vec::with_capacity(entry.bytes.len());
        if self.is_too_old(entry) {
            return text;
        }
        let index = match entry.stream {
            Stream::Output => 0,
            Stream::Error => 1,
        };
        for piece in entry.bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = &mut self.streams[index];
            if !line.open {
                self.begun += 1;
                line.shown = self.begun > self.skip;
                if line.shown && self.timestamps {
                    text.extend_from_slice(time::format_rfc3339(i128::from(entry.time)).as_bytes());
                    text.push(b' ');
                }
            }
            line.open = !piece.ends_with(b"\n");
            if line.shown {
                text.extend_from_slice(piece);
            }
        }
        text
    }
}

/// Tells when there is new output, or the container has ended.
struct Follower {
    watch: rustix::fd::OwnedFd,
    /// The sandbox process answers on it, or closes it, when the container has ended.
    end: Option<UnixStream>,
}

impl Follower {
    fn new(record: &Record, container: &ContainerPaths) -> Result<Follower> {
        let directory = &container.data;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context(|| "cannot watch files")?;
        let events = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, directory, events)
            .context(|| format!("cannot watch {}", directory.display()))?;
        // Not asked in the usual way: that would wait for the answer.
        let end = UnixStream::connect(container.socket()).ok();
        if let Some(stream) = &end {
            hull_sandbox::wire::write_json(
                stream,
                hull_sandbox::wire::Kind::Request,
                &Request::Wait,
            )
            .context(|| format!("cannot ask for the end of container {}", record.name))?;
        }
        Ok(Follower { watch, end })
    }

    /// Waits for new output; false when there will be no more.
    fn wait(&self, stdout: std::os::fd::BorrowedFd<'_>) -> Result<bool> {
        let Some(end) = &self.end else {
            return Ok(false);
        };
        let mut descriptors = [
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
            // Only its end is of interest, which is always reported.
            PollFd::new(&stdout, PollFlags::empty()),
        ];
        loop {
            match poll(&mut descriptors, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context(|| "cannot wait for output"),
            }
        }
        if descriptors[2]
            .revents()
            .intersects(PollFlags::ERR | PollFlags::HUP)
        {
            return Err(Error::printed(141));
        }
        if !descriptors[1].revents().is_empty() {
            return Ok(false);
        }
        // What changed does not matter: the events only have to be taken.
        let mut events = [0u8; 4096];
        while rustix::io::read(&self.watch, &mut events).is_ok_and(|length| length > 0) {}
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(time: u64, stream: Stream, text: &str) -> Entry {
        Entry {
            time,
            stream,
            bytes: text.as_bytes().to_vec(),
        }
    }

    fn show(lines: &mut Lines, entries: &[Entry]) -> String {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| lines.format(entry))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn every_line_gets_one_time() {
        let entries = [
            entry(0, Stream::Output, "a\nb"),
            entry(1, Stream::Error, "E\n"),
            entry(2, Stream::Output, "c\n"),
        ];
        let text = show(&mut Lines::new(None, true), &entries);
        assert_eq!(
            text,
            "1970-01-01T00:00:00.000000000Z a\n1970-01-01T00:00:00.000000000Z b\
             1970-01-01T00:00:00.000000001Z E\nc\n"
        );
    }

    #[test]
    fn old_output_and_first_lines_are_left_out() {
        let entries = [
            entry(1, Stream::Output, "a\nb\n"),
            entry(5, Stream::Output, "c"),
            entry(6, Stream::Output, "d\ne"),
        ];
        assert_eq!(show(&mut Lines::new(Some(5), false), &entries), "cd\ne");
        let mut lines = Lines::new(None, false);
        lines.skip = 2;
        assert_eq!(show(&mut lines, &entries), "cd\ne");
        assert_eq!(lines.begun, 4);
    }
}
