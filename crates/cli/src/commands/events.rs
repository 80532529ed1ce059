//! `hull events`.

use std::os::fd::AsFd;

use hull_engine::events::{self, Feed};
use hull_engine::time::{self, UnixNanos};
use hull_sandbox::events::{Event, EventKind};

use super::{config_for_root, from_ns};
use crate::error::{Error, Result};
use crate::format::Template;
use crate::output;

/// Arguments of `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show only events that match: type=NAME, container=ID, sandbox=ID; may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
    filters: Vec<Filter>,
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

/// One condition of `--filter`. Several of one key are alternatives.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Filter {
    Type(String),
    Container(String),
    Sandbox(String),
}

impl Filter {
    fn parse(text: &str) -> std::result::Result<Filter, String> {
        let wrong = || format!("invalid filter {text:?}: give type=, container= or sandbox=");
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let value = value.to_owned();
        Ok(match key {
            "type" | "event" => Filter::Type(value),
            "container" => Filter::Container(value),
            "sandbox" => Filter::Sandbox(value),
            _ => return Err(wrong()),
        })
    }

    fn matches(&self, event: &Event) -> bool {
        match self {
            Filter::Type(name) => event.kind.name() == name,
            Filter::Container(id) => !id.is_empty() && event.kind.container().starts_with(id),
            Filter::Sandbox(id) => event.sandbox.starts_with(id),
        }
    }
}

fn all_match(filters: &[Filter], event: &Event) -> bool {
    let key = |filter: &Filter| std::mem::discriminant(filter);
    filters.iter().all(|filter| {
        let mut same = filters.iter().filter(|other| key(other) == key(filter));
        same.any(|filter| filter.matches(event))
    })
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
    let stdout = std::io::stdout();
    while let Some(event) = feed.next(stdout.as_fd())? {
        if all_match(&args.filters, &event) {
            output::print(line(&event, &args.format)?)?;
        }
    }
    Ok(0)
}

fn line(event: &Event, format: &Format) -> Result<String> {
    let object = || {
        serde_json::to_value(event)
            .map_err(|error| Error::new(format!("cannot write JSON: {error}")))
    };
    match format {
        Format::Text => {}
        Format::Json => return Ok(format!("{}\n", object()?)),
        Format::Template(template) => {
            return Ok(template.render(&events::with_dockers_keys(event, object()?))? + "\n");
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
        _ => {}
    }
    Ok(output::printable(&line) + "\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn started(container: &str) -> Event {
        let container = container.to_owned();
        Event::now("s1", EventKind::Started { container })
    }

    #[test]
    fn filters_of_one_key_are_alternatives() {
        let filter = |text: &str| Filter::parse(text).unwrap();
        let event = started("abc");
        for (filters, matches) in [
            (vec![], true),
            (vec!["type=started"], true),
            (vec!["type=exited", "type=started"], true),
            (vec!["type=started", "container=ab"], true),
            (vec!["type=started", "container=x"], false),
            (vec!["sandbox=s1"], true),
        ] {
            let parsed: Vec<Filter> = filters.iter().map(|text| filter(text)).collect();
            assert_eq!(all_match(&parsed, &event), matches, "{filters:?}");
        }
        assert!(Filter::parse("colour=red").is_err());
    }

    #[test]
    fn lines_are_for_people_or_programs() {
        let event = started("abc");
        let line = |format: &str| line(&event, &Format::parse(format).unwrap()).unwrap();
        let text = line("text");
        assert!(text.ends_with("Z started container=abc\n"), "{text}");
        let json = line("json");
        assert!(json.contains(r#""container":"abc""#), "{json}");
        assert!(!json.contains("Action"), "{json}");
        let text =
            line("{{.Type}} {{.Action}} {{.Actor.ID}} {{.type}} {{.Actor.Attributes.sandbox}}");
        assert_eq!(text, "container start abc started s1\n");
    }
}
