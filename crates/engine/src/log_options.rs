//! What is done with a container's output: hull's own log, which `logs` shows, and the host's
//! journal. Called by the command line, the API and `run`. Writes neither; the sandbox process
//! does.

use std::collections::BTreeMap;
use std::path::Path;

use hull_sandbox::journal;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::container::Details;
use crate::error::{Error, Result};
use crate::values;

/// What is kept of a container's output, and what is kept beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogOptions {
    /// Nothing.
    pub off: bool,
    /// Most bytes; as the configuration says if absent.
    pub max_size: Option<u64>,
    /// The host's journal gets the lines as well.
    pub journal: bool,
    /// What lines are tagged with, with Docker's fields in it: `{{.Name}}`.
    pub tag: Option<String>,
    /// Labels that are kept beside lines, if the container has them.
    pub labels: Vec<String>,
    /// Variables of the environment, likewise.
    pub env: Vec<String>,
}

/// Reads an option: `KEY=VALUE`.
///
/// # Errors
/// It has no key.
pub fn pair(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("invalid log option {text:?}: give KEY=VALUE")),
    }
}

impl LogOptions {
    /// Reads Docker's name of a log driver, which may be empty, and its options.
    ///
    /// # Errors
    /// One line that says what there is instead of what is not there.
    pub fn parse<'a>(
        driver: &str,
        options: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> std::result::Result<Self, String> {
        let mut log = Self::default();
        match driver {
            "" | "json-file" | "local" => {}
            "journald" => log.journal = true,
            "none" => log.off = true,
            _ => {
                return Err(format!(
                    "not supported: log driver {driver:?}; hull keeps output itself (json-file, \
                     local), gives it to the host's journal as well (journald), or keeps none (none)"
                ));
            }
        }
        let list = |value: &str| {
            let words = value.split(',').map(str::trim);
            words
                .filter(|word| !word.is_empty())
                .map(str::to_owned)
                .collect()
        };
        for (key, value) in options {
            match key {
                "max-size" => match values::size(value)? {
                    0 => {
                        return Err(
                            "max-size: a log has a size; --log-driver none keeps none".to_owned()
                        );
                    }
                    size => log.max_size = Some(size),
                },
                // Ignored: there are always two files, and output always waits for its log.
                "max-file" | "mode" => {}
                "tag" => log.tag = Some(check_tag(value)?).filter(|tag| !tag.is_empty()),
                "labels" => log.labels = list(value),
                "env" => log.env = list(value),
                _ => {
                    return Err(format!(
                        "not supported: log option {:?}; there are max-size, tag, labels and env",
                        format!("{key}={value}")
                    ));
                }
            }
        }
        Ok(log)
    }

    /// Docker's object `LogConfig`.
    pub fn object(&self) -> Value {
        let mut config = Map::new();
        let mut add = |key: &str, value: String| {
            if !value.is_empty() {
                config.insert(key.to_owned(), json!(value));
            }
        };
        add(
            "max-size",
            self.max_size
                .map(|size| size.to_string())
                .unwrap_or_default(),
        );
        add("tag", self.tag.clone().unwrap_or_default());
        add("labels", self.labels.join(","));
        add("env", self.env.join(","));
        let driver = match self {
            Self { off: true, .. } => "none",
            Self { journal: true, .. } => "journald",
            _ => "json-file",
        };
        json!({"Type": driver, "Config": config})
    }

    /// What is kept beside the lines of a container, by name: labels, variables and the tag, of
    /// which the later ones count where names are the same.
    pub fn attributes(
        &self,
        id: &str,
        details: &Details,
        env: &[String],
    ) -> BTreeMap<String, String> {
        let tag = self.tag.as_deref().map(|tag| fill(tag, id, details));
        let mut all = self.own_attributes(details, env);
        all.extend(tag.map(|tag| ("tag".to_owned(), tag)));
        all
    }

    /// The same without a tag.
    fn own_attributes(&self, details: &Details, env: &[String]) -> BTreeMap<String, String> {
        let labels = self.labels.iter().filter_map(|key| {
            let value = details.labels.get(key)?;
            Some((key.clone(), value.clone()))
        });
        let variables = self.env.iter().filter_map(|key| {
            let mut variables = env.iter().filter_map(|variable| variable.split_once('='));
            let (_, value) = variables.find(|(name, _)| name == key)?;
            Some((key.clone(), value.to_owned()))
        });
        labels.chain(variables).collect()
    }

    /// The fields of the container's lines in the journal, as Docker's; `None` if they do not go
    /// there.
    ///
    /// # Errors
    /// There is no journal; the fields are too long for it.
    pub fn journal_fields(
        &self,
        id: &str,
        details: &Details,
        env: &[String],
    ) -> Result<Option<Vec<(String, String)>>> {
        if !self.journal {
            return Ok(None);
        }
        if let Err(error) = Path::new(journal::SOCKET).symlink_metadata() {
            return Err(Error::new(format!(
                "cannot give output to the journal: {}: {error}",
                journal::SOCKET
            ))
            .hint(
                "systemd-journald does not run here; hull keeps output without --log-driver too",
            ));
        }
        let short = id.get(..12).unwrap_or(id);
        let tag = self.tag.as_deref().map(|tag| fill(tag, id, details));
        let tag = tag.unwrap_or_else(|| short.to_owned());
        let field = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut fields = vec![
            field("CONTAINER_ID", short),
            field("CONTAINER_ID_FULL", id),
            field("CONTAINER_NAME", &details.name),
            field("CONTAINER_TAG", &tag),
            field("IMAGE_NAME", &details.image),
            field("SYSLOG_IDENTIFIER", &tag),
        ];
        for (key, value) in self.own_attributes(details, env) {
            let name = field_name(&key);
            if !is_reserved(&name) && fields.iter().all(|(taken, _)| *taken != name) {
                fields.push((name, value));
            }
        }
        // Before a machine boots for it.
        journal::encode(&fields)?;
        Ok(Some(fields))
    }
}

/// Whether a label or variable has no field of this name: hull or journald say something by it.
fn is_reserved(name: &str) -> bool {
    const OURS: [&str; 5] = [
        "",
        "MESSAGE",
        "MESSAGE_ID",
        "PRIORITY",
        "CONTAINER_PARTIAL_MESSAGE",
    ];
    OURS.contains(&name)
        || ["SYSLOG_", "OBJECT_", "CODE_", "COREDUMP_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The name of a field for a label or variable, as Docker makes it: capitals, and an underscore for
/// what a name cannot have. Empty if nothing is left.
fn field_name(key: &str) -> String {
    let name: String = key
        .chars()
        .map(|character| match character.is_ascii_alphanumeric() {
            true => character.to_ascii_uppercase(),
            false => '_',
        })
        .collect();
    let name = name.trim_start_matches(|first: char| !first.is_ascii_uppercase());
    name.chars().take(64).collect()
}

/// What stands in a tag for what, as in Docker.
fn tag_fields(id: &str, details: &Details) -> [(&'static str, String); 7] {
    let short = |id: &str| id.chars().take(12).collect::<String>();
    let image = details.image_id.trim_start_matches("sha256:");
    [
        ("ID", short(id)),
        ("FullID", id.to_owned()),
        ("Name", details.name.clone()),
        ("ImageID", short(image)),
        ("ImageFullID", details.image_id.clone()),
        ("ImageName", details.image.clone()),
        ("DaemonName", "hull".to_owned()),
    ]
}

/// Replaces the fields of a tag.
///
/// # Errors
/// The first that there is not.
fn replace(tag: &str, id: &str, details: &Details) -> std::result::Result<String, String> {
    let fields = tag_fields(id, details);
    let (mut filled, mut rest) = (String::new(), tag);
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((inner, after)) = after.split_once("}}") else {
            return Err(after.trim().to_owned());
        };
        let name = inner.trim().strip_prefix('.').unwrap_or_default();
        let field = fields.iter().find(|(known, _)| *known == name);
        let Some((_, value)) = field else {
            return Err(inner.trim().to_owned());
        };
        filled.push_str(before);
        filled.push_str(value);
        rest = after;
    }
    Ok(filled + rest)
}

fn check_tag(tag: &str) -> std::result::Result<String, String> {
    match replace(tag, "", &Details::default()) {
        Ok(_) => Ok(tag.to_owned()),
        Err(field) => Err(format!(
            "tag: not supported: {{{{{field}}}}}; there are .ID, .FullID, .Name, .ImageID, \
             .ImageFullID, .ImageName and .DaemonName"
        )),
    }
}

/// A tag that was checked.
fn fill(tag: &str, id: &str, details: &Details) -> String {
    replace(tag, id, details).unwrap_or_else(|_| tag.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn details() -> Details {
        Details {
            name: "web".to_owned(),
            image: "docker.io/library/busybox:latest".to_owned(),
            labels: [("com.example/Role".to_owned(), "front".to_owned())].into(),
            ..Details::default()
        }
    }

    #[test]
    fn drivers_and_their_options() {
        let parse = |driver: &str, options: &[(&'static str, &'static str)]| {
            LogOptions::parse(driver, options.iter().copied())
        };
        let log = parse(
            "journald",
            &[
                ("tag", "{{.Name}}/{{ .ID }}"),
                ("labels", "a, b,"),
                ("env", "X"),
            ],
        );
        let log = log.unwrap();
        assert!(log.journal && !log.off);
        assert_eq!((log.labels.len(), log.env.len()), (2, 1));
        assert_eq!(log.object()["Type"], "journald");
        assert_eq!(log.object()["Config"]["labels"], "a,b");
        assert_eq!(
            parse("", &[("max-size", "1k"), ("max-file", "3")])
                .unwrap()
                .max_size,
            Some(1024)
        );
        assert!(parse("none", &[]).unwrap().off);
        for (driver, option, part) in [
            ("syslog", None, "log driver \"syslog\""),
            ("", Some(("max-size", "0")), "--log-driver none"),
            ("", Some(("max-size", "big")), "big"),
            ("", Some(("labels-regex", "x")), "\"labels-regex=x\""),
            ("", Some(("tag", "{{.Nonsense}}")), "{{.Nonsense}}"),
            ("", Some(("tag", "{{range}}")), "{{range}}"),
            ("", Some(("tag", "{{.Name")), "{{.Name"),
        ] {
            let error = parse(driver, &option.into_iter().collect::<Vec<_>>()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn attributes_are_what_the_container_has() {
        let log = LogOptions {
            tag: Some("t-{{.Name}}".to_owned()),
            labels: ["com.example/Role", "none", "A", "tag"]
                .map(str::to_owned)
                .to_vec(),
            env: vec!["A".to_owned(), "B".to_owned()],
            ..LogOptions::default()
        };
        let env = ["A=x=y".to_owned(), "C=".to_owned()];
        let mut details = details();
        // A variable counts more than a label, and the tag more than either.
        for (key, value) in [("A", "label"), ("tag", "label")] {
            details.labels.insert(key.to_owned(), value.to_owned());
        }
        let attributes = log.attributes("0123456789abcdef", &details, &env);
        let pairs: Vec<(&str, &str)> = attributes.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        assert_eq!(
            pairs,
            [
                ("A", "x=y"),
                ("com.example/Role", "front"),
                ("tag", "t-web")
            ]
        );
    }

    #[test]
    fn labels_do_not_pass_for_what_hull_says() {
        for name in ["MESSAGE", "PRIORITY", "SYSLOG_FACILITY", "OBJECT_PID", ""] {
            assert!(is_reserved(name), "{name}");
        }
        assert!(!is_reserved("MESSAGES"));
    }

    #[test]
    fn names_of_fields_are_the_journals() {
        for (key, name) in [
            ("com.example/Role", "COM_EXAMPLE_ROLE"),
            ("_secret", "SECRET"),
            ("9lives", "LIVES"),
            ("---", ""),
        ] {
            assert_eq!(field_name(key), name);
        }
    }
}
