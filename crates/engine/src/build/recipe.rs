//! What a recipe takes from other images: read as far as that has to be known before buildah reads
//! it.

use std::collections::{BTreeMap, BTreeSet};

/// The images that a recipe names: with `FROM`, and with `--from=` of `COPY` and `RUN`. Names that
/// depend on what cannot be known here are left out.
pub fn images(recipe: &str, arguments: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut stages = BTreeSet::new();
    let mut found = BTreeSet::new();
    let mut began = false;
    for line in instructions(recipe) {
        let mut words = line.split_whitespace();
        let instruction = words.next().unwrap_or_default().to_ascii_uppercase();
        let words: Vec<&str> = words.collect();
        match instruction.as_str() {
            "ARG" if !began => {
                for word in words {
                    let (name, default) = word.split_once('=').unwrap_or((word, ""));
                    let given = arguments.get(name).cloned();
                    let value = given.unwrap_or_else(|| default.trim_matches('"').to_owned());
                    known.insert(name.to_owned(), value);
                }
            }
            "FROM" => {
                began = true;
                let mut words = words.into_iter().filter(|word| !word.starts_with("--"));
                if let Some(image) = words.next().and_then(|image| expand(image, &known))
                    && image != "scratch"
                    && !stages.contains(&image.to_ascii_lowercase())
                {
                    found.insert(image);
                }
                if words
                    .next()
                    .is_some_and(|word| word.eq_ignore_ascii_case("as"))
                    && let Some(stage) = words.next()
                {
                    stages.insert(stage.to_ascii_lowercase());
                }
            }
            "COPY" | "ADD" | "RUN" => {
                let options = words.iter().take_while(|word| word.starts_with("--"));
                let sources = options.flat_map(|word| word.split([',', ' ']));
                let sources = sources.filter_map(|part| {
                    let part = part.strip_prefix("--mount=").unwrap_or(part);
                    part.trim_start_matches("--").strip_prefix("from=")
                });
                for source in sources {
                    let is_number = source.bytes().all(|byte| byte.is_ascii_digit());
                    if let Some(image) = expand(source, &known)
                        && !is_number
                        && !stages.contains(&image.to_ascii_lowercase())
                    {
                        found.insert(image);
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// The instructions of a recipe, each on one line, without comments.
fn instructions(recipe: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut current = String::new();
    for line in recipe.lines().map(str::trim) {
        if line.starts_with('#') || (line.is_empty() && current.is_empty()) {
            continue;
        }
        match line.strip_suffix('\\') {
            Some(begun) => {
                current.push_str(begun);
                current.push(' ');
            }
            None => {
                current.push_str(line);
                all.push(std::mem::take(&mut current));
            }
        }
    }
    all.push(current);
    all
}

/// Replaces `$NAME`, `${NAME}` and `${NAME:-DEFAULT}`; `None` for what is not known.
fn expand(text: &str, known: &BTreeMap<String, String>) -> Option<String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, default, left) = match after.strip_prefix('{') {
            Some(braced) => {
                let (inner, left) = braced.split_once('}')?;
                match inner.split_once(":-") {
                    Some((name, default)) => (name, Some(default), left),
                    None => (inner, None, left),
                }
            }
            None => {
                let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                let end = after.find(|c| !is_name(c)).unwrap_or(after.len());
                (&after[..end], None, &after[end..])
            }
        };
        let value = known.get(name).filter(|value| !value.is_empty());
        expanded.push_str(value.map(String::as_str).or(default)?);
        rest = left;
    }
    expanded.push_str(rest);
    Some(expanded).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_a_recipe() {
        let recipe = "# FROM comment\n\
                      ARG BASE=debian\n\
                      ARG TAG\n\
                      FROM --platform=linux/amd64 $BASE:${TAG:-12} AS Build\n\
                      ARG BASE=later\n\
                      RUN --mount=type=bind,from=tools:1,target=/x make \\\n  FROM nothing\n\
                      from build\n\
                      COPY --from=build /a /a\n\
                      COPY --chown=1:1 --from=example.com/other:2 /b /b\n\
                      COPY --from=0 /c /c\n\
                      FROM scratch\n\
                      FROM $UNKNOWN\n\
                      FROM own:1 as last\n";
        let arguments = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let pairs = pairs
                .iter()
                .map(|(key, value)| (key.to_string(), value.to_string()));
            pairs.collect()
        };
        let all = |pairs| {
            images(recipe, &arguments(pairs))
                .into_iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            all(&[]),
            ["debian:12", "example.com/other:2", "own:1", "tools:1"]
        );
        assert_eq!(
            all(&[("BASE", "alpine"), ("TAG", "3")]),
            ["alpine:3", "example.com/other:2", "own:1", "tools:1"]
        );
    }
}
