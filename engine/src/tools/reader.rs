//! Reading a reply as it comes: thinking, text and calls, each as soon as it is certain.

use serde_json::Value;

use super::{END_THINK, Style, THINK};

/// A call's head is found within so many bytes, or it is no call.
const MAX_HEAD: usize = 8 << 10;

/// A part of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    Reasoning(String),
    /// A call begins; its arguments follow.
    Call(String),
    /// The next piece of the last call's arguments, which are JSON.
    Arguments(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space has come.
    Start,
    Thinking,
    Text,
    /// Behind an opening mark; the call's head is not whole.
    Head,
    Arguments,
    /// Behind a call's arguments.
    After,
    /// Behind an opening mark, in no form that can be passed on as it comes.
    Odd,
}

/// Takes text in, gives parts out.
#[derive(Debug, Clone)]
pub struct Reader {
    style: Style,
    /// Names that may be called; none: everything is text.
    tools: Vec<String>,
    thinks: bool,
    /// Line breaks right behind a mark are not said yet, and are left out.
    fresh: bool,
    state: State,
    held: String,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Something was said or called: white space between calls is not text.
    called: bool,
    parts: Vec<Part>,
}

/// Why a head is not read: more must come, or it is none.
enum Short {
    More,
    Bad,
}

impl Reader {
    /// `thinks`: the model marks its thinking. `begun`: the prompt's end already opened a call or a thought.
    pub fn new(style: Style, tools: Vec<String>, thinks: bool, begun: Option<&str>) -> Self {
        let state = match begun {
            Some(THINK) => State::Thinking,
            Some(_) => State::Head,
            None => State::Start,
        };
        let (held, parts) = (String::new(), Vec::new());
        Self {
            style,
            tools,
            thinks,
            fresh: begun == Some(THINK),
            state,
            held,
            depth: 0,
            in_string: false,
            escaped: false,
            called: false,
            parts,
        }
    }

    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        while self.step() {}
        std::mem::take(&mut self.parts)
    }

    /// The end: what was held back is what it looks like.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking => self.tell(Part::Reasoning(held)),
            State::Start | State::Text => self.text(held),
            State::Head | State::Odd => self.odd(&held),
            State::Arguments => self.tell(Part::Arguments(held)),
            State::After => {}
        }
        std::mem::take(&mut self.parts)
    }

    /// Whether the reader is in the model's thinking.
    pub fn is_thinking(&self) -> bool {
        self.state == State::Thinking
    }

    /// One step; false where more text is needed.
    fn step(&mut self) -> bool {
        match self.state {
            State::Start => self.start(),
            State::Thinking => self.thinking(),
            State::Text => self.plain(),
            State::Head => self.head(),
            State::Arguments => self.arguments(),
            State::After => self.after(),
            State::Odd => self.until_close(),
        }
    }

    /// Leaves out line breaks behind a mark; false while nothing else has come.
    fn freshen(&mut self) -> bool {
        if self.fresh {
            self.held = self.held.trim_start_matches('\n').to_owned();
            self.fresh = self.held.is_empty();
        }
        !self.fresh
    }

    fn start(&mut self) -> bool {
        if !self.freshen() {
            return false;
        }
        let begin = self.held.trim_start();
        if begin.is_empty() {
            return false;
        }
        if self.thinks && begin.starts_with(THINK) {
            self.held = begin[THINK.len()..].to_owned();
            self.fresh = true;
            self.state = State::Thinking;
            return true;
        }
        if self.thinks && THINK.starts_with(begin) {
            return false;
        }
        if self.style.is_bare() && !self.tools.is_empty() {
            let fence = begin.strip_prefix("```");
            if begin.len() < 3 && "```".starts_with(begin) || fence.is_some_and(|rest| !rest.contains('\n')) {
                return false;
            }
            let inner = fence.and_then(|rest| rest.split_once('\n')).map_or(begin, |(_, inner)| inner);
            if inner.trim_start().is_empty() {
                return false;
            }
            if inner.trim_start().starts_with('{') {
                self.state = State::Head;
                return true;
            }
        }
        self.state = State::Text;
        true
    }

    fn thinking(&mut self) -> bool {
        if !self.freshen() {
            return false;
        }
        if let Some(at) = self.held.find(END_THINK) {
            let thought = self.held[..at].to_owned();
            self.held = self.held[at + END_THINK.len()..].to_owned();
            self.fresh = true;
            self.tell(Part::Reasoning(thought));
            self.thinks = false;
            self.state = State::Start;
            return true;
        }
        let sure = self.held.len() - overlap(&self.held, END_THINK);
        let thought: String = self.held.drain(..sure).collect();
        self.tell(Part::Reasoning(thought));
        false
    }

    fn plain(&mut self) -> bool {
        let open = self.style.open();
        if open.is_empty() || self.tools.is_empty() {
            let all = std::mem::take(&mut self.held);
            self.text(all);
            return false;
        }
        if let Some(at) = self.held.find(open) {
            let before = self.held[..at].to_owned();
            self.held.drain(..at + open.len());
            self.text(before);
            self.state = State::Head;
            return true;
        }
        let sure = self.held.len() - overlap(&self.held, open);
        let text: String = self.held.drain(..sure).collect();
        self.text(text);
        false
    }

    fn head(&mut self) -> bool {
        match self.read_head() {
            Ok((name, at)) if self.tools.contains(&name) => {
                self.held.drain(..at);
                self.called = true;
                self.tell(Part::Call(name));
                (self.depth, self.in_string, self.escaped) = (0, false, false);
                self.state = State::Arguments;
                true
            }
            Err(Short::More) if self.held.len() < MAX_HEAD => false,
            // An answer in JSON that is no call.
            Ok(_) | Err(Short::Bad | Short::More) if self.style.is_bare() => {
                self.state = State::Text;
                let all = std::mem::take(&mut self.held);
                self.text(all);
                false
            }
            Ok(_) | Err(Short::Bad | Short::More) => {
                self.state = State::Odd;
                true
            }
        }
    }

    /// The name that is called, and where its arguments begin.
    fn read_head(&self) -> Result<(String, usize), Short> {
        let mut cursor = Cursor { text: &self.held, at: 0 };
        cursor.skip(|c| c.is_whitespace() || c == '[' || c == ',' || c == ';');
        if self.style.is_bare() && cursor.rest().starts_with("```") {
            let line = cursor.rest().find('\n').ok_or(Short::More)?;
            cursor.at += line;
            cursor.skip(char::is_whitespace);
        }
        if self.style == Style::Mistral && !cursor.rest().starts_with('{') {
            let end = cursor.rest().find(['{', '[']).ok_or(Short::More)?;
            let name = cursor.rest()[..end].trim().to_owned();
            cursor.at += end;
            if cursor.rest().starts_with('[') {
                cursor.word("[ARGS]")?;
            }
            cursor.skip(char::is_whitespace);
            return if cursor.rest().is_empty() { Err(Short::More) } else { Ok((name, cursor.at)) };
        }
        for word in ["{", "\"name\"", ":"] {
            cursor.word(word)?;
            cursor.skip(char::is_whitespace);
        }
        let name = cursor.string()?;
        cursor.skip(char::is_whitespace);
        cursor.word(",")?;
        cursor.skip(char::is_whitespace);
        let other = if self.style.arguments() == "arguments" { "parameters" } else { "arguments" };
        // A quote and a letter tell the two apart. The model may say any other character there, and of several bytes.
        let is_other = cursor.rest().get(..2).is_some_and(|begin| format!("\"{other}\"").starts_with(begin));
        let key = if is_other { other } else { self.style.arguments() };
        cursor.word(&format!("\"{key}\""))?;
        cursor.skip(char::is_whitespace);
        cursor.word(":")?;
        cursor.skip(char::is_whitespace);
        match cursor.rest().chars().next() {
            Some('{') => Ok((name, cursor.at)),
            Some(_) => Err(Short::Bad),
            None => Err(Short::More),
        }
    }

    fn arguments(&mut self) -> bool {
        let mut end = None;
        for (at, c) in self.held.char_indices() {
            if self.in_string {
                match c {
                    _ if self.escaped => self.escaped = false,
                    '\\' => self.escaped = true,
                    '"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        end = Some(at + 1);
                        break;
                    }
                }
                _ => {}
            }
        }
        let length = end.unwrap_or(self.held.len());
        let piece: String = self.held.drain(..length).collect();
        self.tell(Part::Arguments(piece));
        if end.is_some() {
            self.state = State::After;
            // The brace that closes the call itself.
            self.depth = 1;
        }
        end.is_some()
    }

    fn after(&mut self) -> bool {
        let close = self.style.close();
        loop {
            let rest = self.held.trim_start();
            if rest.is_empty() {
                return false;
            }
            if self.depth == 1 && rest.starts_with('}') {
                self.depth = 0;
                self.held = rest[1..].to_owned();
                continue;
            }
            if !close.is_empty() {
                if let Some(behind) = rest.strip_prefix(close) {
                    self.held = behind.to_owned();
                } else if close.starts_with(rest) {
                    return false;
                }
                self.state = State::Text;
                return true;
            }
            if rest.starts_with([',', ';']) {
                self.held = rest[1..].to_owned();
                self.state = State::Head;
                return true;
            }
            if let Some(behind) = rest.strip_prefix("```").or_else(|| rest.strip_prefix(']')) {
                self.held = behind.to_owned();
                self.state = State::Text;
                return true;
            }
            if "```".starts_with(rest) {
                return false;
            }
            self.state = State::Text;
            return true;
        }
    }

    fn until_close(&mut self) -> bool {
        let close = self.style.close();
        let Some(at) = (!close.is_empty()).then(|| self.held.find(close)).flatten() else { return false };
        let inner = self.held[..at].to_owned();
        self.held.drain(..at + close.len());
        self.state = State::Text;
        self.odd(&inner);
        true
    }

    /// A call in another order of members, else text after all.
    fn odd(&mut self, inner: &str) {
        let values: Vec<Value> = match serde_json::from_str(inner) {
            Ok(Value::Array(all)) => all,
            Ok(one) => vec![one],
            Err(_) => Vec::new(),
        };
        let mut calls = Vec::new();
        for value in &values {
            let name = value.get("name").and_then(Value::as_str).filter(|name| self.tools.iter().any(|t| t == name));
            let arguments = value.get("arguments").or_else(|| value.get("parameters"));
            let arguments = match arguments {
                Some(Value::String(text)) => Some(text.clone()),
                Some(value) => Some(value.to_string()),
                None => None,
            };
            calls.extend(name.zip(arguments).map(|(name, arguments)| (name.to_owned(), arguments)));
        }
        if calls.is_empty() {
            let shown = format!("{}{inner}{}", self.style.open(), self.style.close());
            return self.text(if self.style.is_bare() { inner.to_owned() } else { shown });
        }
        for (name, arguments) in calls {
            self.called = true;
            self.tell(Part::Call(name));
            self.tell(Part::Arguments(arguments));
        }
    }

    fn text(&mut self, text: String) {
        if self.called && text.trim().is_empty() {
            return;
        }
        self.tell(Part::Text(text));
    }

    fn tell(&mut self, part: Part) {
        let empty = match &part {
            Part::Text(text) | Part::Reasoning(text) | Part::Arguments(text) => text.is_empty(),
            Part::Call(_) => false,
        };
        if !empty {
            self.parts.push(part);
        }
    }
}

/// How many bytes at the end of `text` may begin `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    (1..mark.len()).rev().find(|&length| mark.is_char_boundary(length) && text.ends_with(&mark[..length])).unwrap_or(0)
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn skip(&mut self, what: impl Fn(char) -> bool) {
        self.at += self.rest().len() - self.rest().trim_start_matches(what).len();
    }

    fn word(&mut self, word: &str) -> Result<(), Short> {
        let rest = self.rest();
        if rest.starts_with(word) {
            self.at += word.len();
            Ok(())
        } else if word.starts_with(rest) {
            Err(Short::More)
        } else {
            Err(Short::Bad)
        }
    }

    /// A JSON string.
    fn string(&mut self) -> Result<String, Short> {
        let rest = self.rest();
        if rest.is_empty() {
            return Err(Short::More);
        }
        if !rest.starts_with('"') {
            return Err(Short::Bad);
        }
        let mut escaped = false;
        for (at, c) in rest.char_indices().skip(1) {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => {
                    self.at += at + 1;
                    return serde_json::from_str(&rest[..=at]).map_err(|_| Short::Bad);
                }
                _ => {}
            }
        }
        Err(Short::More)
    }
}
