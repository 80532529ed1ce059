//! `hull events`.

use std::os::fd::AsFd;

use hull_engine::events::{Describer, EventFilter, Feed, selects};
use hull_engine::time::{self, UnixNanos};
use hull_sandbox::events::{Event, EventKind};
use serde_json::Value;

use super::{config_for_root, from_ns};
use crate::error::{Error, Result};
use crate::format::Template;
use crate::output;

/// Arguments of `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show only events that match: type=, event=, container=, image=, label=, network=, sandbox=;
    /// may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = EventFilter::parse)]
    filters: Vec<EventFilter>,
    /// How each event is printed: "text", "json", or a template of Go's
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = Format::parse)]
    format: Format,
    /// Begin with events since a time (2026-11-21T10:00:00) or of a time (42m)
    #[arg(long, value_name = "TIME", value_parser = time::parse_since)]
    since: Option<UnixNanos>,
    /// End at a time, or when all events up to now are shown ("now")
    #[arg(long, value_name = "TIME", value_parser = until)]
    until: Option<UnixNanos>,
}

/// How events are printed.
#[derive(Clone, Debug)]
enum Format {
    /// A line for people.
    Text,
    /// A line of JSON.
    Json,
    /// What a template makes of it.
    Template(Template),
}

impl Format {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        Ok(match text.trim() {
            "" | "text" => Self::Text,
            "json" => Self::Json,
            _ => Self::Template(Template::parse(text)?),
        })
    }
}

fn until(text: &str) -> std::result::Result<UnixNanos, String> {
    match text {
        "now" => Ok(time::now()),
        _ => time::parse_since(text),
    }
}

/// Prints events until interrupted, or until a given time.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let mut feed = Feed::open(&config.run_dir, args.since, args.until)?;
    // Containers are looked up for those who ask for Docker's words only.
    let plain = matches!(args.format, Format::Text | Format::Json) && args.filters.is_empty();
    let mut describer = match plain {
        true => None,
        false => Some(Describer::new(config.paths())?),
    };
    let stdout = std::io::stdout();
    while let Some(event) = feed.next(stdout.as_fd())? {
        let described = describer
            .as_mut()
            .map(|describer| describer.describe(&event));
        let described = described.unwrap_or_default();
        if selects(&args.filters, &event, &described) {
            output::print(line(&event, described, &args.format)?)?;
        }
    }
    Ok(0)
}

/// `described`: the event in Docker's words.
fn line(event: &Event, described: Value, format: &Format) -> Result<String> {
    let object = || {
        serde_json::to_value(event)
            .map_err(|error| Error::new(format!("cannot write JSON: {error}")))
    };
    match format {
        Format::Text => {}
        Format::Json => return Ok(format!("{}\n", object()?)),
        // Both hull's keys and Docker's.
        Format::Template(template) => {
            let (mut all, Value::Object(dockers)) = (object()?, described) else {
                return Err(Error::new("an event is no object"));
            };
            if let Some(all) = all.as_object_mut() {
                all.extend(dockers);
            }
            return Ok(template.render(&all)? + "\n");
        }
    }
    let at = time::format_rfc3339(from_ns(event.time_ns));
    let mut line = format!("{at} {}", event.kind.name());
    match event.kind.container() {
        "" => line.push_str(&format!(" sandbox={}", event.sandbox)),
        container => line.push_str(&format!(" container={container}")),
    }
    match &event.kind {
        EventKind::ExecAdded { exec, .. } | EventKind::ExecStarted { exec, .. } => {
            line.push_str(&format!(" exec={exec}"));
        }
        EventKind::Exited { exec, exit, .. } => {
            if !exec.is_empty() {
                line.push_str(&format!(" exec={exec}"));
            }
            line.push_str(&format!(" status={}", exit.status));
            if exit.oom_killed {
                line.push_str(" oom_killed");
            }
        }
        EventKind::GuestFailed { reason } => line.push_str(&format!(" reason={reason:?}")),
        EventKind::HealthStatus { status, .. } => line.push_str(&format!(" status={status}")),
        EventKind::Connected { network, .. } | EventKind::Disconnected { network, .. } => {
            line.push_str(&format!(" network={network}"));
        }
        _ => {}
    }
    Ok(output::printable(&line) + "\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn started(container: &str) -> Event {
        let container = container.to_owned();
        Event::now("s1", EventKind::Started { container })
    }

    #[test]
    fn lines_are_for_people_or_programs() {
        let event = started("abc");
        let described = json!({"Type": "container", "Action": "start", "Actor": {"ID": "abc"}});
        let line = |format: &str| {
            line(&event, described.clone(), &Format::parse(format).unwrap()).unwrap()
        };
        let text = line("text");
        assert!(text.ends_with("Z started container=abc\n"), "{text}");
        let json = line("json");
        assert!(json.contains(r#""container":"abc""#), "{json}");
        assert!(!json.contains("Action"), "{json}");
        let text = line("{{.Type}} {{.Action}} {{.Actor.ID}} {{.type}} {{.container}}");
        assert_eq!(text, "container start abc started abc\n");
    }
}
