//! Cases for the parser: what is refused and how it is named, and what comes through.

use satgrid_types::{Msat, MsatPerMtok, Sampling};
use serde_json::{Value, json};

use super::*;
use crate::service::{MaxPrice, MaxPriceUsd, Message, Role, Routing, RoutingSort};

const SEED: u64 = 7;

/// The smallest good chat request with `extra` laid over it.
fn with(extra: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn parse(body: &Value) -> Result<Parsed, ApiError> {
    completion(Flavour::Chat, body.to_string().as_bytes(), SEED)
}

/// `(code, param)` of the refusal.
fn refused(flavour: Flavour, body: &str) -> (String, Option<String>, String) {
    let error = completion(flavour, body.as_bytes(), SEED).expect_err(body);
    assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body}");
    let error: Value = serde_json::to_value(&*error.body).unwrap();
    let text = |field: &str| error[field].as_str().map(str::to_owned);
    (text("code").unwrap(), text("param"), text("message").unwrap())
}

fn check_refused(extra: Value, code: &str, param: &str) {
    let body = with(extra).to_string();
    let (got_code, got_param, message) = refused(Flavour::Chat, &body);
    assert_eq!((got_code.as_str(), got_param.as_deref()), (code, Some(param)), "{body}");
    let leaf = param.rsplit('.').next().unwrap();
    assert!(message.contains(leaf) || leaf.contains("role"), "{message:?} does not name {param}");
}

#[test]
fn a_long_prompt_is_not_copied_for_many_replies() {
    let long = |n: u32| with(json!({"messages": [{"role": "user", "content": "x".repeat(1 << 20)}], "n": n}));
    let (code, param, _) = refused(Flavour::Chat, &long(32).to_string());
    assert_eq!((code.as_str(), param.as_deref()), ("invalid_value", Some("n")));
    for n in [1, 8] {
        assert_eq!(parse(&long(n)).unwrap().others.len() + 1, n as usize);
    }
}

#[test]
fn what_is_refused_is_named() {
    let (bad, kind, unsupported) = ("invalid_value", "invalid_type", "unsupported_parameter");
    for (extra, code, param) in [
        (json!({"model": null}), "missing_required_parameter", "model"),
        (json!({"model": 3}), kind, "model"),
        (json!({"model": ""}), bad, "model"),
        (json!({"model": "x".repeat(257)}), bad, "model"),
        (json!({"messages": null}), "missing_required_parameter", "messages"),
        (json!({"messages": []}), bad, "messages"),
        (json!({"messages": "hi"}), kind, "messages"),
        (json!({"messages": ["hi"]}), kind, "messages[0]"),
        (json!({"messages": [{"content": "hi"}]}), "missing_required_parameter", "messages[0].role"),
        (json!({"messages": [{"role": "king", "content": "hi"}]}), bad, "messages[0].role"),
        (
            json!({"messages": [{"role": "tool", "content": "hi"}]}),
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (json!({"messages": [{"role": "user"}]}), "missing_required_parameter", "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 1}]}), kind, "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": []}]}), bad, "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}),
            unsupported,
            "messages[0].content[1].type",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
        ),
        (json!({"n": 33}), bad, "n"),
        (json!({"n": 0}), bad, "n"),
        (json!({"tools": [{"type": "function"}]}), "missing_required_parameter", "tools[0].function"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), bad, "tools[0].function.name"),
        (json!({"tool_choice": "required"}), bad, "tool_choice"),
        (json!({"logprobs": 3}), kind, "logprobs"),
        (json!({"top_logprobs": 3}), bad, "top_logprobs"),
        (json!({"response_format": {"type": "xml"}}), bad, "response_format.type"),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (json!({"response_format": "text"}), kind, "response_format"),
        (json!({"modalities": ["text", "audio"]}), unsupported, "modalities"),
        (json!({"stream": 1}), kind, "stream"),
        (json!({"stream_options": {"include_usage": true}}), bad, "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": "yes"}}), kind, "stream_options.include_usage"),
        (json!({"temperature": 2.1}), bad, "temperature"),
        (json!({"temperature": -0.1}), bad, "temperature"),
        (json!({"temperature": "hot"}), kind, "temperature"),
        (json!({"top_p": 1.5}), bad, "top_p"),
        (json!({"top_k": -2}), bad, "top_k"),
        (json!({"top_k": 1.5}), bad, "top_k"),
        (json!({"presence_penalty": -2.5}), bad, "presence_penalty"),
        (json!({"repeat_penalty": 0}), bad, "repeat_penalty"),
        (json!({"seed": 1.5}), kind, "seed"),
        (json!({"logit_bias": {"1": 101}}), bad, "logit_bias"),
        (json!({"logit_bias": {"one": 1}}), bad, "logit_bias"),
        (json!({"logit_bias": {"7": 1, "07": 2}}), bad, "logit_bias"),
        (json!({"logit_bias": [1]}), kind, "logit_bias"),
        (json!({"max_tokens": 0}), bad, "max_tokens"),
        (json!({"max_tokens": -1}), bad, "max_tokens"),
        (json!({"max_tokens": 1u64 << 40}), bad, "max_tokens"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), bad, "max_tokens"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), bad, "stop"),
        (json!({"stop": ""}), bad, "stop"),
        (json!({"stop": ["a", 1]}), kind, "stop[1]"),
        (json!({"models": vec!["x"; 9]}), bad, "models"),
        (json!({"provider": {"sort": "colour"}}), bad, "provider.sort"),
        (json!({"provider": {"only": "me"}}), kind, "provider.only"),
        (json!({"provider": {"data_collection": "deny"}}), unsupported, "provider.data_collection"),
        (json!({"provider": {"zdr": true}}), unsupported, "provider.zdr"),
        (json!({"provider": {"max_price": {"image": 1}}}), unsupported, "provider.max_price.image"),
        (json!({"provider": {"max_price": {"request_msat": -1}}}), bad, "provider.max_price.request_msat"),
        (json!({"provider": {"max_price": {"request_msat": "-1"}}}), bad, "provider.max_price.request_msat"),
        (json!({"provider": {"max_price": {"prompt": "cheap"}}}), kind, "provider.max_price.prompt"),
        (json!({"provider": {"max_price": {"prompt": "NaN"}}}), kind, "provider.max_price.prompt"),
        (json!({"provider": {"max_price": "5"}}), kind, "provider.max_price"),
    ] {
        check_refused(extra, code, param);
    }
}

#[test]
fn malformed_json_is_located() {
    for (body, place) in [
        ("", "the body is empty"),
        ("{\n  \"model\": \"m\",\n  oops\n}", "line 3, column 3"),
        ("{\"model\": \"m\"", "line 1, column 13"),
        ("{\"model\": \"\\ud800\"}", "line 1, column 18"),
        ("{} {}", "line 1, column 4"),
        ("\u{feff}{}", "line 1, column 1"),
    ] {
        let (code, param, message) = refused(Flavour::Chat, body);
        assert_eq!((code.as_str(), param), ("invalid_json", None), "{body:?}");
        assert!(message.contains(place), "{body:?}: {message}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(refused(Flavour::Chat, &deep).0, "invalid_json");
    assert_eq!(refused(Flavour::Chat, "[]").0, "invalid_type");
}

#[test]
fn what_clients_send_and_means_nothing_is_left_alone() {
    let body = with(json!({
        "n": 1, "tools": [], "tool_choice": "auto", "logprobs": false, "top_logprobs": 0, "user": "me", "store": true,
        "metadata": {"a": "b"}, "response_format": {"type": "text"}, "service_tier": "auto", "stream_options": null,
        "temperature": null, "parallel_tool_calls": true, "unheard_of": {"x": [1]}, "provider": {"require_parameters": true}
    }));
    let parsed = parse(&body).unwrap();
    assert!(!parsed.stream && !parsed.include_usage);
    let sampling = Sampling { temperature_micro: 1_000_000, seed: SEED, ..Sampling::default() };
    let messages = vec![Message {
        role: Role::User,
        content: "hi".into(),
        name: None,
        tool_calls: Vec::new(),
        tool_call_id: None,
    }];
    assert_eq!(
        parsed.request,
        CompletionRequest {
            model: "m".into(),
            fallback_models: vec![],
            prompt: Prompt::Messages(messages),
            sampling,
            stop: vec![],
            max_tokens: None,
            format: Format::Text,
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            top_logprobs: None,
            routing: Routing::default(),
        }
    );
}

#[test]
fn everything_that_is_set_comes_through() {
    let body = json!({
        "model": "a/b", "models": ["a/b", "c"],
        "messages": [
            {"role": "developer", "content": "be brief", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "", "tool_calls": []}
        ],
        "stream": true, "stream_options": {"include_usage": true},
        "temperature": 0.7, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "presence_penalty": -1.5, "frequency_penalty": 0.1,
        "repeat_penalty": 1.1, "logit_bias": {"9": -100, "2": 0.5}, "seed": -1, "stop": "END", "max_completion_tokens": 5.0,
        "provider": {
            "order": ["p1"], "only": ["p1", "p2"], "ignore": ["p3"], "allow_fallbacks": false, "sort": "latency",
            "quantizations": ["Q4_K_M"],
            "max_price": {"prompt_msat_per_mtok": 5, "completion_msat_per_mtok": "6", "request_msat": 0, "prompt": "0.25"}
        }
    });
    let parsed = parse(&body).unwrap();
    assert!(parsed.stream && parsed.include_usage);
    let message = |role, content: &str| Message {
        role,
        content: content.into(),
        name: None,
        tool_calls: Vec::new(),
        tool_call_id: None,
    };
    assert_eq!(
        parsed.request,
        CompletionRequest {
            model: "a/b".into(),
            fallback_models: vec!["c".into()],
            prompt: Prompt::Messages(vec![
                Message { name: Some("boss".into()), ..message(Role::Developer, "be brief") },
                message(Role::User, "one\ntwo"),
                message(Role::Assistant, ""),
            ]),
            sampling: Sampling {
                temperature_micro: 700_000,
                top_p_micro: 950_000,
                top_k: 40,
                min_p_micro: 50_000,
                presence_penalty_micro: -1_500_000,
                frequency_penalty_micro: 100_000,
                repeat_penalty_micro: 1_100_000,
                logit_bias_micro: vec![(2, 500_000), (9, -100_000_000)],
                seed: u64::MAX,
            },
            stop: vec!["END".into()],
            max_tokens: Some(5),
            routing: Routing {
                order: vec!["p1".into()],
                only: vec!["p1".into(), "p2".into()],
                ignore: vec!["p3".into()],
                allow_fallbacks: false,
                sort: Some(RoutingSort::Latency),
                max_price: MaxPrice {
                    prompt: Some(MsatPerMtok(5)),
                    completion: Some(MsatPerMtok(6)),
                    request: Some(Msat(0)),
                    usd: MaxPriceUsd { prompt: Some(250_000), ..MaxPriceUsd::default() },
                },
                quantisations: vec!["Q4_K_M".into()],
            },
            format: Format::Text,
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            top_logprobs: None,
        }
    );
}

#[test]
fn models_may_stand_alone() {
    let body = json!({"models": ["x", "y"], "messages": [{"role": "user", "content": "hi"}]});
    let request = parse(&body).unwrap().request;
    assert_eq!((request.model.as_str(), request.fallback_models.as_slice()), ("x", &["y".to_owned()][..]));
}

#[test]
fn the_legacy_prompt_has_four_shapes() {
    for (prompt, expect) in [
        (json!("hi"), Prompt::Text("hi".into())),
        (json!(["hi"]), Prompt::Text("hi".into())),
        (json!([1, 2]), Prompt::Tokens(vec![1, 2])),
        (json!([[1, 2]]), Prompt::Tokens(vec![1, 2])),
    ] {
        let body = json!({"model": "m", "prompt": prompt}).to_string();
        let request = completion(Flavour::Text, body.as_bytes(), SEED).unwrap().request;
        assert_eq!(request.prompt, expect);
        assert_eq!(request.max_tokens, Some(16), "OpenAI's documented default");
    }
    for (extra, code, param) in [
        (json!({"prompt": null}), "missing_required_parameter", "prompt"),
        (json!({"prompt": ""}), "invalid_value", "prompt"),
        (json!({"prompt": []}), "invalid_value", "prompt"),
        (json!({"prompt": [[]]}), "invalid_value", "prompt[0]"),
        (json!({"prompt": vec!["a"; 33]}), "invalid_value", "n"),
        (json!({"prompt": [1, -2]}), "invalid_type", "prompt[1]"),
        (json!({"prompt": {"a": 1}}), "invalid_type", "prompt"),
        (json!({"echo": true, "logprobs": 1}), "unsupported_parameter", "echo"),
        (json!({"suffix": "x"}), "unsupported_parameter", "suffix"),
        (json!({"best_of": 2}), "unsupported_parameter", "best_of"),
        (json!({"logprobs": 21}), "invalid_value", "logprobs"),
    ] {
        let mut body = json!({"model": "m", "prompt": "hi"});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let (got, at, _) = refused(Flavour::Text, &body.to_string());
        assert_eq!((got.as_str(), at.as_deref()), (code, Some(param)), "{body}");
    }
}

/// Whatever bytes come, the answer is a value or a complaint. Every cut and every changed byte of a full request.
#[test]
fn damaged_bodies_never_panic() {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "\u{26a1}"}]}], "stop": ["a"],
        "logit_bias": {"1": -1.5e0}, "seed": -9, "max_tokens": 5, "stream": true, "stream_options": {"include_usage": true},
        "provider": {"max_price": {"request_msat": 1}, "order": ["x"]}, "temperature": 1e-3, "tools": [], "n": 1
    })
    .to_string()
    .into_bytes();
    assert!(completion(Flavour::Chat, &body, SEED).is_ok());
    let mut refused = 0;
    for cut in 0..body.len() {
        assert!(completion(Flavour::Chat, &body[..cut], SEED).is_err());
        for byte in [0, b'"', b'9', b'{', b']', b',', b'-', b'e', 0xff] {
            let mut damaged = body.clone();
            damaged[cut] = byte;
            refused += usize::from(completion(Flavour::Chat, &damaged, SEED).is_err());
        }
    }
    assert!(refused > body.len(), "most damage is noticed");
}

#[test]
fn replies_are_counted_and_each_has_a_seed_of_its_own() {
    let body = json!({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 5, "logprobs": 0}).to_string();
    let parsed = completion(Flavour::Text, body.as_bytes(), SEED).unwrap();
    let all: Vec<_> = std::iter::once((0, parsed.request)).chain(parsed.others).collect();
    let seen: Vec<_> = all.iter().map(|(prompt, r)| (*prompt, r.prompt.clone(), r.sampling.seed)).collect();
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(seen, [(0, text("a"), 5), (0, text("a"), 6), (1, text("b"), 7), (1, text("b"), 8)]);
    assert!(all.iter().all(|(_, request)| request.top_logprobs == Some(0)));
}

#[test]
fn schemas_keep_their_authors_order() {
    let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"tool_choice":"auto",
        "response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"z":1,"a":2}}},
        "tools":[{"type":"function","function":{"name":"f","parameters":{"y":1,"b":2}}}]}"#;
    let request = completion(Flavour::Chat, body.as_bytes(), SEED).unwrap().request;
    let param = "response_format.json_schema.schema";
    assert_eq!(request.format, Format::JsonSchema { schema: r#"{"z":1,"a":2}"#.into(), param });
    assert_eq!((request.tools[0].name.as_str(), request.tools[0].parameters.as_str()), ("f", r#"{"y":1,"b":2}"#));
    assert_eq!(request.tools[0].param, "tools[0].function.parameters");
}
