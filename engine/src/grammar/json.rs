//! The pieces that JSON is made of, as grammar nodes.
//!
//! Answers are compact but for one optional space after a comma or colon, so that no model can fill its output with
//! white space for ever.

use super::{Builder, Grammar, GrammarError, NodeId};

/// Any JSON object: `response_format: json_object`.
pub fn any_object() -> Result<Grammar, GrammarError> {
    let mut b = Builder::default();
    let mut parts = Parts::default();
    let root = parts.any_object(&mut b);
    b.finish(root)
}

/// Shared nodes, made when first asked for.
#[derive(Debug, Default)]
pub(super) struct Parts {
    value: Option<NodeId>,
}

impl Parts {
    pub(super) fn space(&self, b: &mut Builder) -> NodeId {
        let space = b.text(" ");
        b.repeat(space, 0, Some(1))
    }

    pub(super) fn comma(&self, b: &mut Builder) -> NodeId {
        let (comma, space) = (b.text(","), self.space(b));
        b.sequence([comma, space])
    }

    pub(super) fn colon(&self, b: &mut Builder) -> NodeId {
        let (colon, space) = (b.text(":"), self.space(b));
        b.sequence([colon, space])
    }

    /// A string with so many characters.
    pub(super) fn string(&self, b: &mut Builder, min: u32, max: Option<u32>) -> NodeId {
        let character = self.character(b);
        let quote = b.text("\"");
        let body = b.repeat(character, min, max);
        b.sequence([quote, body, quote])
    }

    /// One character inside quotes: plain, or escaped as JSON writes it.
    pub(super) fn character(&self, b: &mut Builder) -> NodeId {
        let plain = b.add(super::Node::Bytes(vec![(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)]));
        let wide = wide(b);
        let escape = b.text("\\");
        let simple = b.add(super::Node::Bytes(vec![
            (b'"', b'"'),
            (b'/', b'/'),
            (b'\\', b'\\'),
            (b'b', b'b'),
            (b'f', b'f'),
            (b'n', b'n'),
            (b'r', b'r'),
            (b't', b't'),
        ]));
        let hex = b.add(super::Node::Bytes(vec![(b'0', b'9'), (b'A', b'F'), (b'a', b'f')]));
        // Not D8 to DF: half of a pair alone is no character, and readers refuse it.
        let below_d =
            b.add(super::Node::Bytes(vec![(b'0', b'9'), (b'A', b'C'), (b'E', b'F'), (b'a', b'c'), (b'e', b'f')]));
        let d = b.add(super::Node::Bytes(vec![(b'D', b'D'), (b'd', b'd')]));
        let low = b.add(super::Node::Bytes(vec![(b'0', b'7')]));
        let u = b.text("u");
        let most = b.sequence([below_d, hex, hex, hex]);
        let rest = b.sequence([d, low, hex, hex]);
        let code = b.choice([most, rest]);
        let unicode = b.sequence([u, code]);
        let escaped = b.choice([simple, unicode]);
        let escaped = b.sequence([escape, escaped]);
        b.choice([plain, wide, escaped])
    }

    pub(super) fn integer(&self, b: &mut Builder) -> NodeId {
        let minus = b.text("-");
        let sign = b.repeat(minus, 0, Some(1));
        let natural = self.natural(b);
        b.sequence([sign, natural])
    }

    /// 0, or up to 16 digits: what a double still counts.
    fn natural(&self, b: &mut Builder) -> NodeId {
        let zero = b.text("0");
        let first = b.add(super::Node::Bytes(vec![(b'1', b'9')]));
        let digit = digit(b);
        let more = b.repeat(digit, 0, Some(15));
        let positive = b.sequence([first, more]);
        b.choice([zero, positive])
    }

    pub(super) fn number(&self, b: &mut Builder) -> NodeId {
        let integer = self.integer(b);
        let digit = digit(b);
        let digits = b.repeat(digit, 1, Some(16));
        let point = b.text(".");
        let fraction = b.sequence([point, digits]);
        let fraction = b.repeat(fraction, 0, Some(1));
        let e = b.add(super::Node::Bytes(vec![(b'E', b'E'), (b'e', b'e')]));
        let sign = b.add(super::Node::Bytes(vec![(b'+', b'+'), (b'-', b'-')]));
        let sign = b.repeat(sign, 0, Some(1));
        // Beyond 99 lies nothing that a double holds well.
        let power = b.repeat(digit, 1, Some(2));
        let exponent = b.sequence([e, sign, power]);
        let exponent = b.repeat(exponent, 0, Some(1));
        b.sequence([integer, fraction, exponent])
    }

    pub(super) fn boolean(&self, b: &mut Builder) -> NodeId {
        let (yes, no) = (b.text("true"), b.text("false"));
        b.choice([yes, no])
    }

    /// `open (item (, item)*)? close`
    pub(super) fn list(&self, b: &mut Builder, open: &str, item: NodeId, close: &str) -> NodeId {
        self.list_between(b, open, item, close, 0, None)
    }

    pub(super) fn list_between(
        &self,
        b: &mut Builder,
        open: &str,
        item: NodeId,
        close: &str,
        min: u32,
        max: Option<u32>,
    ) -> NodeId {
        let (open, close, comma) = (b.text(open), b.text(close), self.comma(b));
        if max == Some(0) {
            return b.sequence([open, close]);
        }
        let next = b.sequence([comma, item]);
        let more = b.repeat(next, min.saturating_sub(1), max.map(|max| max.saturating_sub(1)));
        let some = b.sequence([item, more]);
        let inner = if min == 0 { b.repeat(some, 0, Some(1)) } else { some };
        b.sequence([open, inner, close])
    }

    /// Any JSON value.
    pub(super) fn value(&mut self, b: &mut Builder) -> NodeId {
        if let Some(value) = self.value {
            return value;
        }
        let value = b.reserve();
        self.value = Some(value);
        let object = self.any_object(b);
        let array = self.list(b, "[", value, "]");
        let (string, number, boolean, null) =
            (self.string(b, 0, None), self.number(b), self.boolean(b), b.text("null"));
        let all = b.choice([object, array, string, number, boolean, null]);
        b.fill(value, all);
        value
    }

    pub(super) fn any_object(&mut self, b: &mut Builder) -> NodeId {
        let value = self.value(b);
        self.map_of(b, value)
    }

    /// An object with any names and values of one kind.
    pub(super) fn map_of(&self, b: &mut Builder, value: NodeId) -> NodeId {
        let (key, colon) = (self.string(b, 0, None), self.colon(b));
        let member = b.sequence([key, colon, value]);
        self.list(b, "{", member, "}")
    }
}

pub(super) fn digit(b: &mut Builder) -> NodeId {
    b.add(super::Node::Bytes(vec![(b'0', b'9')]))
}

/// One character of UTF-8 beyond ASCII: no overlong forms, no halves of pairs, nothing above U+10FFFF.
pub(super) fn wide(b: &mut Builder) -> NodeId {
    let tail = b.add(super::Node::Bytes(vec![(0x80, 0xBF)]));
    const ANY: (u8, u8) = (0x80, 0xBF);
    let mut all = Vec::new();
    // The first byte, the second, and how many follow.
    for (first, second, more) in [
        ((0xC2, 0xDF), ANY, 0),
        ((0xE0, 0xE0), (0xA0, 0xBF), 1),
        ((0xE1, 0xEC), ANY, 1),
        ((0xED, 0xED), (0x80, 0x9F), 1),
        ((0xEE, 0xEF), ANY, 1),
        ((0xF0, 0xF0), (0x90, 0xBF), 2),
        ((0xF1, 0xF3), ANY, 2),
        ((0xF4, 0xF4), (0x80, 0x8F), 2),
    ] {
        let mut parts = vec![b.add(super::Node::Bytes(vec![first])), b.add(super::Node::Bytes(vec![second]))];
        parts.extend(std::iter::repeat_n(tail, more));
        all.push(b.sequence(parts));
    }
    b.choice(all)
}
