//! `--format`: templates as of Go's text/template, in the subset and with the functions that
//! people use with Docker; JSON; tables with columns of one's own. Called by commands that list or
//! show something. Knows nothing of containers: the data are JSON.

mod eval;
mod functions;
mod lexer;
mod parser;
mod printf;
#[cfg(test)]
mod tests;
mod value;

use serde_json::{Map, Value, json};

use self::eval::{Data, evaluate};
use self::lexer::Wrong;
use crate::error::{Error, Result};
use crate::output::{self, Table};

pub use self::value::json as json_line;

/// A template that was read.
#[derive(Debug, Clone)]
pub struct Template {
    text: String,
    nodes: Vec<parser::Node>,
    /// Where it begins in what was typed.
    offset: usize,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// One line that says what is wrong with it, and where.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        Self::parse_from(text, 0)
    }

    fn parse_from(text: &str, offset: usize) -> std::result::Result<Self, String> {
        let body = &text[offset..];
        let nodes = parser::parse(body).map_err(|wrong| said(text, offset, &wrong))?;
        Ok(Self {
            text: text.to_owned(),
            nodes,
            offset,
        })
    }

    /// The text for one value.
    ///
    /// # Errors
    /// The data have no such field, or not of the type that is needed.
    pub fn render(&self, root: &Value) -> Result<String> {
        self.evaluate(Data {
            root,
            labels: None,
            headings: false,
        })
        .map_err(|wrong| self.error(&wrong))
    }

    /// Whether it names this field.
    pub fn names(&self, field: &str) -> bool {
        self.text.contains(&format!(".{field}"))
    }

    fn evaluate(&self, data: Data<'_>) -> std::result::Result<String, Wrong> {
        evaluate(&self.nodes, data)
    }

    fn error(&self, wrong: &Wrong) -> Error {
        Error::invalid(format!(
            "--format: {}",
            said(&self.text, self.offset, wrong)
        ))
    }
}

/// An error with its place in what was typed.
fn said(text: &str, offset: usize, wrong: &Wrong) -> String {
    let before = text.get(..offset + wrong.at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    let line = match line {
        1 => String::new(),
        line => format!("line {line}, "),
    };
    format!("template, {line}column {column}: {}", wrong.why)
}

/// How a list is printed.
#[derive(Debug, Clone)]
pub enum ListFormat {
    /// `table`: as without `--format`.
    Usual,
    /// `json`: an object on a line for each row.
    Json,
    /// `table TEMPLATE`.
    Columns(Template),
    /// A line for each row.
    Lines(Template),
}

impl ListFormat {
    /// Reads a value of `--format`.
    ///
    /// # Errors
    /// One line that says what is wrong with a template.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let trimmed = text.trim();
        match trimmed.strip_prefix("table") {
            Some("") => Ok(Self::Usual),
            Some(rest) if rest.starts_with(char::is_whitespace) => {
                let offset = text.len() - text.trim_start().len() + "table".len();
                let rest = &text[offset..];
                let offset = offset + (rest.len() - rest.trim_start().len());
                Ok(Self::Columns(Template::parse_from(text, offset)?))
            }
            _ if trimmed.is_empty() => Ok(Self::Usual),
            _ if trimmed == "json" => Ok(Self::Json),
            _ => Ok(Self::Lines(Template::parse(text)?)),
        }
    }

    /// The template, if it is one.
    pub fn template(&self) -> Option<&Template> {
        match self {
            Self::Columns(template) | Self::Lines(template) => Some(template),
            Self::Usual | Self::Json => None,
        }
    }
}

/// How an object is printed.
#[derive(Debug, Clone)]
pub enum ObjectFormat {
    /// `json`: on one line.
    Json,
    /// A template.
    Template(Template),
}

impl ObjectFormat {
    /// Reads a value of `--format`.
    ///
    /// # Errors
    /// One line that says what is wrong with a template.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        match text.trim() {
            "json" => Ok(Self::Json),
            _ => Template::parse(text).map(Self::Template),
        }
    }

    /// The line for an object.
    ///
    /// # Errors
    /// As those of [`Template::render`].
    pub fn line(&self, object: &Value) -> Result<String> {
        match self {
            Self::Json => Ok(json_line(object) + "\n"),
            Self::Template(template) => Ok(template.render(object)? + "\n"),
        }
    }
}

/// A row of a list.
#[derive(Debug, Clone, Default)]
pub struct Row {
    fields: Map<String, Value>,
    labels: Option<Value>,
}

impl Row {
    /// A row without fields yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a field.
    pub fn field(mut self, name: &str, text: impl Into<Value>) -> Self {
        self.fields.insert(name.to_owned(), text.into());
        self
    }

    /// Adds labels: as field `Labels`, and for `.Label "key"`.
    pub fn labels<'a>(self, labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let labels: Map<String, Value> = labels
            .into_iter()
            .map(|(key, value)| (key.clone(), json!(value)))
            .collect();
        let pairs: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        let mut row = self.field("Labels", pairs.join(","));
        row.labels = Some(Value::Object(labels));
        row
    }
}

/// Prints a list when `format` asks for another way than the command's own; whether it did. As with
/// Docker, a template is more than `quiet`, and that is more than `json` and `table`.
///
/// # Errors
/// As those of [`list`]; standard output cannot be written.
pub fn print_list(
    format: Option<&ListFormat>,
    quiet: bool,
    headings: &[(&str, &str)],
    rows: impl FnOnce() -> Vec<Row>,
) -> Result<bool> {
    let Some(format) = format.filter(|format| !quiet || format.template().is_some()) else {
        return Ok(false);
    };
    match list(format, headings, rows())? {
        Some(text) => output::print(text).map(|()| true),
        None => Ok(false),
    }
}

/// A list as text. `headings` are the names of all fields, with their headings; `None` is for
/// [`ListFormat::Usual`], which is the command's own.
///
/// # Errors
/// A template names a field that rows do not have, also when there are no rows.
pub fn list(
    format: &ListFormat,
    headings: &[(&str, &str)],
    rows: Vec<Row>,
) -> Result<Option<String>> {
    let template = match format {
        ListFormat::Usual => return Ok(None),
        ListFormat::Json => {
            let lines = rows
                .into_iter()
                .map(|row| json_line(&Value::Object(row.fields)) + "\n");
            return Ok(Some(lines.collect()));
        }
        ListFormat::Columns(template) | ListFormat::Lines(template) => template,
    };
    let headings: Map<String, Value> = headings
        .iter()
        .map(|(field, heading)| ((*field).to_owned(), json!(heading)))
        .collect();
    let has_labels = headings.contains_key("Labels").then(|| json!({}));
    let headings = Value::Object(headings);
    let first = template.evaluate(Data {
        root: &headings,
        labels: has_labels.as_ref(),
        headings: true,
    });
    if let Err(wrong) = &first
        && wrong.unknown_field
    {
        return Err(template.error(wrong));
    }
    let mut lines = Vec::with_capacity(rows.len());
    for row in rows {
        let line = template.evaluate(Data {
            root: &Value::Object(row.fields),
            labels: row.labels.as_ref(),
            headings: false,
        });
        lines.push(line.map_err(|wrong| template.error(&wrong))?);
    }
    if let ListFormat::Lines(_) = format {
        return Ok(Some(lines.iter().map(|line| format!("{line}\n")).collect()));
    }
    let first = first.map_err(|wrong| template.error(&wrong))?;
    let cells = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
    let mut table = Table::of(cells(&first));
    for line in &lines {
        table.push(cells(line));
    }
    Ok(Some(table.render()))
}
