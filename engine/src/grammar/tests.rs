use std::sync::Arc;

use super::*;
use crate::sampling::Sampling;

fn matcher(grammar: Grammar) -> Matcher {
    Matcher::new(Arc::new(Grammar::from_bytes(&grammar.to_bytes().unwrap()).unwrap())).unwrap()
}

fn whole(grammar: &Grammar, text: &str) -> bool {
    let mut matcher = matcher(grammar.clone());
    matcher.accept(text.as_bytes()).unwrap() && matcher.is_complete()
}

#[track_caller]
fn check(schema: &str, yes: &[&str], no: &[&str]) {
    let grammar = from_schema(&Json::parse(schema).unwrap()).unwrap();
    for text in yes {
        assert!(whole(&grammar, text), "{schema} must allow {text}");
        serde_json::from_str::<serde_json::Value>(text).expect("an example is JSON");
    }
    for text in no {
        assert!(!whole(&grammar, text), "{schema} must not allow {text}");
    }
}

#[test]
fn schemas_allow_what_is_valid_and_nothing_else() {
    check(
        "{}",
        &["1", "null", "[]", r#"{"a": [true,{}]}"#, r#""\u00e9é""#, "-0.5e-3"],
        &["", "[1", "01", "{a:1}", "\"\n\""],
    );
    check(r#"{"type":"object"}"#, &["{}", r#"{"a":1,"b":2}"#], &["[]", "1", "{}{}"]);
    check(
        r#"{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}},"required":["b","a"],"additionalProperties":false}"#,
        &[r#"{"b":1,"a":"x"}"#, r#"{"b": -12, "a": ""}"#],
        &[r#"{"a":"x","b":1}"#, r#"{"b":1}"#, r#"{"b":1,"a":"x","c":1}"#, r#"{"b":1.5,"a":"x"}"#],
    );
    check(
        r#"{"properties":{"a":{"const":1},"b":{"const":2},"c":{"const":3}},"required":["b"]}"#,
        &[r#"{"b":2}"#, r#"{"a":1,"b":2}"#, r#"{"b":2,"c":3}"#, r#"{"a":1,"b":2,"c":3}"#],
        &["{}", r#"{"a":1}"#, r#"{,"b":2}"#, r#"{"b":2,}"#],
    );
    check(
        r#"{"properties":{"ab":{"const":1}},"additionalProperties":{"type":"boolean"}}"#,
        &["{}", r#"{"ab":1}"#, r#"{"ab":1,"a":true,"abc":false,"x":true}"#, r#"{"":true}"#],
        &[r#"{"ab":true}"#, r#"{"ab":1,"ab":true}"#, r#"{"x":1}"#, r#"{"\u0061b":true}"#],
    );
    check(r#"{"enum":["a",1,null,{"k":[1]}]}"#, &["\"a\"", "1", "null", r#"{"k":[1]}"#], &["2", "\"b\""]);
    check(r#"{"anyOf":[{"type":"string"},{"type":"null"}]}"#, &["null", "\"x\""], &["1"]);
    check(r#"{"type":["integer","null"]}"#, &["null", "7"], &["\"x\""]);
    check(
        r#"{"type":"array","items":{"type":"integer"},"minItems":1,"maxItems":3}"#,
        &["[1]", "[1,2, 3]"],
        &["[]", "[1,2,3,4]", "[\"a\"]"],
    );
    check(r#"{"prefixItems":[{"const":1},{"const":2}]}"#, &["[1,2]"], &["[1]", "[1,2,3]"]);
    check(r#"{"type":"string","minLength":2,"maxLength":3}"#, &["\"ab\"", "\"é€x\""], &["\"a\"", "\"abcd\""]);
    check(
        r#"{"type":"integer","minimum":-5,"exclusiveMaximum":121}"#,
        &["-5", "0", "9", "99", "100", "120"],
        &["-6", "121", "999", "01", "-0"],
    );
    check(
        r#"{"type":"integer","minimum":13,"maximum":2047}"#,
        &["13", "99", "100", "2000", "2047"],
        &["12", "2048", "3000", "9999", "0"],
    );
    check(r#"{"type":"string","format":"date"}"#, &["\"2026-11-22\""], &["\"2026-13-22\"", "\"x\""]);
    check(r#"{"type":"string","format":"never-heard-of"}"#, &["\"x\""], &["1"]);
}

#[test]
fn references_may_be_recursive() {
    check(
        r##"{"$ref":"#/$defs/node","$defs":{"node":{"type":"object","properties":{"v":{"type":"integer"},"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["v","next"]}}}"##,
        &[r#"{"v":1,"next":null}"#, r#"{"v":1,"next":{"v":2,"next":null}}"#],
        &[r#"{"v":1}"#, r#"{"v":1,"next":{"v":2}}"#],
    );
    let deep = "[".repeat(5_000);
    let grammar = from_schema(&Json::parse("{}").unwrap()).unwrap();
    assert!(!whole(&grammar, &deep), "nesting is bounded, and so is the stack");
}

#[test]
fn patterns_match_as_they_are_written() {
    check(r#"{"pattern":"^[A-Z]{2,3}-\\d+$"}"#, &["\"AB-1\"", "\"ABC-123\""], &["\"A-1\"", "\"AB-\"", "\"xAB-1\""]);
    check(r#"{"pattern":"b"}"#, &["\"b\"", "\"abc\""], &["\"ac\""]);
    check(
        r#"{"pattern":"^(a|bc)*\\.[^\\d\"]?$"}"#,
        &["\".\"", "\"abca.x\"", "\".\u{e9}\"", "\"a.\\\\\""],
        &["\"abca.5\"", "\"ab.\"", "\"a.\\\"\""],
    );
    check(r#"{"pattern":"^[äö]\\s$"}"#, &["\"ä \"", "\"ö\\n\""], &["\"ü \""]);
}

#[test]
fn what_cannot_be_held_is_named_by_its_path() {
    for (schema, path) in [
        (r#"{"properties":{"a":{"not":{}}}}"#, "/properties/a/not"),
        (r#"{"items":{"type":"number","minimum":1}}"#, "/items/minimum"),
        (r#"{"anyOf":[{},{"type":"strange"}]}"#, "/anyOf/1/type"),
        (r##"{"$ref":"#/$defs/x"}"##, "/$ref"),
        (r##"{"properties":{"a/b":{"$ref":"http://x"}}}"##, "/properties/a~1b/$ref"),
        (r#"{"pattern":"(?<n>a)"}"#, "/pattern"),
        (r#"{"pattern":"a**"}"#, "/pattern"),
        (r#"{"required":["a"]}"#, "/required"),
        (r#"{"minLength":-1}"#, "/minLength"),
        (r#"{"items":{"type":"integer","minimum":3,"maximum":2}}"#, "/items/minimum"),
        (r#"{"uniqueItems":true,"items":{}}"#, "/uniqueItems"),
        (r##"{"$ref":"#"}"##, ""),
        ("3", ""),
    ] {
        let error = from_schema(&Json::parse(schema).unwrap()).expect_err(schema);
        assert_eq!(error.path, path, "{schema}: {error}");
    }
}

/// Where other names may stand beside those that are named, each byte of these is a step down: a schema must not take the
/// stack of whoever compiles it, nor the memory.
#[test]
fn schemas_of_long_or_many_names_are_refused() {
    let compile = |names: &[String], rest: &str| {
        let members: Vec<String> = names.iter().map(|name| format!("\"{name}\":{{}}")).collect();
        let schema = format!("{{\"properties\":{{{}}}{rest}}}", members.join(","));
        from_schema(&Json::parse(&schema).unwrap()).map_err(|error| error.path)
    };
    let others = ",\"additionalProperties\":true";
    let long = ["a".repeat(100_000)];
    assert_eq!(compile(&long, others), Err("/additionalProperties".to_owned()));
    assert!(compile(&long, "").is_ok(), "alone it is a text");
    assert!(compile(&["a".repeat(200)], others).is_ok());
    let many: Vec<String> = (0..500).map(|n| format!("{n}-").repeat(40)).collect();
    assert_eq!(compile(&many, others), Err("/additionalProperties".to_owned()));
    assert!(compile(&many, "").is_ok());
    // Each required name is looked up among all.
    let many: Vec<String> = (0..2_000).map(|n| n.to_string()).collect();
    let required = many.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(",");
    assert!(compile(&many, &format!(",\"required\":[{required}]")).is_ok());
    assert_eq!(compile(&many, ",\"required\":[\"x\"]"), Err("/required".to_owned()));
}

#[test]
fn hostile_grammars_are_refused_or_stopped() {
    let sequence = |parts: &[NodeId]| Node::Sequence(parts.to_vec());
    let repeat = |node| Node::Repeat { node, min: 0, max: None };
    let a = Node::Text(b"a".to_vec());
    for (nodes, expect) in [
        (vec![sequence(&[0])], GrammarError::LeftRecursion { node: 0 }),
        (vec![sequence(&[1, 0]), repeat(2), a.clone()], GrammarError::LeftRecursion { node: 0 }),
        (vec![repeat(1), repeat(2), a.clone()], GrammarError::EmptyRepeat { node: 0 }),
        (vec![sequence(&[9])], GrammarError::NoSuchNode { node: 0 }),
        (vec![a.clone(); MAX_NODES + 1], GrammarError::TooLarge),
    ] {
        assert_eq!(Grammar { nodes, root: 0 }.check(), Err(expect));
    }
    assert!(Grammar::from_bytes(&[0xff, 0, 1]).is_err());
    // Every split of a run of a's is another reading: places that are equal must be one.
    let mut b = Builder::default();
    let (a, again) = (b.text("a"), b.reserve());
    let one = b.sequence([a, again]);
    let two = b.sequence([a, again, again]);
    let empty = b.text("");
    let all = b.choice([one, two, empty]);
    b.fill(again, all);
    let mut hostile = matcher(b.finish(again).unwrap());
    let outcome = hostile.accept(&[b'a'; 4_000]);
    assert!(matches!(outcome, Ok(_) | Err(Overrun)), "bounded either way");
}

/// What a request's frame can carry is checked in the time of its length, and run in bounded memory and time.
#[test]
fn wide_grammars_are_checked_quickly_and_stopped_early() {
    let repeat = |node, min| Node::Repeat { node, min, max: None };
    let (a, empty) = (Node::Text(b"a".to_vec()), Node::Text(Vec::new()));
    let nodes = vec![
        Node::Sequence(vec![1, 2]),
        empty.clone(),
        repeat(3, 0),
        a,
        Node::Choice(vec![3, 1, 1]),
        Node::Sequence(vec![4, 3]),
        repeat(1, 2),
        Node::Choice(Vec::new()),
        Node::Sequence(vec![8]),
    ];
    let found = Grammar { nodes, root: 0 }.may_be_empty();
    assert_eq!(found, [true, true, true, false, true, false, true, false, false]);
    // Each node begins with the one before it.
    let chain = (1..MAX_NODES as NodeId).map(|at| Node::Choice(vec![at - 1]));
    let chain = Grammar { nodes: std::iter::once(empty.clone()).chain(chain).collect(), root: MAX_NODES as NodeId - 1 };
    assert!(chain.check().is_ok() && chain.may_be_empty().iter().all(|empty| *empty));
    // Each part of a long sequence may be empty, in as many ways.
    let nodes = vec![Node::Sequence(vec![1; 60_000]), Node::Choice(vec![2; 60_000]), empty];
    let wide = Grammar::from_bytes(&minicbor::to_vec(Grammar { nodes, root: 0 }).unwrap()).unwrap();
    assert_eq!(Matcher::new(Arc::new(wide)).err(), Some(Overrun));
    // Hundreds of ways to read each byte: few bytes are followed, and many are not.
    let mut nodes = vec![repeat(1, 0), Node::Choice((2..202).collect())];
    nodes.extend(vec![Node::Bytes(vec![(b'a', b'a')]); 200]);
    let mut vague = matcher(Grammar { nodes, root: 0 });
    assert_eq!(vague.accept(b"a"), Ok(true));
    assert_eq!(vague.accept(&[b'a'; 64]), Err(Overrun));
}

#[test]
fn what_is_resumed_must_follow_the_grammar() {
    let mut b = Builder::default();
    let (a, end) = (b.text("a"), b.text("."));
    let many = b.repeat(a, 1, None);
    let root = b.sequence([many, end]);
    let grammar = b.finish(root).unwrap();
    let pieces = ["a", ".", "b", ""].map(|piece| piece.as_bytes().to_vec());
    let vocabulary = Arc::new(Vocabulary::new(pieces.into_iter(), &[3]));
    let cases: [(&[u32], bool); 5] =
        [(&[], true), (&[0; 10_000], true), (&[0, 1, 3], true), (&[0, 2], false), (&[0, 3], false)];
    for (tokens, expect) in cases {
        let mut constraint = Constraint::new(&grammar, vocabulary.clone()).unwrap();
        assert_eq!(constraint.resume(tokens), Ok(expect), "{} tokens", tokens.len());
    }
}

#[test]
fn a_vocabulary_gives_exactly_what_is_allowed() {
    let words = ["", "{", "}", "\"", "a", "\"a", "\"a\"", "\"a\":", ":", "1", "12", " ", "{\"", "{\"a\": 1}", "{\"b\""];
    let vocabulary = Vocabulary::new(words.iter().map(|word| word.as_bytes().to_vec()), &[]);
    let schema = r#"{"properties":{"a":{"type":"integer"}},"required":["a"]}"#;
    let mut m = matcher(from_schema(&Json::parse(schema).unwrap()).unwrap());
    for step in ["", "{", "\"a\":", "1"] {
        assert!(m.accept(step.as_bytes()).unwrap());
        let mut allowed = Vec::new();
        vocabulary.allowed(&m, |token| allowed.push(token as usize)).unwrap();
        allowed.sort_unstable();
        let expect: Vec<usize> =
            (0..words.len()).filter(|&at| !words[at].is_empty() && m.allows(words[at].as_bytes()).unwrap()).collect();
        assert_eq!(allowed, expect, "after {step:?}");
    }
    assert!(!m.is_complete());
    assert!(m.accept(b"}").unwrap() && m.is_over());
}

/// Random logits under a grammar: always a valid text, the same one for the same seed, and resumable anywhere.
#[test]
fn constrained_draws_are_valid_and_fixed_by_seed_and_position() {
    let mut pieces: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    pieces.extend([b"{\"".to_vec(), b"\": ".to_vec(), b"true".to_vec(), Vec::new()]);
    let eog = [259];
    let vocabulary = Arc::new(Vocabulary::new(pieces.iter().cloned(), &eog));
    let schema = r#"{"properties":{"n":{"type":"integer"},"s":{"type":"string","maxLength":5}},"required":["n","s"]}"#;
    let grammar = from_schema(&Json::parse(schema).unwrap()).unwrap();
    let logits = |at: usize| -> Vec<f32> {
        (0..pieces.len()).map(|token| ((token * 7919 + at * 104_729) % 1_009) as f32 / 100.0).collect()
    };
    for seed in 0..20 {
        let sampling = Sampling::seeded(if seed % 2 == 0 { 0.0 } else { 1.3 }, seed);
        let run = |given: &[u32]| {
            let mut constraint = Constraint::new(&grammar, vocabulary.clone()).unwrap();
            let mut output = given.to_vec();
            assert!(constraint.resume(given).unwrap());
            while !constraint.is_over() && output.len() < 200 {
                let token = constraint.draw(&logits(output.len()), &output, &sampling, output.len() as u32).unwrap();
                let token = token.unwrap();
                assert!(constraint.accept(token).unwrap());
                output.push(token);
            }
            output
        };
        let output = run(&[]);
        let text: Vec<u8> = output.iter().flat_map(|token| pieces[*token as usize].clone()).collect();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert!(value["n"].is_i64() && value["s"].is_string(), "{value}");
        assert_eq!(run(&output[..output.len() / 2]), output, "resumed in the middle");
    }
}
