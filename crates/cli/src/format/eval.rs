//! A tree with data: the text that it prints. Steps and output are bounded.

use serde_json::Value;

use super::functions::{Call, Function, LONGEST};
use super::lexer::Wrong;
use super::parser::{Base, Block, Kind, Node, Operand, Pipeline};
use super::value::{Shape, Val, clean};

/// Most output of one template.
const MOST_OUTPUT: usize = 16 << 20;

/// Most parts that are evaluated.
const MOST_STEPS: usize = 1_000_000;

/// The data of a template.
#[derive(Debug, Clone, Copy)]
pub struct Data<'d> {
    /// `.`
    pub root: &'d Value,
    /// For `.Label "key"`, where there is that.
    pub labels: Option<&'d Value>,
    /// These are the headings of a table: functions leave them as they are.
    pub headings: bool,
}

/// The text of a tree.
pub fn evaluate(nodes: &[Node], data: Data<'_>) -> Result<String, Wrong> {
    let root = Val::of(data.root, Shape::Structure);
    let mut evaluation = Evaluation {
        data,
        output: String::new(),
        variables: vec![("$".to_owned(), root.clone())],
        steps: 0,
    };
    evaluation.nodes(nodes, &root)?;
    Ok(evaluation.output)
}

struct Evaluation<'d> {
    data: Data<'d>,
    output: String,
    variables: Vec<(String, Val<'d>)>,
    steps: usize,
}

impl<'d> Evaluation<'d> {
    fn nodes(&mut self, nodes: &[Node], dot: &Val<'d>) -> Result<(), Wrong> {
        for node in nodes {
            match node {
                Node::Text(text) => self.print(0, text)?,
                Node::Print(pipeline) => {
                    let value = self.pipeline(pipeline, dot)?;
                    if pipeline.variables.is_empty() {
                        self.print(pipeline.at, &clean(&value.text()))?;
                    }
                }
                Node::Block(block) => self.block(block, dot)?,
            }
        }
        Ok(())
    }

    fn print(&mut self, at: usize, text: &str) -> Result<(), Wrong> {
        self.step(at)?;
        self.output.push_str(text);
        match self.output.len() > MOST_OUTPUT {
            true => Err(Wrong::new(at, "the output is too long")),
            false => Ok(()),
        }
    }

    fn step(&mut self, at: usize) -> Result<(), Wrong> {
        self.steps += 1;
        match self.steps > MOST_STEPS {
            true => Err(Wrong::new(at, "the template takes too many steps")),
            false => Ok(()),
        }
    }

    fn block(&mut self, block: &Block, dot: &Val<'d>) -> Result<(), Wrong> {
        let outside = self.variables.len();
        let value = self.pipeline(&block.value, dot)?;
        match block.kind {
            Kind::If if value.is_true() => self.nodes(&block.body, dot)?,
            Kind::With if value.is_true() => self.nodes(&block.body, &value)?,
            Kind::Range => {
                let items = self.items(block.value.at, &value)?;
                if items.is_empty() {
                    self.nodes(&block.otherwise, dot)?;
                }
                for (key, item) in items {
                    self.variables.truncate(outside);
                    self.set_in_range(&block.value, key, &item);
                    self.nodes(&block.body, &item)?;
                }
            }
            Kind::If | Kind::With => self.nodes(&block.otherwise, dot)?,
        }
        self.variables.truncate(outside);
        Ok(())
    }

    /// What is walked through, with its indices or keys; of a map in the order of these.
    fn items(&mut self, at: usize, value: &Val<'d>) -> Result<Vec<(Value, Val<'d>)>, Wrong> {
        let mut items = Vec::new();
        match value.value() {
            Value::Array(list) => {
                for index in 0..list.len() {
                    let item = value.child("", |value| value.get(index));
                    items.extend(item.map(|item| (Value::from(index), item)));
                }
            }
            Value::Object(object) => {
                let mut keys: Vec<&String> = object.keys().collect();
                keys.sort();
                for key in keys {
                    let item = value.child(key, |value| value.get(key));
                    items.extend(item.map(|item| (Value::from(key.as_str()), item)));
                }
            }
            Value::Null => {}
            Value::String(_) if self.data.headings => items.push((Value::from(0), value.clone())),
            _ => {
                let why = format!("cannot range over {}", value.kind());
                return Err(Wrong::new(at, why));
            }
        }
        for _ in &items {
            self.step(at)?;
        }
        Ok(items)
    }

    fn set_in_range(&mut self, pipeline: &Pipeline, key: Value, item: &Val<'d>) {
        let values = match pipeline.variables.len() {
            2 => vec![Val::new(key), item.clone()],
            _ => vec![item.clone()],
        };
        for (name, value) in pipeline.variables.iter().zip(values) {
            self.set(name, value, pipeline.declares);
        }
    }

    fn set(&mut self, name: &str, value: Val<'d>, declares: bool) {
        let known = self.variables.iter_mut().rev();
        let mut known = known.filter(|(known, _)| known == name);
        match known.next().filter(|_| !declares) {
            Some((_, known)) => *known = value,
            None => self.variables.push((name.to_owned(), value)),
        }
    }

    fn pipeline(&mut self, pipeline: &Pipeline, dot: &Val<'d>) -> Result<Val<'d>, Wrong> {
        let mut value = None;
        for command in &pipeline.commands {
            value = Some(self.command(command, dot, value)?);
        }
        let value = value.unwrap_or(Val::Nothing);
        // `{{range}}` sets two.
        if let [name] = &pipeline.variables[..] {
            self.set(name, value.clone(), pipeline.declares);
        }
        Ok(value)
    }

    /// The value of a command; `last` is that of the one before it.
    fn command(
        &mut self,
        operands: &[Operand],
        dot: &Val<'d>,
        last: Option<Val<'d>>,
    ) -> Result<Val<'d>, Wrong> {
        let (first, arguments) = operands
            .split_first()
            .ok_or_else(|| Wrong::new(0, "a value is missing"))?;
        if let Base::Function(function) = first.base {
            return self.call(first.at, function, arguments, dot, last);
        }
        if arguments.is_empty() && last.is_none() {
            return self.operand(first, dot);
        }
        match (&first.base, &first.fields[..]) {
            (Base::Dot, [(_, name)]) if name == "Label" => {
                self.label(first.at, arguments, dot, last)
            }
            (_, [.., (at, name)]) => Err(Wrong::new(*at, format!(".{name} takes no arguments"))),
            _ => Err(Wrong::new(first.at, "this takes no arguments")),
        }
    }

    /// `.Label "key"`; an empty string when there is no such label.
    fn label(
        &mut self,
        at: usize,
        arguments: &[Operand],
        dot: &Val<'d>,
        last: Option<Val<'d>>,
    ) -> Result<Val<'d>, Wrong> {
        let mut values = Vec::new();
        for argument in arguments {
            values.push(self.operand(argument, dot)?);
        }
        values.extend(last);
        let (Some(labels), [key]) = (self.data.labels, &values[..]) else {
            return Err(Wrong::new(
                at,
                ".Label takes the key of one label, where there are labels",
            ));
        };
        if self.data.headings {
            return Ok(key.clone());
        }
        let found = key.value().as_str().and_then(|key| labels.get(key));
        Ok(found.map_or(Val::Zero, |found| Val::of(found, Shape::Structure)))
    }

    fn operand(&mut self, operand: &Operand, dot: &Val<'d>) -> Result<Val<'d>, Wrong> {
        self.step(operand.at)?;
        let mut value = match &operand.base {
            Base::Dot => dot.clone(),
            Base::Variable(name) => {
                let mut known = self.variables.iter().rev();
                let known = known.find(|(known, _)| known == name);
                known.map_or(Val::Nothing, |(_, value)| value.clone())
            }
            Base::Literal(value) => Val::new(value.clone()),
            Base::Nil => Val::Nothing,
            Base::Function(function) => self.call(operand.at, function, &[], dot, None)?,
            Base::Parenthesis(pipeline) => self.pipeline(pipeline, dot)?,
        };
        for (at, name) in &operand.fields {
            value = self.field(*at, &value, name)?;
        }
        Ok(value)
    }

    fn field(&self, at: usize, value: &Val<'d>, name: &str) -> Result<Val<'d>, Wrong> {
        let Value::Object(object) = value.value() else {
            let why = format!("there is no field .{name} in {}", value.kind());
            return Err(Wrong::new(at, why));
        };
        if let Some(child) = value.child(name, |value| value.get(name)) {
            return Ok(child);
        }
        if let Val::Known(_, Shape::Map) = value {
            return Ok(Val::Nothing);
        }
        let mut names: Vec<String> = object.keys().map(|key| format!(".{key}")).collect();
        names.sort();
        Err(Wrong {
            unknown_field: true,
            ..Wrong::new(
                at,
                format!("there is no field .{name}; there are {}", names.join(", ")),
            )
        })
    }

    fn call(
        &mut self,
        at: usize,
        function: &'static Function,
        arguments: &[Operand],
        dot: &Val<'d>,
        last: Option<Val<'d>>,
    ) -> Result<Val<'d>, Wrong> {
        let name = function.name;
        let given = arguments.len() + usize::from(last.is_some());
        if given < function.least || given > function.most {
            let wanted = match (function.least, function.most) {
                (least, most) if least == most => least.to_string(),
                (least, usize::MAX) => format!("at least {least}"),
                (least, most) => format!("{least} to {most}"),
            };
            let arguments = if wanted == "1" {
                "argument"
            } else {
                "arguments"
            };
            let why = format!("{name} takes {wanted} {arguments}, and {given} are given");
            return Err(Wrong::new(at, why));
        }
        let ends = match function.call {
            Call::And => Some(false),
            Call::Or => Some(true),
            Call::Plain(_) => None,
        };
        let mut values = Vec::with_capacity(given);
        for argument in arguments {
            let value = self.operand(argument, dot)?;
            if ends == Some(value.is_true()) {
                return Ok(value);
            }
            values.push(value);
        }
        values.extend(last);
        if self.data.headings && function.shapes_text {
            return Ok(values.swap_remove(0));
        }
        let Call::Plain(call) = function.call else {
            return Ok(values.pop().unwrap_or(Val::Nothing));
        };
        let value = call(&values).map_err(|why| Wrong::new(at, format!("{name}: {why}")))?;
        match value.value() {
            Value::String(text) if text.len() > LONGEST => {
                Err(Wrong::new(at, format!("{name}: the string is too long")))
            }
            _ => Ok(value),
        }
    }
}
