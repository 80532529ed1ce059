//! Values of a template: JSON with the difference that Go makes between a structure, whose fields
//! are known, and a map, which may have any key.

use std::borrow::Cow;

use serde_json::Value;

use crate::output::printable;

/// Keys of objects, in Docker's words and hull's, whose values are maps.
const MAPS: [&str; 18] = [
    "Annotations",
    "Attributes",
    "Data",
    "ExposedPorts",
    "GuestKernels",
    "Labels",
    "Networks",
    "Options",
    "PortBindings",
    "Ports",
    "Sysctls",
    "Tmpfs",
    "Volumes",
    "annotations",
    "labels",
    "guest_kernels",
    "host_memory",
    "sysctl",
];

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A field that is not there is an error.
    Structure,
    /// A key that is not there has no value.
    Map,
}

impl Shape {
    /// That of a value below one of this shape.
    pub fn of_child(self, key: &str) -> Shape {
        match self {
            Shape::Structure if MAPS.contains(&key) => Shape::Map,
            Shape::Structure | Shape::Map => Shape::Structure,
        }
    }
}

/// A value.
#[derive(Debug, Clone)]
pub enum Val<'d> {
    /// Of the data, or computed.
    Known(Cow<'d, Value>, Shape),
    /// A field that a map does not have.
    Nothing,
    /// What `index` finds of a key that a map does not have.
    Zero,
}

impl<'d> Val<'d> {
    /// Of the data.
    pub fn of(value: &'d Value, shape: Shape) -> Self {
        Val::Known(Cow::Borrowed(value), shape)
    }

    /// A computed value.
    pub fn new(value: impl Into<Value>) -> Self {
        Val::Known(Cow::Owned(value.into()), Shape::Structure)
    }

    /// As JSON; `null` when there is none.
    pub fn value(&self) -> &Value {
        match self {
            Val::Known(value, _) => value,
            Val::Nothing | Val::Zero => &Value::Null,
        }
    }

    /// What `{{if}}` takes for true.
    pub fn is_true(&self) -> bool {
        match self.value() {
            Value::Null => false,
            Value::Bool(value) => *value,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(object) => !object.is_empty(),
        }
    }

    /// The value of a key, or the element of an array.
    pub fn child(&self, key: &str, find: impl Fn(&Value) -> Option<&Value>) -> Option<Val<'d>> {
        let Val::Known(value, shape) = self else {
            return None;
        };
        let shape = match **value {
            Value::Array(_) => Shape::Structure,
            _ => shape.of_child(key),
        };
        let child = match value {
            Cow::Borrowed(value) => Cow::Borrowed(find(value)?),
            Cow::Owned(value) => Cow::Owned(find(value)?.clone()),
        };
        Some(Val::Known(child, shape))
    }

    /// As Go prints it.
    pub fn text(&self) -> String {
        match self {
            Val::Known(value, shape) => match &**value {
                Value::Null => "<no value>".to_owned(),
                value => printed(value, *shape),
            },
            Val::Nothing => "<no value>".to_owned(),
            Val::Zero => String::new(),
        }
    }

    /// Its type, for messages.
    pub fn kind(&self) -> &'static str {
        match self.value() {
            Value::Null => "no value",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        }
    }
}

/// A value inside of another one, as Go prints it: `{a b}`, `map[k:v]`, `[a b]`.
fn printed(value: &Value, shape: Shape) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) => {
            let parts = list.iter().map(|value| printed(value, Shape::Structure));
            format!("[{}]", parts.collect::<Vec<_>>().join(" "))
        }
        Value::Object(object) => {
            let parts = object
                .iter()
                .map(|(key, value)| (key, printed(value, shape.of_child(key))));
            match shape {
                Shape::Structure => {
                    let parts: Vec<String> = parts.map(|(_, value)| value).collect();
                    format!("{{{}}}", parts.join(" "))
                }
                Shape::Map => {
                    let mut parts: Vec<String> =
                        parts.map(|(key, value)| format!("{key}:{value}")).collect();
                    parts.sort();
                    format!("map[{}]", parts.join(" "))
                }
            }
        }
        other => other.to_string(),
    }
}

/// JSON on one line. What would control a terminal is escaped, so nothing is lost.
pub fn json(value: &Value) -> String {
    let mut text = String::new();
    for c in value.to_string().chars() {
        match printable(c.encode_utf8(&mut [0; 4])).starts_with(c) {
            true => text.push(c),
            false => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    text
}

/// Text of the data for a terminal: lines and tabs are kept.
pub fn clean(text: &str) -> String {
    let is_kept = |c: char| matches!(c, '\n' | '\t');
    text.split_inclusive(is_kept)
        .map(
            |part| match part.chars().next_back().filter(|c| is_kept(*c)) {
                Some(end) => printable(&part[..part.len() - 1]) + &end.to_string(),
                None => printable(part),
            },
        )
        .collect()
}
