//! Adding members to JSON objects and taking them out again, with every other byte left as it is.
//!
//! An object that was empty is filled without space between the braces and what is in them, one
//! that did not exist is written with it: so what is emptied again shows whether it was there
//! before.

use std::ops::Range;

/// A member of an object: where it is in the text.
#[derive(Debug)]
struct Member {
    name: String,
    /// From the name to the end of the value.
    whole: Range<usize>,
    value: Range<usize>,
}

/// An object: where it is in the text, with its braces.
#[derive(Debug)]
pub(super) struct Object {
    span: Range<usize>,
    members: Vec<Member>,
}

impl Object {
    /// The object that is all of `text`, which is valid JSON.
    pub(super) fn outermost(text: &str) -> Option<Object> {
        Object::at(text, skip_space(text, 0))
    }

    /// The object that begins at a byte.
    fn at(text: &str, begin: usize) -> Option<Object> {
        let bytes = text.as_bytes();
        if bytes.get(begin) != Some(&b'{') {
            return None;
        }
        let mut members = Vec::new();
        let mut at = skip_space(text, begin + 1);
        while bytes.get(at)? != &b'}' {
            if bytes[at] == b',' {
                at = skip_space(text, at + 1);
                continue;
            }
            let name = at..skip_value(text, at)?;
            let colon = skip_space(text, name.end);
            let value = skip_space(text, colon + 1);
            let value = value..skip_value(text, value)?;
            members.push(Member {
                name: serde_json::from_str(&text[name.clone()]).ok()?,
                whole: name.start..value.end,
                value: value.clone(),
            });
            at = skip_space(text, value.end);
        }
        Some(Object {
            span: begin..at + 1,
            members,
        })
    }

    /// The object that a member is; `None` when there is no such member, or it is none.
    pub(super) fn object(&self, text: &str, name: &str) -> Option<Object> {
        let member = self.members.iter().find(|member| member.name == name)?;
        Object::at(text, member.value.start)
    }

    /// How often a name occurs: readers differ in what they make of more than one.
    pub(super) fn count(&self, name: &str) -> usize {
        self.members
            .iter()
            .filter(|member| member.name == name)
            .count()
    }

    /// Whether it was there, empty, before it was filled.
    fn was_filled(&self, text: &str) -> bool {
        !text[self.span.start + 1..].starts_with([' ', '\n'])
    }

    /// Adds a member at the end. Of `value`, which may have several lines, only the first is not
    /// indented.
    pub(super) fn add(&self, text: &str, name: &str, value: &str) -> String {
        let mut text = text.to_owned();
        let name = serde_json::Value::from(name);
        let Some(last) = self.members.last() else {
            text.replace_range(self.span.clone(), &format!("{{{name}: {}}}", flat(value)));
            return text;
        };
        let before = &text[..self.members[0].whole.start];
        let space = &before[before.trim_end().len()..];
        let added = match space.rfind('\n') {
            Some(newline) => {
                let space = &space[newline..];
                format!(",{space}{name}: {}", value.replace('\n', space))
            }
            None => format!(", {name}: {}", flat(value)),
        };
        text.insert_str(last.whole.end, &added);
        text
    }

    /// Takes a member out. `None` when nothing is left of an object that was not there before: then
    /// it goes itself.
    pub(super) fn without(&self, text: &str, name: &str) -> Option<String> {
        let position = self.members.iter().position(|member| member.name == name)?;
        let mut text = text.to_owned();
        let whole = &self.members[position].whole;
        if self.members.len() == 1 {
            if !self.was_filled(&text) {
                return None;
            }
            text.replace_range(self.span.clone(), "{}");
        } else if position > 0 {
            text.replace_range(self.members[position - 1].whole.end..whole.end, "");
        } else {
            text.replace_range(whole.start..self.members[1].whole.start, "");
        }
        Some(text)
    }
}

/// Several lines as one.
fn flat(value: &str) -> String {
    let lines: Vec<&str> = value.lines().map(str::trim).collect();
    lines.join(" ")
}

fn skip_space(text: &str, from: usize) -> usize {
    let rest = &text.as_bytes()[from.min(text.len())..];
    let space = rest.iter().take_while(|byte| byte.is_ascii_whitespace());
    from + space.count()
}

/// The end of the value that begins at a byte.
fn skip_value(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut depth = 0usize;
    let mut at = from;
    loop {
        match *bytes.get(at)? {
            b'"' => {
                at += 1;
                while *bytes.get(at)? != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            b'{' | b'[' => {
                depth += 1;
                at += 1;
                continue;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            byte if byte.is_ascii_whitespace() || byte == b',' || byte == b':' => {
                at += 1;
                continue;
            }
            _ => {
                let word = bytes[at..].iter();
                at += word
                    .take_while(|byte| !byte.is_ascii_whitespace() && !b",:{}[]\"".contains(*byte))
                    .count();
            }
        }
        if depth == 0 {
            return Some(at);
        }
    }
}
