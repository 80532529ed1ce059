//! The results: every value, the table of medians with ratios to runc, and the result files.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::contestants::{Contestant, Setup};
use crate::{Options, all, svg};

/// Which values are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Times, memory.
    Lower,
    /// Throughput.
    Higher,
}

/// A row of the table.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Name of the measurement.
    pub name: String,
    /// Unit of the values.
    pub unit: String,
    /// Which values are better.
    pub better: Better,
    /// For each contestant, in the order of [`Results::contestants`].
    pub values: Vec<Vec<f64>>,
}

/// Results of one run, and the machine.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Day of the run.
    pub date: String,
    /// Processors, memory, versions.
    pub machine: Vec<(String, String)>,
    /// Headings of the columns.
    pub contestants: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Row {
    /// Median of a contestant's values.
    pub fn median(&self, contestant: usize) -> Option<f64> {
        median(self.values.get(contestant)?)
    }

    /// A contestant's median in units of the first contestant's.
    pub fn ratio(&self, contestant: usize) -> Option<f64> {
        let (own, first) = (self.median(contestant)?, self.median(0)?);
        (first > 0.0).then(|| own / first)
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    Some(if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle] + sorted[middle + 1]) / 2.0
    })
}

/// Three significant digits, and at most three decimals.
pub fn number(value: f64) -> String {
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 1.0 {
        2
    } else {
        3
    };
    format!("{value:.digits$}")
}

impl Results {
    /// Empty results with a description of the machine.
    pub fn new(setup: &Setup) -> Result<Results> {
        let line = |program: &str, arguments: &[&str]| -> String {
            let output = Command::new(program).args(arguments).output();
            let text = output
                .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
                .unwrap_or_default();
            text.lines().next().unwrap_or("not there").trim().to_owned()
        };
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("", |m| m.1);
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let kilobytes: f64 = meminfo
            .split_whitespace()
            .nth(1)
            .context("no MemTotal")?
            .parse()?;
        let load = fs::read_to_string("/proc/loadavg")?;
        // Only the version; the rest names a distribution's build.
        let release = line("uname", &["-r"]);
        let release = release.split('-').next().unwrap_or_default().to_owned();
        let machine = vec![
            (
                "processors".to_owned(),
                format!("{} × {model}", std::thread::available_parallelism()?),
            ),
            (
                "memory".to_owned(),
                format!("{:.0} GiB", kilobytes / f64::from(1 << 20)),
            ),
            ("kernel".to_owned(), release),
            ("guest kernel".to_owned(), guest_kernel(setup)),
            ("runc".to_owned(), line("runc", &["--version"])),
            (
                "qemu".to_owned(),
                line(
                    &format!("qemu-system-{}", std::env::consts::ARCH),
                    &["--version"],
                ),
            ),
            (
                "load before".to_owned(),
                load.split(' ').next().unwrap_or_default().to_owned(),
            ),
        ];
        Ok(Results {
            date: line("date", &["+%Y-%m-%d"]),
            machine,
            contestants: all(setup)
                .iter()
                .map(|contestant| contestant.name())
                .collect(),
            rows: Vec::new(),
        })
    }

    /// Adds a row.
    pub fn row(&mut self, name: &str, unit: &str, better: Better) {
        let values = vec![Vec::new(); self.contestants.len()];
        self.rows.push(Row {
            name: name.to_owned(),
            unit: unit.to_owned(),
            better,
            values,
        });
    }

    /// Adds a value to an existing row.
    pub fn add(&mut self, name: &str, contestant: Contestant, value: f64) {
        let column = self
            .contestants
            .iter()
            .position(|name| *name == contestant.name());
        let row = self.rows.iter_mut().find(|row| row.name == name);
        if let (Some(row), Some(column)) = (row, column) {
            eprintln!(
                "  {:9} {name}: {} {}",
                contestant.name(),
                number(value),
                row.unit
            );
            row.values[column].push(value);
        }
    }

    /// The table as Markdown: readable as it is, and used in the README.
    pub fn table(&self) -> String {
        let mut lines = vec![vec!["".to_owned(), "unit".to_owned()]];
        lines[0].extend(self.contestants.iter().cloned());
        for row in &self.rows {
            let mut cells = vec![row.name.clone(), row.unit.clone()];
            for column in 0..self.contestants.len() {
                cells.push(match (row.median(column), row.ratio(column)) {
                    (None, _) => "–".to_owned(),
                    (Some(median), _) if column == 0 => {
                        format!("{} ({})", number(median), row.values[0].len())
                    }
                    (Some(median), Some(ratio)) => {
                        format!(
                            "{} ×{} ({})",
                            number(median),
                            number(ratio),
                            row.values[column].len()
                        )
                    }
                    (Some(median), None) => {
                        format!("{} ({})", number(median), row.values[column].len())
                    }
                });
            }
            lines.push(cells);
        }
        let columns = self.contestants.len() + 2;
        let width = |column: usize| {
            lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = format!(
            "\nhull beside runc, {}: medians, ratio to runc (number of rounds)\n\n",
            self.date
        );
        for (number, line) in lines.iter().enumerate() {
            let cells: Vec<String> = line
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.chars().count())))
                .collect();
            text.push_str(&format!("| {} |\n", cells.join(" | ")));
            if number == 0 {
                let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
                text.push_str(&format!("| {} |\n", rules.join(" | ")));
            }
        }
        text.push('\n');
        for (what, value) in &self.machine {
            text.push_str(&format!("{what}: {value}\n"));
        }
        text
    }

    /// Writes `bench/results/latest.{json,md,svg}`. A partial or quick run is stored separately, as
    /// `partial`.
    pub fn store(&self, options: &Options) -> Result<()> {
        let directory = options.repository.join("bench/results");
        fs::create_dir_all(&directory)?;
        let part = !options.only.is_empty() || !options.machines.is_empty();
        let name = if options.quick || part {
            "partial"
        } else {
            "latest"
        };
        let write = |extension: &str, text: String| {
            let path = directory.join(format!("{name}.{extension}"));
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))
        };
        write("json", serde_json::to_string_pretty(self)? + "\n")?;
        write("md", self.table())?;
        write("svg", svg::draw(self))?;
        println!("\nkept in bench/results/{name}.json, .md and .svg");
        Ok(())
    }
}

fn guest_kernel(setup: &Setup) -> String {
    let path = setup.directory.join("../stage/share/hull/kernel-um.json");
    let information: Option<serde_json::Value> = fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    information
        .and_then(|information| Some(information["version"].as_str()?.to_owned()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.1234, 1.234, 12.34, 123.4, 12345.6].map(number),
            ["0.123", "1.23", "12.3", "123", "12346"]
        );
    }

    #[test]
    fn the_table_compares_with_the_first_column() {
        let results = Results {
            date: "2026-11-21".into(),
            machine: vec![("processors".into(), "2".into())],
            contestants: vec!["runc".into(), "hull uml".into()],
            rows: vec![Row {
                name: "start".into(),
                unit: "ms".into(),
                better: Better::Lower,
                values: vec![vec![20.0, 30.0, 10.0], vec![80.0]],
            }],
        };
        let table = results.table();
        assert!(
            table.contains("| start | ms   | 20.0 (3) | 80.0 ×4.00 (1) |"),
            "{table}"
        );
        let picture = svg::draw(&results);
        assert!(
            picture.starts_with("<svg") && picture.contains("80.0 ms"),
            "{picture}"
        );
    }
}
