//! From tokens to a tree. Names of functions and variables are checked here, fields are not: they
//! are the data's.

use serde_json::Value;

use super::functions::{self, Function};
use super::lexer::{Placed, Token, Wrong, tokens};

/// Blocks and parentheses in each other.
const DEEPEST: usize = 50;

/// A part of a template.
#[derive(Debug, Clone)]
pub enum Node {
    /// As it is.
    Text(String),
    /// `{{pipeline}}`: its value is printed, unless it sets a variable.
    Print(Pipeline),
    /// `{{if}}`, `{{with}}` or `{{range}}`.
    Block(Box<Block>),
}

/// What a block does with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    If,
    With,
    Range,
}

/// A block with its two bodies.
#[derive(Debug, Clone)]
pub struct Block {
    pub kind: Kind,
    pub value: Pipeline,
    pub body: Vec<Node>,
    pub otherwise: Vec<Node>,
}

/// Commands, each of which gets the value of the one before it as its last argument.
#[derive(Debug, Clone)]
pub struct Pipeline {
    pub at: usize,
    /// Variables that get the value; two only in `{{range}}`.
    pub variables: Vec<String>,
    /// They are new ones.
    pub declares: bool,
    /// Operands of each command; never empty.
    pub commands: Vec<Vec<Operand>>,
}

/// An operand, with the fields that are taken of it.
#[derive(Debug, Clone)]
pub struct Operand {
    pub at: usize,
    pub base: Base,
    pub fields: Vec<(usize, String)>,
}

/// What an operand begins with.
#[derive(Debug, Clone)]
pub enum Base {
    Dot,
    Variable(String),
    Literal(Value),
    Nil,
    Function(&'static Function),
    Parenthesis(Box<Pipeline>),
}

/// The tree of a template.
pub fn parse(template: &str) -> Result<Vec<Node>, Wrong> {
    let mut parser = Parser {
        tokens: tokens(template)?,
        next: 0,
        end: template.len(),
        variables: vec!["$".to_owned()],
        depth: 0,
    };
    let (nodes, stop) = parser.nodes()?;
    match stop {
        None => Ok(nodes),
        Some((at, word)) => Err(Wrong::new(at, format!("unexpected {{{{{word}}}}}"))),
    }
}

struct Parser {
    tokens: Vec<Placed>,
    next: usize,
    end: usize,
    variables: Vec<String>,
    depth: usize,
}

/// `else` or `end`, and where.
type Stop = Option<(usize, &'static str)>;

impl Parser {
    fn at(&self) -> usize {
        self.tokens.get(self.next).map_or(self.end, |(at, _)| *at)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next).map(|(_, token)| token)
    }

    fn spaces(&mut self) {
        while self.peek() == Some(&Token::Space) {
            self.next += 1;
        }
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    fn unexpected(&self) -> Wrong {
        let what = self.peek().map_or_else(|| "end".into(), Token::shown);
        Wrong::new(self.at(), format!("unexpected {what}"))
    }

    fn close(&mut self) -> Result<(), Wrong> {
        self.spaces();
        match self.peek() {
            Some(Token::Close) => {
                self.next += 1;
                Ok(())
            }
            _ => Err(self.unexpected()),
        }
    }

    fn deeper(&mut self) -> Result<(), Wrong> {
        self.depth += 1;
        match self.depth > DEEPEST {
            true => Err(Wrong::new(self.at(), "too many blocks in each other")),
            false => Ok(()),
        }
    }

    /// Nodes up to `{{else`, of which only the word is read, `{{end}}`, or the template's end.
    fn nodes(&mut self) -> Result<(Vec<Node>, Stop), Wrong> {
        let mut nodes = Vec::new();
        while let Some(token) = self.peek() {
            let at = self.at();
            if let Token::Text(text) = token {
                nodes.push(Node::Text(text.clone()));
                self.next += 1;
                continue;
            }
            // `{{`: the lexer gives nothing else outside of actions.
            self.next += 1;
            self.spaces();
            let word = match self.peek() {
                Some(Token::Name(name)) => name.clone(),
                _ => String::new(),
            };
            let kind = match &word[..] {
                "if" => Some(Kind::If),
                "with" => Some(Kind::With),
                "range" => Some(Kind::Range),
                "end" => {
                    self.next += 1;
                    self.close()?;
                    return Ok((nodes, Some((at, "end"))));
                }
                "else" => {
                    self.next += 1;
                    return Ok((nodes, Some((at, "else"))));
                }
                "define" | "template" | "block" | "break" | "continue" => {
                    return Err(Wrong::new(at, format!("not supported: {word}")));
                }
                _ => None,
            };
            nodes.push(match kind {
                Some(kind) => {
                    self.next += 1;
                    self.block(at, kind)?
                }
                None => {
                    let pipeline = self.pipeline(1)?;
                    self.close()?;
                    Node::Print(pipeline)
                }
            });
        }
        Ok((nodes, None))
    }

    /// A block, after its keyword, up to its `{{end}}`.
    fn block(&mut self, at: usize, kind: Kind) -> Result<Node, Wrong> {
        self.deeper()?;
        let outside = self.variables.len();
        let value = self.pipeline(if kind == Kind::Range { 2 } else { 1 })?;
        self.close()?;
        let unclosed = || Wrong::new(at, "the block has no {{end}}");
        let (body, stop) = self.nodes()?;
        let (else_at, stop) = stop.ok_or_else(unclosed)?;
        let mut otherwise = Vec::new();
        if stop == "else" {
            self.spaces();
            let chained = [("if", Kind::If), ("with", Kind::With)];
            let chained = chained.into_iter().find(|(name, _)| self.is_name(name));
            if let Some((_, chained)) = chained.filter(|(_, chained)| *chained == kind) {
                self.next += 1;
                otherwise.push(self.block(else_at, chained)?);
            } else {
                self.close()?;
                let (nodes, stop) = self.nodes()?;
                match stop.ok_or_else(unclosed)? {
                    (_, "end") => otherwise = nodes,
                    (at, _) => return Err(Wrong::new(at, "a second {{else}}")),
                }
            }
        }
        self.variables.truncate(outside);
        self.depth -= 1;
        Ok(Node::Block(Box::new(Block {
            kind,
            value,
            body,
            otherwise,
        })))
    }

    /// A pipeline that may set at most so many variables; up to `}}` or `)`.
    fn pipeline(&mut self, most_variables: usize) -> Result<Pipeline, Wrong> {
        self.spaces();
        let at = self.at();
        let (variables, declares) = self.targets(most_variables)?;
        let mut commands = vec![self.command()?];
        while self.peek() == Some(&Token::Pipe) {
            self.next += 1;
            let at = self.at();
            let command = self.command()?;
            if matches!(command[0].base, Base::Literal(_) | Base::Nil) {
                return Err(Wrong::new(
                    at,
                    "only a function takes a value from a pipeline",
                ));
            }
            commands.push(command);
        }
        // Known from here on, not in their own value.
        if declares {
            self.variables.extend(variables.iter().cloned());
        }
        Ok(Pipeline {
            at,
            variables,
            declares,
            commands,
        })
    }

    /// `$a :=`, `$a =`, `$a, $b :=`; or nothing of it.
    fn targets(&mut self, most: usize) -> Result<(Vec<String>, bool), Wrong> {
        let begin = self.next;
        let mut names = Vec::new();
        while let Some(Token::Variable(name)) = self.peek() {
            names.push((self.at(), name.clone()));
            self.next += 1;
            self.spaces();
            let declares = match self.peek() {
                Some(Token::Comma) => {
                    self.next += 1;
                    self.spaces();
                    continue;
                }
                Some(Token::Declare) => true,
                Some(Token::Assign) => false,
                _ => break,
            };
            if names.len() > most {
                return Err(Wrong::new(names[most].0, "too many variables"));
            }
            for (at, name) in &names {
                if !declares {
                    self.known(*at, name)?;
                } else if name == "$" {
                    return Err(Wrong::new(*at, "$ cannot be set"));
                }
            }
            self.next += 1;
            return Ok((names.into_iter().map(|(_, name)| name).collect(), declares));
        }
        self.next = begin;
        Ok((Vec::new(), false))
    }

    fn known(&self, at: usize, name: &str) -> Result<(), Wrong> {
        match self.variables.iter().any(|known| known == name) {
            true => Ok(()),
            false => Err(Wrong::new(at, format!("undefined variable {name}"))),
        }
    }

    fn command(&mut self) -> Result<Vec<Operand>, Wrong> {
        let mut operands: Vec<Operand> = Vec::new();
        loop {
            self.spaces();
            match self.peek() {
                Some(Token::Close | Token::Right | Token::Pipe) | None => break,
                Some(_) => operands.push(self.operand()?),
            }
            match self.peek() {
                Some(Token::Space | Token::Close | Token::Right | Token::Pipe) => {}
                _ => return Err(self.unexpected()),
            }
        }
        match operands.is_empty() {
            true => Err(Wrong::new(self.at(), "a value is missing")),
            false => Ok(operands),
        }
    }

    fn operand(&mut self) -> Result<Operand, Wrong> {
        let at = self.at();
        let token = self.peek().cloned().ok_or_else(|| self.unexpected())?;
        let mut is_field = false;
        let base = match token {
            Token::Dot => Base::Dot,
            Token::Field(_) => {
                is_field = true;
                Base::Dot
            }
            Token::Variable(name) => {
                self.known(at, &name)?;
                Base::Variable(name)
            }
            Token::Literal(value) => Base::Literal(value),
            Token::Name(name) if name == "nil" => Base::Nil,
            Token::Name(name) => {
                let known = functions::find(&name);
                let missing = || Wrong::new(at, functions::missing(&name));
                Base::Function(known.ok_or_else(missing)?)
            }
            Token::Left => {
                self.deeper()?;
                self.next += 1;
                let inner = self.pipeline(0)?;
                self.depth -= 1;
                if self.peek() != Some(&Token::Right) {
                    return Err(Wrong::new(at, "( has no end: )"));
                }
                Base::Parenthesis(Box::new(inner))
            }
            _ => return Err(self.unexpected()),
        };
        if !is_field {
            self.next += 1;
        }
        let mut fields = Vec::new();
        let takes_fields = !matches!(base, Base::Literal(_) | Base::Nil | Base::Function(_));
        while let (true, Some(Token::Field(name))) = (takes_fields, self.peek()) {
            fields.push((self.at(), name.clone()));
            self.next += 1;
        }
        Ok(Operand { at, base, fields })
    }
}
