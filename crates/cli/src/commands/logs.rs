//! `hull logs`.

use std::io::Write;
use std::os::fd::AsFd;

use hull_engine::Paths;
use hull_engine::container::{self, Any};
use hull_engine::log::{Followed, Follower, Lines};
use hull_engine::time::{self, UnixNanos};
use hull_engine::values;
use hull_sandbox::log::{self, Entry, Reader, Stream};
use hull_sandbox::store::State;

use super::{config_for_existing, for_each, for_each_at_once};
use crate::error::{Context, Error, Result};
use crate::output;

/// Arguments of `logs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with new output until the container ends
    #[arg(short, long)]
    follow: bool,
    /// Show output since a time (2026-11-21T10:00:00) or for a time (42m)
    #[arg(long, value_name = "TIME", value_parser = time::parse_since)]
    since: Option<UnixNanos>,
    /// Show output up to a time (2026-11-21T10:00:00) or for a time (42m) ago
    #[arg(long, value_name = "TIME", value_parser = time::parse_since)]
    until: Option<UnixNanos>,
    /// Show this many lines from the end, or "all"
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = values::tail)]
    tail: values::Tail,
    /// Begin each line with its time
    #[arg(short, long)]
    timestamps: bool,
    /// Begin each line with what --log-opt keeps beside it: labels, variables, a tag
    #[arg(long)]
    details: bool,
    /// Begin each line with the container's name
    #[arg(long)]
    names: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Prints the output of containers, each stream to its own.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    match &args.containers[..] {
        [one] => show(&args, &paths, one),
        // At once only if they are followed.
        all if args.follow => for_each_at_once(all, |one| show(&args, &paths, one).map(|_| None)),
        all => for_each(all, |one| show(&args, &paths, one).map(drop)),
    }
}

/// Prints the output of one.
fn show(args: &Args, paths: &Paths, name: &str) -> Result<u8> {
    let container = match container::find_any(paths, name)? {
        Any::Own(own) => *own,
        Any::Engine(other) => {
            let (id, engine) = (&other.stored.record.id, &other.stored.record.engine);
            let program = match engine.as_str() {
                "containerd" | "cri-o" => "crictl",
                engine => engine,
            };
            return Err(Error::unsupported(format_args!(
                "logs of container {id}: its output belongs to {engine}"
            ))
            .hint(format!("{program} logs {id}")));
        }
    };
    let name = &container.record.details.name;
    let options = container.record.details.options.as_ref();
    if options.is_some_and(|options| options.log.off) {
        return Err(Error::wrong_state(format!(
            "nothing is kept of the output of container {name}: --log-driver none"
        )));
    }
    let open = || match Reader::open(container.directory.try_clone()?) {
        Ok(reader) => Ok(Some(reader)),
        // Created when the container starts.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("read the output of container {name}")),
    };
    let mut lines = Lines::new(args.since, args.until, args.timestamps);
    if args.names {
        lines.prefix = format!("{name} ");
    }
    if args.details {
        lines.details = hull_engine::log::details(&container)?;
    }
    // Watch before reading, so that no output is missed.
    let follower = match args.follow && container.status.state != State::Stopped {
        true => Some(Follower::new(&container, args.until)?),
        false => None,
    };
    let Some(mut reader) = open()? else {
        return Ok(0);
    };
    if matches!(args.tail, values::Tail(None))
        && args.since.is_none()
        && log::is_cut(&container.directory)
    {
        output::note("note: the beginning is lost: the output is longer than log_size");
    }
    if let values::Tail(Some(wanted)) = args.tail {
        let Some(mut counter) = open()? else {
            return Ok(0);
        };
        let mut counted = Lines::new(args.since, args.until, false);
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
                Stream::Output => output::print(&text)?,
                Stream::Error => {
                    // If standard error is closed, still print the rest.
                    let _ = stderr.lock().write_all(&text);
                }
            }
        }
        Ok(())
    };
    pass(&mut reader)?;
    if let Some(follower) = follower {
        loop {
            match follower.wait(stdout.as_fd())? {
                Followed::More => pass(&mut reader)?,
                Followed::Ended => break,
                // As if SIGPIPE had ended this process.
                Followed::Unread => return Ok(141),
            }
        }
        pass(&mut reader)?;
    }
    Ok(0)
}

fn next(reader: &mut Reader) -> Result<Option<Entry>> {
    reader.next_entry().context(|| "read the output")
}
