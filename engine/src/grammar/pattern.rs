//! The regular expressions of `pattern`, inside a JSON string: literals, classes, groups, alternatives, counts, and
//! anchors at the two ends. What is not anchored may have any characters there, as JSON Schema wants it.

use super::json::{Parts, digit, wide};
use super::{Builder, Node, NodeId};

const MAX_PATTERN_BYTES: usize = 1024;
const MAX_COUNT: u32 = 10_000;
const MAX_GROUPS: usize = 32;

/// The grammar of the texts that match, escaped as JSON escapes them, without the quotes.
pub(super) fn compile(b: &mut Builder, pattern: &str) -> Result<NodeId, String> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(format!("a pattern of more than {MAX_PATTERN_BYTES} bytes"));
    }
    let (from_start, rest) = pattern.strip_prefix('^').map_or((false, pattern), |rest| (true, rest));
    let escaped_end = rest.ends_with("\\$");
    let (to_end, body) = match rest.strip_suffix('$') {
        Some(body) if !escaped_end => (true, body),
        Some(_) | None => (false, rest),
    };
    let mut reader = Reader { left: body.chars().peekable(), depth: 0 };
    let node = reader.alternatives(b)?;
    if reader.left.next().is_some() {
        return Err("a `)` without its `(`".to_owned());
    }
    let character = Parts::default().character(b);
    let any = b.repeat(character, 0, None);
    let mut parts = Vec::new();
    if !from_start {
        parts.push(any);
    }
    parts.push(node);
    if !to_end {
        parts.push(any);
    }
    Ok(b.sequence(parts))
}

/// Decimal numbers from `low` to `high` without leading zeros.
pub(super) fn range(b: &mut Builder, low: u64, high: u64) -> NodeId {
    let mut options = Vec::new();
    let mut from = low;
    loop {
        // All numbers of one length at a time.
        let last = 10_u64.checked_pow(from.to_string().len() as u32).map_or(u64::MAX, |next| next - 1).min(high);
        let (a, z) = (from.to_string().into_bytes(), last.to_string().into_bytes());
        options.push(same_length(b, &a, &z));
        if last >= high {
            return b.choice(options);
        }
        from = last + 1;
    }
}

/// Digit strings between two of the same length.
fn same_length(b: &mut Builder, low: &[u8], high: &[u8]) -> NodeId {
    let (Some((&l, low_rest)), Some((&h, high_rest))) = (low.split_first(), high.split_first()) else {
        return b.text("");
    };
    if l == h {
        let first = b.text([l]);
        let rest = same_length(b, low_rest, high_rest);
        return b.sequence([first, rest]);
    }
    let count = low_rest.len();
    let (zeros, nines) = (vec![b'0'; count], vec![b'9'; count]);
    let mut options = Vec::new();
    let (mut from, mut upto) = (l, h);
    if low_rest != zeros {
        let (first, rest) = (b.text([l]), same_length(b, low_rest, &nines));
        options.push(b.sequence([first, rest]));
        from += 1;
    }
    if high_rest != nines {
        let (first, rest) = (b.text([h]), same_length(b, &zeros, high_rest));
        options.push(b.sequence([first, rest]));
        upto -= 1;
    }
    if from <= upto {
        let (first, digit) = (b.add(Node::Bytes(vec![(from, upto)])), digit(b));
        let count = count as u32;
        let rest = if count == 0 { b.text("") } else { b.repeat(digit, count, Some(count)) };
        options.push(b.sequence([first, rest]));
    }
    b.choice(options)
}

struct Reader<'p> {
    left: std::iter::Peekable<std::str::Chars<'p>>,
    depth: usize,
}

impl Reader<'_> {
    fn alternatives(&mut self, b: &mut Builder) -> Result<NodeId, String> {
        let mut options = vec![self.sequence(b)?];
        while self.left.next_if_eq(&'|').is_some() {
            options.push(self.sequence(b)?);
        }
        Ok(b.choice(options))
    }

    fn sequence(&mut self, b: &mut Builder) -> Result<NodeId, String> {
        let mut parts = Vec::new();
        while let Some(&next) = self.left.peek() {
            if next == '|' || next == ')' {
                break;
            }
            let atom = self.atom(b)?;
            parts.push(self.counted(b, atom)?);
        }
        if parts.is_empty() { Ok(b.text("")) } else { Ok(b.sequence(parts)) }
    }

    fn atom(&mut self, b: &mut Builder) -> Result<NodeId, String> {
        match self.left.next() {
            Some('(') => {
                self.depth += 1;
                if self.depth > MAX_GROUPS {
                    return Err(format!("groups nest deeper than {MAX_GROUPS}"));
                }
                if self.left.next_if_eq(&'?').is_some() && self.left.next() != Some(':') {
                    return Err("only plain groups `(...)` and `(?:...)` are supported".to_owned());
                }
                let node = self.alternatives(b)?;
                if self.left.next() != Some(')') {
                    return Err("a `(` without its `)`".to_owned());
                }
                self.depth -= 1;
                Ok(node)
            }
            Some('[') => {
                let class = self.class()?;
                class.node(b)
            }
            Some('.') => Class::any().node(b),
            Some('\\') => {
                let class = self.escape()?;
                class.node(b)
            }
            Some(c @ ('*' | '+' | '?' | '{' | '^' | '$')) => Err(format!("`{c}` is not supported here")),
            Some(c) => Class::one(c).node(b),
            None => Err("the pattern ends too early".to_owned()),
        }
    }

    fn counted(&mut self, b: &mut Builder, atom: NodeId) -> Result<NodeId, String> {
        let (min, max) = match self.left.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => return self.braces(b, atom),
            _ => return Ok(atom),
        };
        self.left.next();
        self.refuse_modifier()?;
        Ok(b.repeat(atom, min, max))
    }

    fn braces(&mut self, b: &mut Builder, atom: NodeId) -> Result<NodeId, String> {
        self.left.next();
        let min = self.count()?.ok_or("a count begins with a number")?;
        let max = match self.left.next() {
            Some('}') => Some(min),
            Some(',') => {
                let max = self.count()?;
                if self.left.next() != Some('}') {
                    return Err("a `{` without its `}`".to_owned());
                }
                max
            }
            _ => return Err("a `{` without its `}`".to_owned()),
        };
        if max.is_some_and(|max| max < min) {
            return Err("a count whose end is below its start".to_owned());
        }
        self.refuse_modifier()?;
        Ok(b.repeat(atom, min, max))
    }

    fn refuse_modifier(&mut self) -> Result<(), String> {
        // Lazy or greedy makes no difference to which texts match.
        self.left.next_if_eq(&'?');
        match self.left.peek() {
            Some('+' | '*' | '{') => Err("one count after another".to_owned()),
            _ => Ok(()),
        }
    }

    fn count(&mut self) -> Result<Option<u32>, String> {
        let mut digits = String::new();
        while let Some(d) = self.left.next_if(char::is_ascii_digit) {
            digits.push(d);
        }
        if digits.is_empty() {
            return Ok(None);
        }
        let count = digits.parse().ok().filter(|count| *count <= MAX_COUNT);
        count.map(Some).ok_or_else(|| format!("a count above {MAX_COUNT}"))
    }

    fn class(&mut self) -> Result<Class, String> {
        let negated = self.left.next_if_eq(&'^').is_some();
        let mut class = Class::default();
        let mut first = true;
        loop {
            let low = match self.left.next() {
                None => return Err("a `[` without its `]`".to_owned()),
                Some(']') if !first => break,
                Some('\\') => {
                    let escaped = self.escape()?;
                    match escaped.single() {
                        Some(c) => c,
                        None => {
                            class.join(&escaped);
                            first = false;
                            continue;
                        }
                    }
                }
                Some(c) => c,
            };
            first = false;
            let mut ahead = self.left.clone();
            if ahead.next() == Some('-') && ahead.peek().is_some_and(|c| *c != ']') {
                self.left.next();
                let high = match self.left.next() {
                    Some('\\') => self.escape()?.single().ok_or("a range ends in a class")?,
                    Some(c) => c,
                    None => return Err("a `[` without its `]`".to_owned()),
                };
                if high < low {
                    return Err(format!("the range {low}-{high} is empty"));
                }
                class.span(low, high)?;
            } else {
                class.span(low, low)?;
            }
        }
        if negated {
            class.negate()?;
        }
        Ok(class)
    }

    fn escape(&mut self) -> Result<Class, String> {
        let c = self.left.next().ok_or("the pattern ends in a backslash")?;
        let mut class = Class::default();
        match c {
            'd' | 'D' => class.span('0', '9')?,
            'w' | 'W' => {
                for (low, high) in [('0', '9'), ('A', 'Z'), ('a', 'z'), ('_', '_')] {
                    class.span(low, high)?;
                }
            }
            's' | 'S' => {
                for c in [' ', '\t', '\n', '\r', '\u{c}'] {
                    class.span(c, c)?;
                }
            }
            'n' => class.span('\n', '\n')?,
            'r' => class.span('\r', '\r')?,
            't' => class.span('\t', '\t')?,
            c if c.is_ascii_alphanumeric() => return Err(format!("`\\{c}` is not supported")),
            c => class.span(c, c)?,
        }
        if matches!(c, 'D' | 'W' | 'S') {
            class.negate()?;
        }
        Ok(class)
    }
}

/// A set of characters: ASCII one by one, of the others some or all.
#[derive(Debug, Default)]
struct Class {
    ascii: u128,
    others: Vec<char>,
    all_others: bool,
}

impl Class {
    fn one(c: char) -> Self {
        let mut class = Self::default();
        if c.is_ascii() {
            class.ascii = 1 << u32::from(c);
        } else {
            class.others.push(c);
        }
        class
    }

    fn any() -> Self {
        Self { ascii: !(1 << 10) & !(1 << 13), others: Vec::new(), all_others: true }
    }

    fn single(&self) -> Option<char> {
        match (self.ascii.count_ones(), self.others.as_slice(), self.all_others) {
            (1, [], false) => char::from_u32(self.ascii.trailing_zeros()),
            (0, [c], false) => Some(*c),
            _ => None,
        }
    }

    fn span(&mut self, low: char, high: char) -> Result<(), String> {
        const MOST: u32 = 256;
        for code in u32::from(low)..=u32::from(high) {
            match char::from_u32(code) {
                Some(c) if c.is_ascii() => self.ascii |= 1 << code,
                Some(c) if self.others.len() < MOST as usize => self.others.push(c),
                Some(_) => return Err(format!("a range of more than {MOST} characters beyond ASCII")),
                None => {}
            }
        }
        Ok(())
    }

    fn join(&mut self, other: &Self) {
        self.ascii |= other.ascii;
        self.others.extend(&other.others);
        self.all_others |= other.all_others;
    }

    fn negate(&mut self) -> Result<(), String> {
        if !self.others.is_empty() {
            return Err("a negated class with characters beyond ASCII is not supported".to_owned());
        }
        self.ascii = !self.ascii;
        self.all_others = !self.all_others;
        Ok(())
    }

    /// Each character as JSON writes it inside quotes.
    fn node(&self, b: &mut Builder) -> Result<NodeId, String> {
        let mut options = Vec::new();
        let mut plain: Vec<(u8, u8)> = Vec::new();
        for code in 0..128_u8 {
            if self.ascii & (1 << code) == 0 {
                continue;
            }
            match code {
                b'"' | b'\\' => options.push(b.text([b'\\', code])),
                b'\n' => options.push(b.text("\\n")),
                b'\r' => options.push(b.text("\\r")),
                b'\t' => options.push(b.text("\\t")),
                // Other control characters are never offered.
                0..0x20 | 0x7F => {}
                _ => match plain.last_mut() {
                    Some(last) if last.1 + 1 == code => last.1 = code,
                    Some(_) | None => plain.push((code, code)),
                },
            }
        }
        if !plain.is_empty() {
            options.push(b.add(Node::Bytes(plain)));
        }
        if self.all_others {
            options.push(wide(b));
        } else {
            options.extend(self.others.iter().map(|c| b.text(c.to_string())));
        }
        if options.is_empty() {
            return Err("a class without characters".to_owned());
        }
        Ok(b.choice(options))
    }
}
