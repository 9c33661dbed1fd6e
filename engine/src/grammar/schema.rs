//! JSON Schema to a grammar. A keyword that would change which values are valid and cannot be held is refused with its
//! path; annotations and keywords that nobody defined are left alone, as JSON Schema says.
//!
//! Members come in the order of `properties`. Where `properties` are named, others come only if `additionalProperties`
//! says so in words: a model that may add anything never ends. `oneOf` is taken as `anyOf`.

use std::collections::{BTreeMap, BTreeSet};

use super::json::Parts;
use super::ordered::{Json, quoted};
use super::{Builder, Grammar, GrammarError, MAX_GRAMMAR_BYTES, MAX_NODES, NodeId, pattern};

/// Deepest nesting of schemas, references followed included.
const MAX_DEPTH: usize = 64;
/// Largest `minLength`, `maxLength`, `minItems` and `maxItems`.
const MAX_COUNT: u64 = 100_000;

/// Longest name of a member, quoted, where others may stand beside it: each of its bytes is a step down for the compiler.
const MAX_NAME: usize = 256;

/// Formats of strings, as patterns.
const FORMATS: [(&str, &str); 8] = [
    ("date", "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"),
    ("time", "^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"),
    (
        "date-time",
        "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    ),
    ("duration", "^P([0-9]{1,6}D(T[0-9]{1,6}[HMS])?|T[0-9]{1,6}[HMS]|[0-9]{1,6}[WMY])$"),
    (
        "email",
        "^[A-Za-z0-9_+-]{1,32}(\\.[A-Za-z0-9_+-]{1,32}){0,4}@[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?(\\.[A-Za-z]{2,24}){1,3}$",
    ),
    ("hostname", "^[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?(\\.[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?){0,5}$"),
    ("ipv4", "^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$"),
    ("uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"),
];

/// Keywords that narrow what is valid and that no grammar here holds.
const REFUSED: [&str; 17] = [
    "not",
    "if",
    "then",
    "else",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "contains",
    "minContains",
    "maxContains",
    "multipleOf",
    "minProperties",
    "maxProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
];

/// What in a schema cannot be held, and where: a JSON pointer from the schema's root.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct SchemaError {
    pub path: String,
    pub reason: String,
}

/// The grammar of the JSON texts that a schema allows.
pub fn from_schema(schema: &Json) -> Result<Grammar, SchemaError> {
    let mut b = Builder::default();
    let root = into(&mut b, schema)?;
    b.finish(root).map_err(|error| whole(&error))
}

/// As [`from_schema`], within a larger grammar.
pub fn into(b: &mut Builder, schema: &Json) -> Result<NodeId, SchemaError> {
    let mut compiler = Compiler { root: schema, parts: Parts::default(), references: BTreeMap::new() };
    compiler.schema(b, schema, "", 0)
}

fn whole(error: &GrammarError) -> SchemaError {
    let reason = match error {
        GrammarError::LeftRecursion { .. } => "a `$ref` leads to itself without any value between".to_owned(),
        GrammarError::TooLarge
        | GrammarError::NoSuchNode { .. }
        | GrammarError::EmptyRepeat { .. }
        | GrammarError::Encoding => error.to_string(),
    };
    SchemaError { path: String::new(), reason }
}

fn refuse<T>(path: impl Into<String>, reason: impl Into<String>) -> Result<T, SchemaError> {
    Err(SchemaError { path: path.into(), reason: reason.into() })
}

struct Compiler<'a> {
    root: &'a Json,
    parts: Parts,
    /// Where each `$ref` leads.
    references: BTreeMap<String, NodeId>,
}

impl<'a> Compiler<'a> {
    fn schema(&mut self, b: &mut Builder, schema: &'a Json, path: &str, depth: usize) -> Result<NodeId, SchemaError> {
        if depth > MAX_DEPTH {
            return refuse(path, format!("schemas nest deeper than {MAX_DEPTH}"));
        }
        if b.len() > MAX_NODES {
            return refuse(path, "the schema is too large");
        }
        match schema {
            Json::Bool(true) => return Ok(self.parts.value(b)),
            Json::Bool(false) => return refuse(path, "`false` allows no value"),
            Json::Object(_) => {}
            Json::Null | Json::Number(_) | Json::String(_) | Json::Array(_) => {
                return refuse(path, "a schema is an object or a boolean");
            }
        }
        if let Some(word) = REFUSED.iter().find(|word| schema.get(word).is_some()) {
            return refuse(format!("{path}/{word}"), "this keyword is not supported");
        }
        if schema.get("uniqueItems") == Some(&Json::Bool(true)) {
            return refuse(format!("{path}/uniqueItems"), "this keyword is not supported");
        }
        if let Some(reference) = schema.get("$ref") {
            return self.reference(b, reference, &format!("{path}/$ref"), depth);
        }
        if let Some(value) = schema.get("const") {
            return Ok(b.text(value.to_text()));
        }
        if let Some(values) = schema.get("enum") {
            let Some(values) = values.as_array().filter(|values| !values.is_empty()) else {
                return refuse(format!("{path}/enum"), "`enum` is an array with at least one value");
            };
            let values: Vec<NodeId> = values.iter().map(|value| b.text(value.to_text())).collect();
            return Ok(b.choice(values));
        }
        for word in ["anyOf", "oneOf"] {
            if let Some(options) = schema.get(word) {
                return self.any_of(b, options, &format!("{path}/{word}"), depth);
            }
        }
        if let Some(all) = schema.get("allOf") {
            let at = format!("{path}/allOf");
            return match all.as_array() {
                Some([only]) => self.schema(b, only, &format!("{at}/0"), depth + 1),
                _ => refuse(at, "`allOf` is supported with one schema only"),
            };
        }
        let node = match schema.get("type") {
            Some(Json::String(kind)) => self.typed(b, schema, kind, path, depth)?,
            Some(Json::Array(kinds)) => {
                let mut options = Vec::new();
                for (index, kind) in kinds.iter().enumerate() {
                    let Some(kind) = kind.as_str() else {
                        return refuse(format!("{path}/type/{index}"), "a type is a string");
                    };
                    options.push(self.typed(b, schema, kind, path, depth)?);
                }
                if options.is_empty() {
                    return refuse(format!("{path}/type"), "`type` names no type");
                }
                b.choice(options)
            }
            Some(Json::Null | Json::Bool(_) | Json::Number(_) | Json::Object(_)) => {
                return refuse(format!("{path}/type"), "`type` is a string or an array of strings");
            }
            None => match implied(schema) {
                Some(kind) => self.typed(b, schema, kind, path, depth)?,
                None => self.parts.value(b),
            },
        };
        // OpenAPI's word for it.
        if schema.get("nullable") == Some(&Json::Bool(true)) {
            let null = b.text("null");
            return Ok(b.choice([node, null]));
        }
        Ok(node)
    }

    fn typed(
        &mut self,
        b: &mut Builder,
        schema: &'a Json,
        kind: &str,
        path: &str,
        depth: usize,
    ) -> Result<NodeId, SchemaError> {
        match kind {
            "object" => self.object(b, schema, path, depth),
            "array" => self.array(b, schema, path, depth),
            "string" => self.string(b, schema, path),
            "integer" => self.integer(b, schema, path),
            "number" => self.number(b, schema, path),
            "boolean" => Ok(self.parts.boolean(b)),
            "null" => Ok(b.text("null")),
            other => refuse(format!("{path}/type"), format!("{other:?} is no JSON type")),
        }
    }

    fn reference(&mut self, b: &mut Builder, to: &Json, path: &str, depth: usize) -> Result<NodeId, SchemaError> {
        let Some(pointer) = to.as_str().and_then(|to| to.strip_prefix('#')) else {
            return refuse(path, "only references within the schema are followed, as in `#/$defs/name`");
        };
        if let Some(&node) = self.references.get(pointer) {
            return Ok(node);
        }
        let mut found = self.root;
        for step in pointer.split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            let index = step.parse::<usize>().ok();
            let next = found.get(&step).or_else(|| found.as_array()?.get(index?));
            let Some(next) = next else { return refuse(path, format!("#{pointer} is not in the schema")) };
            found = next;
        }
        let place = b.reserve();
        self.references.insert(pointer.to_owned(), place);
        let node = self.schema(b, found, pointer, depth + 1)?;
        b.fill(place, node);
        Ok(place)
    }

    fn any_of(&mut self, b: &mut Builder, options: &'a Json, path: &str, depth: usize) -> Result<NodeId, SchemaError> {
        let Some(options) = options.as_array().filter(|options| !options.is_empty()) else {
            return refuse(path, "this is an array with at least one schema");
        };
        let mut nodes = Vec::new();
        for (index, option) in options.iter().enumerate() {
            nodes.push(self.schema(b, option, &format!("{path}/{index}"), depth + 1)?);
        }
        Ok(b.choice(nodes))
    }

    fn object(&mut self, b: &mut Builder, schema: &'a Json, path: &str, depth: usize) -> Result<NodeId, SchemaError> {
        let properties = match schema.get("properties") {
            None => &[][..],
            Some(Json::Object(members)) => members,
            Some(_) => return refuse(format!("{path}/properties"), "`properties` is an object"),
        };
        let required = names(schema, "required", path)?;
        let known: BTreeSet<&str> = properties.iter().map(|(key, _)| key.as_str()).collect();
        if let Some(missing) = required.iter().find(|name| !known.contains(**name)) {
            return refuse(format!("{path}/required"), format!("{missing:?} is not among `properties`"));
        }
        let extra = match schema.get("additionalProperties") {
            None if properties.is_empty() => Some(self.parts.value(b)),
            None | Some(Json::Bool(false)) => None,
            Some(other) => Some(self.schema(b, other, &format!("{path}/additionalProperties"), depth + 1)?),
        };
        let (open, close, comma, colon) = (b.text("{"), b.text("}"), self.parts.comma(b), self.parts.colon(b));
        // Built from the end: what may follow when nothing was written yet, and when something was.
        let (mut first, mut later) = match extra {
            None => (b.text(""), b.text("")),
            Some(value) => {
                let key = self.other_key(b, &known, path)?;
                let member = b.sequence([key, colon, value]);
                let next = b.sequence([comma, member]);
                let later = b.repeat(next, 0, None);
                let some = b.sequence([member, later]);
                (b.repeat(some, 0, Some(1)), later)
            }
        };
        for (name, property) in properties.iter().rev() {
            let at = format!("{path}/properties/{}", name.replace('~', "~0").replace('/', "~1"));
            let value = self.schema(b, property, &at, depth + 1)?;
            let key = b.text(quoted(name));
            let member = b.sequence([key, colon, value]);
            let here_first = b.sequence([member, later]);
            let here_later = b.sequence([comma, member, later]);
            if required.contains(name.as_str()) {
                (first, later) = (here_first, here_later);
            } else {
                (first, later) = (b.choice([here_first, first]), b.choice([here_later, later]));
            }
        }
        Ok(b.sequence([open, first, close]))
    }

    /// A quoted name that is none of these. Such a name has no escapes, so that it cannot be one of them in disguise.
    fn other_key(&self, b: &mut Builder, names: &BTreeSet<&str>, path: &str) -> Result<NodeId, SchemaError> {
        let names: BTreeSet<Vec<u8>> = names.iter().map(|name| quoted(name).into_bytes()).collect();
        if names.is_empty() {
            return Ok(self.parts.string(b, 0, None));
        }
        let at = format!("{path}/additionalProperties");
        if names.iter().any(|name| name.len() > MAX_NAME) {
            return refuse(at.as_str(), format!("a name beside others is of at most {MAX_NAME} bytes"));
        }
        let too_large = || refuse(at.as_str(), "the schema is too large");
        if names.iter().map(Vec::len).sum::<usize>() > MAX_GRAMMAR_BYTES {
            return too_large();
        }
        let (quote, wide) = (b.text("\""), super::json::wide(b));
        let plain = b.add(super::Node::Bytes(vec![(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)]));
        let character = b.choice([plain, wide]);
        let free = b.repeat(character, 0, None);
        let free = b.sequence([free, quote]);
        let trie: Vec<&[u8]> = names.iter().map(|name| &name[1..]).collect();
        match other_than(b, &trie, (free, wide, quote)) {
            Some(rest) => Ok(b.sequence([quote, rest])),
            None => too_large(),
        }
    }

    fn array(&mut self, b: &mut Builder, schema: &'a Json, path: &str, depth: usize) -> Result<NodeId, SchemaError> {
        let (min, max) = bounds(schema, "minItems", "maxItems", path)?;
        if let Some(fixed) = schema.get("prefixItems") {
            let at = format!("{path}/prefixItems");
            let Some(items) = fixed.as_array().filter(|items| !items.is_empty()) else {
                return refuse(at, "`prefixItems` is an array with at least one schema");
            };
            if !matches!(schema.get("items"), None | Some(Json::Bool(false))) {
                return refuse(format!("{path}/items"), "`items` beside `prefixItems` is not supported");
            }
            let mut parts = vec![b.text("[")];
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    parts.push(self.parts.comma(b));
                }
                parts.push(self.schema(b, item, &format!("{at}/{index}"), depth + 1)?);
            }
            parts.push(b.text("]"));
            return Ok(b.sequence(parts));
        }
        let item = match schema.get("items") {
            Some(items) => self.schema(b, items, &format!("{path}/items"), depth + 1)?,
            None => self.parts.value(b),
        };
        Ok(self.parts.list_between(b, "[", item, "]", min, max))
    }

    fn string(&mut self, b: &mut Builder, schema: &Json, path: &str) -> Result<NodeId, SchemaError> {
        let (min, max) = bounds(schema, "minLength", "maxLength", path)?;
        let (word, pattern) = match (schema.get("pattern"), schema.get("format")) {
            (Some(pattern), _) => ("pattern", pattern.as_str()),
            (None, Some(format)) => {
                let known = format.as_str().and_then(|name| FORMATS.iter().find(|(known, _)| *known == name));
                // A format is an annotation where it is not known.
                let Some((_, pattern)) = known else { return Ok(self.parts.string(b, min, max)) };
                ("format", Some(*pattern))
            }
            (None, None) => return Ok(self.parts.string(b, min, max)),
        };
        let at = format!("{path}/{word}");
        let Some(pattern) = pattern else { return refuse(at, "a pattern is a string") };
        if word == "pattern" && (min, max) != (0, None) {
            return refuse(at, "`pattern` beside a length is not supported: say the length in the pattern");
        }
        let quote = b.text("\"");
        match pattern::compile(b, pattern) {
            Ok(body) => Ok(b.sequence([quote, body, quote])),
            Err(reason) => refuse(at, reason),
        }
    }

    fn integer(&mut self, b: &mut Builder, schema: &Json, path: &str) -> Result<NodeId, SchemaError> {
        let low = limit(schema, "minimum", "exclusiveMinimum", 1, path)?;
        let high = limit(schema, "maximum", "exclusiveMaximum", -1, path)?;
        if (low, high) == (None, None) {
            return Ok(self.parts.integer(b));
        }
        const MOST: i64 = 9_999_999_999_999_999;
        let (low, high) = (low.unwrap_or(-MOST).max(-MOST), high.unwrap_or(MOST).min(MOST));
        if low > high {
            return refuse(format!("{path}/minimum"), "no integer lies between the limits");
        }
        let mut options = Vec::new();
        if low < 0 {
            let (from, upto) = ((-high).max(1), -low);
            let (minus, digits) = (b.text("-"), super::pattern::range(b, from.unsigned_abs(), upto.unsigned_abs()));
            options.push(b.sequence([minus, digits]));
        }
        if high >= 0 {
            options.push(super::pattern::range(b, low.max(0).unsigned_abs(), high.unsigned_abs()));
        }
        Ok(b.choice(options))
    }

    fn number(&mut self, b: &mut Builder, schema: &Json, path: &str) -> Result<NodeId, SchemaError> {
        for word in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
            if schema.get(word).is_some() {
                return refuse(format!("{path}/{word}"), "limits are supported for `integer`, not for `number`");
            }
        }
        Ok(self.parts.number(b))
    }
}

/// The type that a schema means without saying it.
fn implied(schema: &Json) -> Option<&'static str> {
    let has = |words: &[&str]| words.iter().any(|word| schema.get(word).is_some());
    if has(&["properties", "required", "additionalProperties"]) {
        Some("object")
    } else if has(&["items", "prefixItems", "minItems", "maxItems"]) {
        Some("array")
    } else if has(&["pattern", "minLength", "maxLength", "format"]) {
        Some("string")
    } else {
        None
    }
}

fn names<'s>(schema: &'s Json, word: &str, path: &str) -> Result<BTreeSet<&'s str>, SchemaError> {
    let bad = || SchemaError { path: format!("{path}/{word}"), reason: "this is an array of strings".to_owned() };
    match schema.get(word) {
        None => Ok(BTreeSet::new()),
        Some(list) => list.as_array().ok_or_else(bad)?.iter().map(|name| name.as_str().ok_or_else(bad)).collect(),
    }
}

fn bounds(schema: &Json, low: &str, high: &str, path: &str) -> Result<(u32, Option<u32>), SchemaError> {
    let read = |word: &str| match schema.get(word) {
        None => Ok(None),
        Some(value) => match value.as_u64().filter(|count| *count <= MAX_COUNT).and_then(|n| u32::try_from(n).ok()) {
            Some(count) => Ok(Some(count)),
            None => refuse(format!("{path}/{word}"), format!("a whole number from 0 to {MAX_COUNT}")),
        },
    };
    let (min, max) = (read(low)?.unwrap_or(0), read(high)?);
    if max.is_some_and(|max| max < min) {
        return refuse(format!("{path}/{high}"), format!("less than `{low}`"));
    }
    Ok((min, max))
}

/// The tighter of an inclusive and an exclusive limit; `step` leads from the latter to the former.
fn limit(schema: &Json, inclusive: &str, exclusive: &str, step: i64, path: &str) -> Result<Option<i64>, SchemaError> {
    let read = |word: &str| match schema.get(word) {
        None => Ok(None),
        Some(Json::Number(number)) => {
            let whole = number
                .as_i64()
                .or_else(|| number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15).map(|f| f as i64));
            whole.map(Some).ok_or_else(|| SchemaError {
                path: format!("{path}/{word}"),
                reason: "a whole number of 64 bits".to_owned(),
            })
        }
        Some(_) => refuse(format!("{path}/{word}"), "a limit is a number"),
    };
    let (a, b) = (read(inclusive)?, read(exclusive)?.map(|value| value.saturating_add(step)));
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some(if step > 0 { a.max(b) } else { a.min(b) }),
        (a, b) => a.or(b),
    })
}

/// The rest of a name that is none of `names`, which all share what was read so far; each ends in its closing quote. `None`
/// where that takes more nodes than a grammar may have.
fn other_than(b: &mut Builder, names: &[&[u8]], (free, wide, quote): (NodeId, NodeId, NodeId)) -> Option<NodeId> {
    if b.len() > MAX_NODES {
        return None;
    }
    let mut by_first: BTreeMap<u8, Vec<&[u8]>> = BTreeMap::new();
    for name in names {
        if let Some((first, rest)) = name.split_first() {
            by_first.entry(*first).or_default().push(rest);
        }
    }
    let mut options = Vec::new();
    if !by_first.contains_key(&b'"') {
        options.push(quote);
    }
    let taken = |byte: u8| by_first.contains_key(&byte);
    let others: Vec<(u8, u8)> =
        (0x20..0x80).filter(|&byte| byte != b'"' && byte != b'\\' && !taken(byte)).map(|byte| (byte, byte)).collect();
    let other = b.add(super::Node::Bytes(others));
    options.push(b.sequence([other, free]));
    // A name with a wide character here takes all of them: rather too few names than a wrong one.
    if !by_first.keys().any(|byte| *byte >= 0x80) {
        options.push(b.sequence([wide, free]));
    }
    for (first, rest) in by_first {
        if first != b'"' && first != b'\\' {
            let byte = b.text([first]);
            let after = other_than(b, &rest, (free, wide, quote))?;
            options.push(b.sequence([byte, after]));
        }
    }
    Some(b.choice(options))
}
