//! The functions of templates: Go's own, and those that Docker adds.

use serde_json::{Number, Value};

use super::printf::printf;
use super::value::{Val, json};

/// Longest string that a function makes.
pub const LONGEST: usize = 4 << 20;

/// What a function does.
#[derive(Debug, Clone, Copy)]
pub enum Call {
    /// The first argument that is false, or the last one; those after it are not computed.
    And,
    /// The first that is true.
    Or,
    /// From the values of all arguments.
    Plain(for<'a, 'd> fn(&'a [Val<'d>]) -> Result<Val<'d>, String>),
}

/// A function.
#[derive(Debug)]
pub struct Function {
    pub name: &'static str,
    /// Least arguments.
    pub least: usize,
    /// Most arguments.
    pub most: usize,
    pub call: Call,
    /// In headings of a table it is left out.
    pub shapes_text: bool,
}

const MANY: usize = usize::MAX;

const fn plain(
    name: &'static str,
    (least, most): (usize, usize),
    call: for<'a, 'd> fn(&'a [Val<'d>]) -> Result<Val<'d>, String>,
) -> Function {
    Function {
        name,
        least,
        most,
        call: Call::Plain(call),
        shapes_text: false,
    }
}

const fn shaping(
    name: &'static str,
    arguments: usize,
    call: for<'a, 'd> fn(&'a [Val<'d>]) -> Result<Val<'d>, String>,
) -> Function {
    Function {
        shapes_text: true,
        ..plain(name, (arguments, arguments), call)
    }
}

static FUNCTIONS: [Function; 24] = [
    Function {
        call: Call::And,
        ..plain("and", (1, MANY), |_| Ok(Val::Nothing))
    },
    Function {
        call: Call::Or,
        ..plain("or", (1, MANY), |_| Ok(Val::Nothing))
    },
    plain("not", (1, 1), |args| Ok(Val::new(!args[0].is_true()))),
    plain("eq", (2, MANY), |args| {
        let mut equal = false;
        for other in &args[1..] {
            equal |= is_equal(&args[0], other)?;
        }
        Ok(Val::new(equal))
    }),
    plain("ne", (2, 2), |args| {
        Ok(Val::new(!is_equal(&args[0], &args[1])?))
    }),
    plain("lt", (2, 2), |args| compared(args, |order| order.is_lt())),
    plain("le", (2, 2), |args| compared(args, |order| order.is_le())),
    plain("gt", (2, 2), |args| compared(args, |order| order.is_gt())),
    plain("ge", (2, 2), |args| compared(args, |order| order.is_ge())),
    plain("len", (1, 1), |args| {
        let length = match args[0].value() {
            Value::String(text) => text.len(),
            Value::Array(list) => list.len(),
            Value::Object(object) => object.len(),
            // Go's lists and maps without a value.
            Value::Null => 0,
            _ => return Err(format!("{} has no length", args[0].kind())),
        };
        Ok(Val::new(length))
    }),
    plain("index", (1, MANY), index),
    plain("slice", (1, 3), slice),
    plain("print", (0, MANY), |args| Ok(Val::new(sprint(args)))),
    plain("println", (0, MANY), |args| {
        let parts: Vec<String> = args.iter().map(Val::text).collect();
        Ok(Val::new(parts.join(" ") + "\n"))
    }),
    plain("printf", (1, MANY), |args| {
        printf(string(&args[0])?, &args[1..]).map(Val::new)
    }),
    shaping("json", 1, |args| Ok(Val::new(json(args[0].value())))),
    shaping("upper", 1, |args| {
        Ok(Val::new(string(&args[0])?.to_uppercase()))
    }),
    shaping("lower", 1, |args| {
        Ok(Val::new(string(&args[0])?.to_lowercase()))
    }),
    shaping("title", 1, |args| Ok(Val::new(title(string(&args[0])?)))),
    shaping("split", 2, |args| {
        let (text, separator) = (string(&args[0])?, string(&args[1])?);
        let parts: Vec<Value> = match separator {
            "" => text.chars().map(|c| c.to_string().into()).collect(),
            _ => text.split(separator).map(Value::from).collect(),
        };
        Ok(Val::new(parts))
    }),
    shaping("join", 2, join),
    shaping("truncate", 2, |args| {
        let (text, length) = (string(&args[0])?, whole(&args[1])?);
        Ok(Val::new(text.chars().take(length).collect::<String>()))
    }),
    shaping("pad", 3, |args| {
        let (text, before, after) = (string(&args[0])?, whole(&args[1])?, whole(&args[2])?);
        if text.is_empty() {
            return Ok(Val::new(""));
        }
        let spaces = |count: usize| " ".repeat(count.min(LONGEST));
        Ok(Val::new(spaces(before) + text + &spaces(after)))
    }),
    plain("trim", (1, 1), |args| {
        Ok(Val::new(string(&args[0])?.trim()))
    }),
];

/// The function of this name.
pub fn find(name: &str) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|function| function.name == name)
}

/// What to say of a name that no function has.
pub fn missing(name: &str) -> String {
    let mut names: Vec<&str> = FUNCTIONS.iter().map(|function| function.name).collect();
    names.sort_unstable();
    format!(
        "function {name:?} is not defined: there are {}",
        names.join(", ")
    )
}

fn string<'a>(value: &'a Val<'_>) -> Result<&'a str, String> {
    match value.value() {
        Value::String(text) => Ok(text),
        _ if matches!(value, Val::Zero) => Ok(""),
        _ => Err(format!("a string is needed, not {}", value.kind())),
    }
}

fn whole(value: &Val<'_>) -> Result<usize, String> {
    let number = value.value().as_u64();
    let number = number.and_then(|number| usize::try_from(number).ok());
    number.ok_or_else(|| format!("a number from 0 on is needed, not {}", value.text()))
}

/// As `fmt.Sprint`: spaces between operands of which none is a string.
fn sprint(args: &[Val<'_>]) -> String {
    let mut text = String::new();
    for (index, arg) in args.iter().enumerate() {
        let is_string = |arg: &Val<'_>| arg.value().is_string();
        if index > 0 && !is_string(arg) && !is_string(&args[index - 1]) {
            text.push(' ');
        }
        text.push_str(&arg.text());
    }
    text
}

fn title(text: &str) -> String {
    let mut begins = true;
    text.chars()
        .map(|c| {
            let is_part = c.is_alphanumeric() || c == '_' || c == '\'';
            let c = if begins {
                c.to_uppercase().next().unwrap_or(c)
            } else {
                c
            };
            begins = !is_part;
            c
        })
        .collect()
}

fn join<'d>(args: &[Val<'d>]) -> Result<Val<'d>, String> {
    let separator = string(&args[1])?;
    let Value::Array(list) = args[0].value() else {
        return match args[0].value() {
            Value::Null => Ok(Val::new("")),
            _ => Err(format!("a list is needed, not {}", args[0].kind())),
        };
    };
    let mut text = String::new();
    for (index, part) in list.iter().enumerate() {
        if index > 0 {
            text.push_str(separator);
        }
        match part {
            Value::String(part) => text.push_str(part),
            other => text.push_str(&other.to_string()),
        }
        if text.len() > LONGEST {
            return Err("the string is too long".into());
        }
    }
    Ok(Val::new(text))
}

/// The element of an array, or the value of a key, for each further argument.
fn index<'d>(args: &[Val<'d>]) -> Result<Val<'d>, String> {
    let mut found = args[0].clone();
    for key in &args[1..] {
        found = match found.value() {
            Value::Array(list) => {
                let at = whole(key)?;
                let length = list.len();
                found
                    .child("", |value| value.get(at))
                    .ok_or_else(|| format!("index {at} of a list with {length} elements"))?
            }
            Value::Object(_) => {
                let key = string(key)?;
                found
                    .child(key, |value| value.get(key))
                    .unwrap_or(Val::Zero)
            }
            Value::Null if matches!(key.value(), Value::String(_)) => Val::Zero,
            _ => return Err(format!("{} has no elements", found.kind())),
        };
    }
    Ok(found)
}

fn slice<'d>(args: &[Val<'d>]) -> Result<Val<'d>, String> {
    let length = match args[0].value() {
        Value::String(text) => text.len(),
        Value::Array(list) => list.len(),
        _ => return Err(format!("{} has no parts", args[0].kind())),
    };
    let begin = args.get(1).map_or(Ok(0), whole)?;
    let end = args.get(2).map_or(Ok(length), whole)?;
    let wrong = || format!("no part from {begin} to {end} of a length of {length}");
    match args[0].value() {
        Value::String(text) => text.get(begin..end).map(Val::new).ok_or_else(wrong),
        value => {
            let part = value.as_array().and_then(|list| list.get(begin..end));
            part.map(|part| Val::new(part.to_vec())).ok_or_else(wrong)
        }
    }
}

fn is_equal(left: &Val<'_>, right: &Val<'_>) -> Result<bool, String> {
    // What a map does not have is as good as an empty string, as in Go.
    let empty = Value::from("");
    let value = |val: &Val<'_>| match val {
        Val::Zero => empty.clone(),
        other => other.value().clone(),
    };
    match (value(left), value(right)) {
        (Value::Number(left), Value::Number(right)) => Ok(order(&left, &right).is_eq()),
        (Value::Null, right) => Ok(right.is_null()),
        (left, Value::Null) => Ok(left.is_null()),
        (left @ Value::String(_), right @ Value::String(_))
        | (left @ Value::Bool(_), right @ Value::Bool(_)) => Ok(left == right),
        _ => Err(incomparable(left, right)),
    }
}

fn incomparable(left: &Val<'_>, right: &Val<'_>) -> String {
    format!("cannot compare {} with {}", left.kind(), right.kind())
}

fn order(left: &Number, right: &Number) -> std::cmp::Ordering {
    match (left.as_i128(), right.as_i128()) {
        (Some(left), Some(right)) => left.cmp(&right),
        _ => {
            let float = |number: &Number| number.as_f64().unwrap_or(0.0);
            float(left).total_cmp(&float(right))
        }
    }
}

fn compared<'d>(
    args: &[Val<'d>],
    holds: fn(std::cmp::Ordering) -> bool,
) -> Result<Val<'d>, String> {
    let order = match (args[0].value(), args[1].value()) {
        (Value::Number(left), Value::Number(right)) => order(left, right),
        (Value::String(left), Value::String(right)) => left.cmp(right),
        _ => return Err(incomparable(&args[0], &args[1])),
    };
    Ok(Val::new(holds(order)))
}
