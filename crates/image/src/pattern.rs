//! Patterns of image names, as in `docker images --filter reference=PATTERN`.
//!
//! Called by `hull image ls`. `*` is any text without a slash, `?` any character but a slash,
//! `[a-z]` one of several, `[^a-z]` none of them, and a backslash takes the next character as it
//! is. A pattern matches a short name with its tag, or without.

use crate::reference::Reference;

/// A pattern of image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Vec<Vec<Token>>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Any,
    One,
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    Char(char),
}

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// A bracket that is not closed, or a backslash at the end; a sentence for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split('/').map(parse_part).collect::<Result<_, _>>();
        parts
            .map(Self)
            .map_err(|why| format!("{text:?} is no pattern: {why}"))
    }

    /// Whether an image of this name is meant.
    pub fn matches(&self, reference: &Reference) -> bool {
        let familiar = reference.familiar();
        let name = match familiar.split_once('@') {
            Some((name, _)) => name,
            None => match familiar.rsplit_once(':') {
                Some((name, tag)) if !tag.contains('/') => name,
                _ => &familiar,
            },
        };
        self.matches_text(&familiar) || self.matches_text(name)
    }

    fn matches_text(&self, text: &str) -> bool {
        let parts: Vec<&str> = text.split('/').collect();
        parts.len() == self.0.len()
            && parts
                .iter()
                .zip(&self.0)
                .all(|(text, tokens)| matches_part(tokens, text))
    }
}

fn parse_part(text: &str) -> Result<Vec<Token>, &'static str> {
    let mut characters = text.chars();
    let mut tokens = Vec::new();
    while let Some(character) = characters.next() {
        tokens.push(match character {
            '*' => Token::Any,
            '?' => Token::One,
            '[' => parse_class(&mut characters)?,
            '\\' => Token::Char(characters.next().ok_or("it ends with a backslash")?),
            character => Token::Char(character),
        });
    }
    Ok(tokens)
}

fn parse_class(characters: &mut std::str::Chars<'_>) -> Result<Token, &'static str> {
    const OPEN: &str = "a bracket is not closed";
    let negated = characters.clone().next() == Some('^');
    if negated {
        characters.next();
    }
    let mut ranges = Vec::new();
    let bound = |characters: &mut std::str::Chars<'_>| match characters.next().ok_or(OPEN)? {
        '\\' => characters.next().ok_or(OPEN),
        character => Ok(character),
    };
    loop {
        if characters.clone().next() == Some(']') && !ranges.is_empty() {
            characters.next();
            return Ok(Token::Class { negated, ranges });
        }
        let low = bound(characters)?;
        let mut high = low;
        if characters.clone().next() == Some('-') {
            characters.next();
            high = bound(characters)?;
        }
        ranges.push((low, high));
    }
}

/// Goes back to the last `*` only, so that the time is bounded by the product of the lengths.
fn matches_part(tokens: &[Token], text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut token) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let matched = match (tokens.get(token), text.get(at)) {
            (Some(Token::Any), _) => {
                retry = Some((token + 1, at));
                token += 1;
                continue;
            }
            (None, None) => return true,
            (Some(wanted), Some(&character)) => wanted.takes(character),
            _ => false,
        };
        if matched {
            (at, token) = (at + 1, token + 1);
            continue;
        }
        match retry {
            Some((after, from)) if from < text.len() => {
                retry = Some((after, from + 1));
                (at, token) = (from + 1, after);
            }
            _ => return false,
        }
    }
}

impl Token {
    fn takes(&self, character: char) -> bool {
        match self {
            Self::Any | Self::One => true,
            Self::Class { negated, ranges } => {
                let within = |&(low, high): &(char, char)| (low..=high).contains(&character);
                ranges.iter().any(within) != *negated
            }
            Self::Char(wanted) => *wanted == character,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_match_as_in_docker() {
        for (pattern, name, matches) in [
            ("busybox", "busybox:1.36", true),
            ("busybox:1.36", "busybox:1.36", true),
            ("busybox:1", "busybox:1.36", false),
            ("busy*", "busybox:1.36", true),
            ("busy*:*3*6", "busybox:1.36", true),
            ("*", "team/app:1", false),
            ("*/*", "team/app:1", true),
            ("*/*:2", "team/app:1", false),
            ("localhost:5000/app", "localhost:5000/app:1", true),
            ("localhost:*/a??:[0-9]", "localhost:5000/app:1", true),
            ("localhost:*/a??:[^0-9]", "localhost:5000/app:1", false),
            ("busybox\\*", "busybox:1", false),
            (
                "a*a*a*a*a*b",
                "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa:1",
                false,
            ),
            ("", "busybox:1", false),
        ] {
            let reference: Reference = name.parse().unwrap();
            let pattern = Pattern::parse(pattern).unwrap();
            assert_eq!(pattern.matches(&reference), matches, "{pattern:?} {name}");
        }
        for bad in ["[", "[a", "[^", "a\\", "[]", "[a-"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }
}
