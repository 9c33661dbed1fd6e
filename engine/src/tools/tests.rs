use super::*;
use crate::grammar::Matcher;
use std::sync::Arc;

fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut all: Vec<Part> = Vec::new();
    for part in parts {
        match (all.last_mut(), part) {
            (Some(Part::Text(a)), Part::Text(b))
            | (Some(Part::Reasoning(a)), Part::Reasoning(b))
            | (Some(Part::Arguments(a)), Part::Arguments(b)) => a.push_str(&b),
            (_, part) => all.push(part),
        }
    }
    all
}

/// However the text is cut, the parts are the same.
#[track_caller]
fn check(style: Style, thinks: bool, begun: Option<&str>, text: &str, expect: &[Part]) {
    for size in [1, 2, 3, 7, 1000] {
        let mut reader = Reader::new(style, vec!["f".into(), "g".into()], thinks, begun);
        let letters: Vec<char> = text.chars().collect();
        let mut parts: Vec<Part> =
            letters.chunks(size).flat_map(|chunk| reader.push(&chunk.iter().collect::<String>())).collect();
        parts.extend(reader.finish());
        assert_eq!(joined(parts), expect, "{style:?}, cut by {size}: {text}");
    }
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

fn call(name: &str, arguments: &str) -> [Part; 2] {
    [Part::Call(name.into()), Part::Arguments(arguments.into())]
}

#[test]
fn calls_are_found_in_every_style_however_the_text_is_cut() {
    let f = call("f", r#"{"a": "}\"{"}"#);
    let g = call("g", "{}");
    let both: Vec<Part> = f.iter().chain(&g).cloned().collect();
    let said: Vec<Part> = std::iter::once(text("Let me see. ")).chain(f.clone()).collect();
    let (a, b) = (r#"{"name": "f", "arguments": {"a": "}\"{"}}"#, r#"{"name":"g","arguments":{}}"#);
    let hermes = format!("<tool_call>\n{a}\n</tool_call>\n<tool_call>\n{b}\n</tool_call>");
    check(Style::Hermes, false, None, &hermes, &both);
    check(Style::Hermes, false, None, &format!("Let me see. <tool_call>{a}</tool_call>"), &said);
    check(Style::Hermes, false, Some("<tool_call>\n"), &format!("{a}\n</tool_call>"), &f);
    check(Style::Hermes, false, None, r#"<tool_call>{"arguments": {}, "name": "g"}</tool_call>"#, &g);
    check(Style::Hermes, false, None, "<tool_call>what</tool_call> a<b", &[text("<tool_call>what</tool_call> a<b")]);
    check(Style::Mistral, false, None, &format!("[TOOL_CALLS][{a}, {b}]"), &both);
    check(Style::Mistral, false, None, r#"[TOOL_CALLS]f[ARGS]{"a": "}\"{"}"#, &f);
    let (a, b) = (a.replace("arguments", "parameters"), b.replace("arguments", "parameters"));
    check(Style::Llama, false, None, &format!("{a}; {b}"), &both);
    check(Style::Llama, false, None, &format!("<|python_tag|>{a}"), &f);
    check(Style::Llama, false, None, r#"{"name": "f", "arguments": {"a": "}\"{"}}"#, &f);
    check(Style::Hermes, false, None, r#"<tool_call>{"name": "g", "parameters": {}}</tool_call>"#, &g);
    check(Style::Gemma, false, None, &format!("```json\n{a}\n```"), &f);
    check(Style::Llama, false, None, r#"{"answer": 42}"#, &[text(r#"{"answer": 42}"#)]);
    check(Style::Gemma, false, None, "```rust\nfn f() {}\n```", &[text("```rust\nfn f() {}\n```")]);
    check(
        Style::Llama,
        false,
        None,
        r#"{"name": "unknown", "parameters": {}}"#,
        &[text(r#"{"name": "unknown", "parameters": {}}"#)],
    );
}

#[test]
fn a_head_of_any_characters_is_read() {
    // A character of several bytes where the name of the arguments should be.
    for other in ["\u{e9}", "\"\u{e9}", "\u{1F600}"] {
        let said = format!("{{\"name\": \"f\", {other}\": {{}}}}");
        check(Style::Llama, false, None, &said, &[text(&said)]);
        let said = format!("<tool_call>{said}</tool_call>");
        check(Style::Hermes, false, None, &said, &[text(&said)]);
    }
}

#[test]
fn thinking_is_told_apart() {
    let thought = |words: &str| Part::Reasoning(words.into());
    check(Style::Hermes, true, None, "<think>\nhm\n</think>\n\nyes", &[thought("hm\n"), text("yes")]);
    check(Style::Hermes, true, Some(THINK), "hm</think>yes", &[thought("hm"), text("yes")]);
    check(Style::Hermes, true, None, "a <think> b", &[text("a <think> b")]);
    check(Style::Hermes, false, None, "<think>hm</think>", &[text("<think>hm</think>")]);
    let mut with_call = vec![thought("hm")];
    with_call.extend(call("g", "{}"));
    check(
        Style::Hermes,
        true,
        None,
        "<think>hm</think>\n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>",
        &with_call,
    );
}

#[test]
fn what_a_forced_call_may_say_is_read_as_that_call() {
    let schema = Json::parse(r#"{"properties":{"a":{"type":"integer"}},"required":["a"]}"#).unwrap();
    let none = Json::parse("{}").unwrap();
    let tools = [Signature { name: "f", parameters: &schema }, Signature { name: "g", parameters: &none }];
    for style in [Style::Hermes, Style::Mistral, Style::Llama, Style::Gemma] {
        let grammar = forced(style, &tools, false).unwrap();
        let said = style.written("f", r#"{"a": 1}"#);
        let said = said.strip_prefix(style.begun()).unwrap();
        let mut matcher = Matcher::new(Arc::new(grammar)).unwrap();
        assert!(matcher.accept(said.as_bytes()).unwrap() && matcher.is_over(), "{style:?}: {said}");
        let begun = (!style.begun().is_empty()).then_some(style.begun());
        check(style, false, begun, said, &call("f", r#"{"a": 1}"#));
    }
    let bad = Json::parse(r#"{"properties":{"a":{"not":{}}}}"#).unwrap();
    let tools = [tools[0].clone(), Signature { name: "g", parameters: &bad }];
    let (at, error) = forced(Style::Hermes, &tools, true).unwrap_err();
    assert_eq!((at, error.path.as_str()), (1, "/properties/a/not"));
}

#[test]
fn styles_are_known_by_their_templates() {
    for (template, style) in [
        ("{{ '<tool_call>' }}", Style::Hermes),
        ("[TOOL_CALLS]", Style::Mistral),
        ("<|start_header_id|>", Style::Llama),
        ("<start_of_turn>", Style::Gemma),
        ("plain", Style::Hermes),
    ] {
        assert_eq!(Style::of(Some(template)), style);
    }
}
