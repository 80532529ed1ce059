//! `printf` of templates: the verbs of Go's `fmt` that make sense for JSON.

use serde_json::Value;

use super::functions::LONGEST;
use super::value::Val;

/// Largest width and precision.
const WIDEST: usize = 1000;

/// One `%…`.
#[derive(Default)]
struct Directive {
    left: bool,
    zeros: bool,
    plus: bool,
    width: usize,
    precision: Option<usize>,
}

/// Formats the arguments.
pub fn printf(format: &str, args: &[Val<'_>]) -> Result<String, String> {
    let mut text = String::new();
    let mut args = args.iter();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut directive = Directive::default();
        while let Some(flag) = chars.next_if(|c| matches!(c, '-' | '0' | '+' | ' ' | '#')) {
            match flag {
                '-' => directive.left = true,
                '0' => directive.zeros = true,
                '+' => directive.plus = true,
                _ => {}
            }
        }
        let mut number = || -> Result<Option<usize>, String> {
            let mut number = None;
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                let digit = digit.to_digit(10).unwrap_or(0) as usize;
                number = Some(number.unwrap_or(0) * 10 + digit);
                if number > Some(WIDEST) {
                    return Err(format!("a width is at most {WIDEST}"));
                }
            }
            Ok(number)
        };
        directive.width = number()?.unwrap_or(0);
        if chars.next_if_eq(&'.').is_some() {
            let mut digits = String::new();
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            let precision = digits.parse().unwrap_or(0);
            directive.precision = Some(precision).filter(|precision| *precision <= WIDEST);
        }
        match chars.next() {
            Some('%') => text.push('%'),
            Some(verb) => {
                let missing = || format!("nothing is given for %{verb}");
                let arg = args.next().ok_or_else(missing)?;
                text.push_str(&directive.apply(verb, arg)?);
            }
            None => return Err("% at the end".to_owned()),
        }
        if text.len() > LONGEST {
            return Err("the string is too long".to_owned());
        }
    }
    match args.count() {
        0 => Ok(text),
        more => Err(format!("{more} more values than verbs")),
    }
}

impl Directive {
    fn apply(&self, verb: char, arg: &Val<'_>) -> Result<String, String> {
        let wrong = || format!("%{verb} is not for {}", arg.kind());
        let cut = |text: String| match self.precision {
            Some(length) => text.chars().take(length).collect(),
            None => text,
        };
        let text = match verb {
            'v' => arg.text(),
            's' => cut(arg.text()),
            'q' => match arg.value() {
                Value::String(text) => format!("{:?}", cut(text.clone())),
                Value::Null => "\"\"".to_owned(),
                _ => return Err(wrong()),
            },
            'd' => match arg.value() {
                Value::Number(number) if !number.is_f64() => number.to_string(),
                _ => return Err(wrong()),
            },
            'x' | 'X' => {
                let text = match arg.value() {
                    Value::Number(number) => match number.as_u64() {
                        Some(number) => format!("{number:x}"),
                        None => return Err(wrong()),
                    },
                    Value::String(text) => text.bytes().map(|byte| format!("{byte:02x}")).collect(),
                    _ => return Err(wrong()),
                };
                match verb {
                    'X' => text.to_uppercase(),
                    _ => text,
                }
            }
            'f' => match arg.value().as_f64() {
                Some(number) => format!("{number:.*}", self.precision.unwrap_or(6)),
                None => return Err(wrong()),
            },
            't' => match arg.value() {
                Value::Bool(value) => value.to_string(),
                _ => return Err(wrong()),
            },
            _ => return Err(format!("unknown verb %{verb}")),
        };
        Ok(self.padded(
            text,
            matches!(verb, 'd' | 'f' | 'v') && arg.value().is_number(),
        ))
    }

    fn padded(&self, text: String, is_number: bool) -> String {
        let text = match self.plus && is_number && !text.starts_with('-') {
            true => format!("+{text}"),
            false => text,
        };
        let missing = self.width.saturating_sub(text.chars().count());
        if self.left {
            return text + &" ".repeat(missing);
        }
        if self.zeros && is_number {
            let sign = text.len() - text.trim_start_matches(['-', '+']).len();
            return format!("{}{}{}", &text[..sign], "0".repeat(missing), &text[sign..]);
        }
        " ".repeat(missing) + &text
    }
}
