//! Tokens of a template: text, and what is between `{{` and `}}`. Called by the parser only. It
//! knows no names of functions.

use serde_json::{Number, Value};

/// What is wrong with a template, and where: a byte of its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Offset in the text.
    pub at: usize,
    /// Why, in a few words.
    pub why: String,
    /// It names a field that the data does not have.
    pub unknown_field: bool,
}

impl Wrong {
    /// An error at this offset.
    pub fn new(at: usize, why: impl Into<String>) -> Self {
        Self {
            at,
            why: why.into(),
            unknown_field: false,
        }
    }
}

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Text outside of actions; never empty.
    Text(String),
    /// `{{`.
    Open,
    /// `}}`.
    Close,
    /// White space in an action.
    Space,
    /// `.`
    Dot,
    /// `.Name`, without the dot.
    Field(String),
    /// `$name`, with the `$`.
    Variable(String),
    /// A name of a function, or a keyword.
    Name(String),
    /// A string, a number, `true` or `false`.
    Literal(Value),
    /// `|`
    Pipe,
    /// `(`
    Left,
    /// `)`
    Right,
    /// `:=`
    Declare,
    /// `=`
    Assign,
    /// `,`
    Comma,
}

impl Token {
    /// For messages.
    pub fn shown(&self) -> String {
        match self {
            Self::Text(_) => "text".into(),
            Self::Open => "{{".into(),
            Self::Close => "}}".into(),
            Self::Space => "a space".into(),
            Self::Dot => ".".into(),
            Self::Field(name) => format!(".{name}"),
            Self::Variable(name) | Self::Name(name) => name.clone(),
            Self::Literal(value) => value.to_string(),
            Self::Pipe => "|".into(),
            Self::Left => "(".into(),
            Self::Right => ")".into(),
            Self::Declare => ":=".into(),
            Self::Assign => "=".into(),
            Self::Comma => ",".into(),
        }
    }
}

/// A token and where it begins.
pub type Placed = (usize, Token);

/// The tokens of a template. `\t` and `\n` in its text are a tab and a new line, as Docker reads
/// them from a command line.
pub fn tokens(template: &str) -> Result<Vec<Placed>, Wrong> {
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut trim_start = false;
    while at < template.len() {
        let rest = &template[at..];
        let end = rest.find("{{").unwrap_or(rest.len());
        let mut text = rest[..end].replace("\\t", "\t").replace("\\n", "\n");
        if trim_start {
            text = text.trim_start().to_owned();
        }
        let open = at + end;
        let inside = template.get(open + 2..);
        let trim_end = inside.is_some_and(trims);
        if trim_end {
            text.truncate(text.trim_end().len());
        }
        if !text.is_empty() {
            tokens.push((at, Token::Text(text)));
        }
        if end == rest.len() {
            break;
        }
        let begin = open + 2 + if trim_end { 1 } else { 0 };
        let (after, trims_after) = action(template, open, begin, &mut tokens)?;
        (at, trim_start) = (after, trims_after);
    }
    Ok(tokens)
}

/// Whether an action begins with a mark that trims the text before it.
fn trims(inside: &str) -> bool {
    let mut chars = inside.chars();
    chars.next() == Some('-') && chars.next().is_some_and(char::is_whitespace)
}

/// Reads an action from `begin` to its end. Returns where the text after it begins, and whether
/// that is trimmed.
fn action(
    template: &str,
    open: usize,
    begin: usize,
    tokens: &mut Vec<Placed>,
) -> Result<(usize, bool), Wrong> {
    let lead = template[begin..].len() - template[begin..].trim_start().len();
    if template[begin + lead..].starts_with("/*") {
        let comment = begin + lead;
        let unclosed = || Wrong::new(comment, "the comment has no end: */}}");
        let length = template[comment..].find("*/").ok_or_else(unclosed)?;
        let after = comment + length + 2;
        let tail = &template[after..];
        let trimmed = tail.trim_start();
        let skipped = after + (tail.len() - trimmed.len());
        return if tail.starts_with("}}") {
            Ok((after + 2, false))
        } else if trimmed.starts_with("-}}") && skipped > after {
            Ok((skipped + 3, true))
        } else {
            Err(unclosed())
        };
    }
    tokens.push((open, Token::Open));
    let mut at = begin;
    loop {
        let rest = &template[at..];
        if rest.starts_with("}}") {
            tokens.push((at, Token::Close));
            return Ok((at + 2, false));
        }
        let Some(first) = rest.chars().next() else {
            return Err(Wrong::new(open, "{{ has no end: }}"));
        };
        if first.is_whitespace() {
            let trimmed = rest.trim_start();
            let end = at + (rest.len() - trimmed.len());
            if trimmed.starts_with("-}}") {
                tokens.push((end, Token::Close));
                return Ok((end + 3, true));
            }
            tokens.push((at, Token::Space));
            at = end;
            continue;
        }
        let (length, token) = one(rest, first).map_err(|why| Wrong::new(at, why))?;
        tokens.push((at, token));
        at += length;
    }
}

/// The token that `rest` begins with, and its length.
fn one(rest: &str, first: char) -> Result<(usize, Token), String> {
    let word = |text: &str| {
        let is_part = |c: char| c == '_' || c.is_alphanumeric();
        text.find(|c| !is_part(c)).unwrap_or(text.len())
    };
    let followed_by_digit = rest[first.len_utf8()..].starts_with(|c: char| c.is_ascii_digit());
    Ok(match first {
        '|' => (1, Token::Pipe),
        '(' => (1, Token::Left),
        ')' => (1, Token::Right),
        ',' => (1, Token::Comma),
        '=' => (1, Token::Assign),
        ':' if rest.starts_with(":=") => (2, Token::Declare),
        '"' => quoted(rest)?,
        '`' => {
            let text = &rest[1..];
            let end = text.find('`').ok_or("the string has no end: `")?;
            (end + 2, Token::Literal(text[..end].into()))
        }
        '$' => {
            let length = 1 + word(&rest[1..]);
            (length, Token::Variable(rest[..length].to_owned()))
        }
        '0'..='9' => number(rest)?,
        '+' | '-' | '.' if followed_by_digit => number(rest)?,
        '.' => match word(&rest[1..]) {
            0 => (1, Token::Dot),
            length => (1 + length, Token::Field(rest[1..=length].to_owned())),
        },
        c if c == '_' || c.is_alphabetic() => {
            let length = word(rest);
            let token = match &rest[..length] {
                "true" => Token::Literal(true.into()),
                "false" => Token::Literal(false.into()),
                name => Token::Name(name.to_owned()),
            };
            (length, token)
        }
        c => return Err(format!("unexpected {c:?}")),
    })
}

fn number(rest: &str) -> Result<(usize, Token), String> {
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '+' | '-');
    let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
    let text = &rest[..length];
    let plain = text.strip_prefix('+').unwrap_or(text);
    let whole = match plain.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => plain.parse::<i64>().ok(),
    };
    let number = whole.map(Number::from);
    let number = number.or_else(|| plain.parse().ok().and_then(Number::from_f64));
    match number {
        Some(number) => Ok((length, Token::Literal(Value::Number(number)))),
        None => Err(format!("{text:?} is no number")),
    }
}

fn quoted(rest: &str) -> Result<(usize, Token), String> {
    const ENDLESS: &str = "the string has no end: \"";
    let mut text = String::new();
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((at + 1, Token::Literal(text.into()))),
            '\n' => return Err(ENDLESS.into()),
            '\\' => {
                let (_, escaped) = chars.next().ok_or(ENDLESS)?;
                let mut code = |digits: usize| {
                    let digits: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                    let code = u32::from_str_radix(&digits, 16).ok();
                    code.and_then(char::from_u32)
                };
                let c = match escaped {
                    'n' => Some('\n'),
                    't' => Some('\t'),
                    'r' => Some('\r'),
                    'a' => Some('\x07'),
                    '"' | '\\' => Some(escaped),
                    'x' => code(2),
                    'u' => code(4),
                    'U' => code(8),
                    _ => None,
                };
                text.push(c.ok_or_else(|| format!("unknown escape \\{escaped} in a string"))?);
            }
            c => text.push(c),
        }
    }
    Err(ENDLESS.into())
}
