//! The instructions of `--change`, as in a Dockerfile.
//!
//! Called by `import`. Variables are not expanded: none are defined.

use std::path::Path;

use crate::config::ImageConfig;

/// Applies one instruction.
pub(super) fn apply(config: &mut ImageConfig, change: &str) -> Result<(), String> {
    let change = change.trim();
    let (instruction, rest) = match change.split_once(char::is_whitespace) {
        Some((instruction, rest)) => (instruction, rest.trim()),
        None => (change, ""),
    };
    let instruction = instruction.to_ascii_uppercase();
    if rest.is_empty() {
        return Err(match instruction.as_str() {
            "" => "it is empty".to_owned(),
            name => format!("{name} needs an argument"),
        });
    }
    match instruction.as_str() {
        "CMD" => config.cmd = command(rest)?,
        "ENTRYPOINT" => config.entrypoint = command(rest)?,
        "ENV" => {
            for (name, value) in pairs(rest)? {
                let prefix = format!("{name}=");
                config.env.retain(|known| !known.starts_with(&prefix));
                config.env.push(format!("{name}={value}"));
            }
        }
        "LABEL" => config.labels.extend(pairs(rest)?),
        "EXPOSE" => {
            for port in words(rest)? {
                let port = exposed_port(&port)?;
                if !config.exposed_ports.contains(&port) {
                    config.exposed_ports.push(port);
                }
            }
        }
        "VOLUME" => {
            let paths = if rest.starts_with('[') {
                json(rest)?
            } else {
                words(rest)?
            };
            for path in paths {
                if path.is_empty() {
                    return Err("a volume needs a path".to_owned());
                }
                if !config.volumes.contains(&path) {
                    config.volumes.push(path);
                }
            }
        }
        "WORKDIR" => {
            let base = if config.workdir.is_empty() {
                "/"
            } else {
                &config.workdir
            };
            let joined = Path::new(base).join(one(rest)?);
            config.workdir = joined.to_string_lossy().into_owned();
        }
        "USER" => config.user = one(rest)?,
        "STOPSIGNAL" => config.stop_signal = Some(one(rest)?),
        other => {
            return Err(format!(
                "{other} is none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR"
            ));
        }
    }
    Ok(())
}

/// A list in JSON, or a line for the shell.
fn command(rest: &str) -> Result<Vec<String>, String> {
    if rest.starts_with('[') {
        return json(rest);
    }
    Ok(["/bin/sh", "-c", rest].map(str::to_owned).to_vec())
}

fn json(rest: &str) -> Result<Vec<String>, String> {
    serde_json::from_str(rest).map_err(|error| format!("it is no JSON list of strings: {error}"))
}

fn one(rest: &str) -> Result<String, String> {
    let mut words = words(rest)?;
    match (words.pop(), words.is_empty()) {
        (Some(word), true) => Ok(word),
        _ => Err("it needs exactly one argument".to_owned()),
    }
}

/// `NAME=value …`, or the old form `NAME the rest of the line`.
fn pairs(rest: &str) -> Result<Vec<(String, String)>, String> {
    let first = rest.split_whitespace().next().unwrap_or(rest);
    if !first.contains('=') {
        return match rest.split_once(char::is_whitespace) {
            Some((name, value)) => Ok(vec![(name.to_owned(), value.trim().to_owned())]),
            None => Err(format!("\"{rest}\" has no value")),
        };
    }
    words(rest)?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) | None => Err(format!("\"{word}\" is not NAME=value")),
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        })
        .collect()
}

fn exposed_port(text: &str) -> Result<String, String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let valid = ports.splitn(2, '-').all(|port| port.parse::<u16>().is_ok());
    if valid && matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        Ok(format!("{ports}/{protocol}"))
    } else {
        Err(format!("\"{text}\" is no port"))
    }
}

/// Splits a line into words; quotes and backslashes as in a shell.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(end), _) if character == end => quote = None,
            (None | Some('"'), '\\') => {
                let escaped = characters.next().ok_or("it ends with a backslash")?;
                let word = word.get_or_insert_default();
                // In double quotes a backslash escapes special characters only.
                if quote.is_some() && !matches!(escaped, '"' | '\\' | '$') {
                    word.push('\\');
                }
                word.push(escaped);
            }
            (Some(_), _) => word.get_or_insert_default().push(character),
            (None, '"' | '\'') => {
                word.get_or_insert_default();
                quote = Some(character);
            }
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    match quote {
        Some(quote) => Err(format!("a closing {quote} is missing")),
        None => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn changed(changes: &[&str]) -> ImageConfig {
        let mut config = ImageConfig::default();
        for change in changes {
            apply(&mut config, change).unwrap();
        }
        config
    }

    #[test]
    fn instructions_are_applied_in_order() {
        let config = changed(&[
            r#"CMD ["sh", "-c", "echo hi"]"#,
            "entrypoint exec /bin/init --flag",
            "ENV A=1 B=\"two words\" C=it\\'s",
            "ENV A 3 with spaces",
            "LABEL org.example.a='x y' b=",
            "EXPOSE 80 53/UDP",
            "VOLUME [\"/data\"]",
            "VOLUME /a /b",
            "WORKDIR /srv",
            "WORKDIR app",
            "USER 1000:1000",
            "STOPSIGNAL SIGQUIT",
        ]);
        assert_eq!(config.cmd, ["sh", "-c", "echo hi"]);
        assert_eq!(
            config.entrypoint,
            ["/bin/sh", "-c", "exec /bin/init --flag"]
        );
        assert_eq!(config.env, ["B=two words", "C=it's", "A=3 with spaces"]);
        assert_eq!(config.labels["org.example.a"], "x y");
        assert_eq!(config.labels["b"], "");
        assert_eq!(config.exposed_ports, ["80/tcp", "53/udp"]);
        assert_eq!(config.volumes, ["/data", "/a", "/b"]);
        assert_eq!(config.workdir, "/srv/app");
        assert_eq!(
            (config.user.as_str(), config.stop_signal.as_deref()),
            ("1000:1000", Some("SIGQUIT"))
        );
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for (change, reason) in [
            ("", "empty"),
            ("CMD", "needs an argument"),
            ("RUN make", "RUN is none of"),
            ("CMD [sh]", "JSON"),
            ("ENV A", "no value"),
            ("ENV A=1 B", "NAME=value"),
            ("LABEL x='y", "closing '"),
            ("EXPOSE http", "no port"),
            ("EXPOSE 80/icmp", "no port"),
            ("USER a b", "exactly one"),
        ] {
            let error = apply(&mut ImageConfig::default(), change).unwrap_err();
            assert!(error.contains(reason), "{change}: {error}");
        }
    }
}
