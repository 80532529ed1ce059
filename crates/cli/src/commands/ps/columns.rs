//! What `ps` shows of a container: the table, and the fields of `--format`.

use hull_engine::time;
use hull_sandbox::store::State;

use super::{Row, in_words};
use crate::commands::from_ns;
use crate::commands::port::outside;
use crate::format;
use crate::output::{self, Table};

/// The fields, with the headings of a table.
pub const HEADINGS: [(&str, &str); 16] = [
    ("ID", "CONTAINER ID"),
    ("Names", "NAMES"),
    ("Image", "IMAGE"),
    ("Command", "COMMAND"),
    ("CreatedAt", "CREATED AT"),
    ("RunningFor", "CREATED"),
    ("Status", "STATUS"),
    ("State", "STATE"),
    ("Ports", "PORTS"),
    ("Labels", "LABELS"),
    ("Mounts", "MOUNTS"),
    ("Networks", "NETWORKS"),
    ("LocalVolumes", "LOCAL VOLUMES"),
    ("Size", "SIZE"),
    ("Machine", "MACHINE"),
    ("Engine", "ENGINE"),
];

/// Published ports in Docker's format: `0.0.0.0:8080->80/tcp`. Empty for a stopped container.
fn ports(row: &Row) -> String {
    if matches!(row.status.state, State::Stopped | State::Created) {
        return String::new();
    }
    let shown = row.ports.iter().map(|port| {
        format!(
            "{}->{}/{}",
            outside(port),
            port.container_port,
            port.protocol.name()
        )
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn command(row: &Row, no_trunc: bool) -> String {
    let command = row.command.join(" ");
    match no_trunc {
        true => format!("\"{command}\""),
        false => format!("\"{}\"", output::shorten(&command, 20)),
    }
}

fn age(row: &Row) -> String {
    format!("{} ago", time::human_age(from_ns(row.created_ns)))
}

fn size(row: &Row) -> String {
    let Some(size) = row.size else {
        return "N/A".to_owned();
    };
    let whole = output::decimal_size(size.image.saturating_add(size.written));
    format!("{} (virtual {whole})", output::decimal_size(size.written))
}

/// The fields of a container.
pub fn fields(row: &Row, no_trunc: bool) -> format::Row {
    let mounts = row.mounts.iter().map(|mount| match no_trunc {
        true => mount.source.clone(),
        false => output::shorten(&mount.source, 15),
    });
    let volumes = row.mounts.iter().filter(|mount| mount.is_volume).count();
    format::Row::new()
        .field("ID", row.shown_id(no_trunc))
        .field("Names", row.name.as_str())
        .field("Image", row.image.as_str())
        .field("Command", command(row, no_trunc))
        .field("CreatedAt", time::format_list(from_ns(row.created_ns)))
        .field("RunningFor", age(row))
        .field("Status", in_words(&row.status, row.created_ns, row.life))
        .field("State", row.state())
        .field("Ports", ports(row))
        .labels(&row.labels)
        .field("Mounts", mounts.collect::<Vec<_>>().join(","))
        .field("Networks", row.networks.join(","))
        .field("LocalVolumes", volumes.to_string())
        .field("Size", size(row))
        .field("Machine", row.machine.as_str())
        .field("Engine", row.engine.as_str())
}

/// The table.
pub fn table(rows: &[Row], no_trunc: bool, engines: bool, with_size: bool) -> Table {
    let mut heading = vec![
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        if engines { "ENGINE" } else { "MACHINE" },
        "NAMES",
    ];
    if with_size {
        heading.push("SIZE");
    }
    let mut table = Table::new(&heading);
    for row in rows {
        let mut cells = vec![
            row.shown_id(no_trunc),
            row.image.clone(),
            command(row, no_trunc),
            age(row),
            in_words(&row.status, row.created_ns, row.life),
            ports(row),
            match engines {
                true => row.engine.clone(),
                false => row.machine.clone(),
            },
            row.name.clone(),
        ];
        if with_size {
            cells.push(size(row));
        }
        table.push(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_engine::listing::Life;
    use hull_sandbox::store::{Exit, Status};

    use super::*;

    /// A container that has ended.
    fn row() -> Row {
        let mut status = Status::new(State::Stopped);
        status.exit = Some(Exit::now(3));
        Row {
            id: "ab".repeat(32),
            name: "web".into(),
            engine: "hull".into(),
            image: "busybox:1".into(),
            image_id: "sha256:0123456789".into(),
            command: vec!["sleep".into(), "a long time with many words".into()],
            created_ns: 0,
            status,
            life: Life::default(),
            machine: "uml".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            volumes: Vec::new(),
            networks: Vec::new(),
            ports: Vec::new(),
            mounts: Vec::new(),
            directory: None,
            size: None,
        }
    }

    #[test]
    fn a_row() {
        let text = table(&[row()], false, false, false).render();
        let row = text.lines().nth(1).unwrap();
        assert!(
            row.starts_with("abababababab   busybox:1   \"sleep a long time w…\""),
            "{row}"
        );
        assert!(row.contains("Exited (3) "), "{row}");
    }

    #[test]
    fn every_field_has_a_heading_and_every_heading_a_field() {
        let format = format::ListFormat::parse("json").unwrap();
        let rows = vec![fields(&row(), false)];
        let text = format::list(&format, &HEADINGS, rows).unwrap().unwrap();
        let shown: serde_json::Value = serde_json::from_str(&text).unwrap();
        let names: Vec<&String> = shown.as_object().unwrap().keys().collect();
        assert_eq!(names, HEADINGS.map(|(name, _)| name));
        assert_eq!(shown["Labels"], "a=b");
        assert_eq!(shown["Command"], "\"sleep a long time w…\"");
    }
}
