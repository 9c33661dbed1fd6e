use serde_json::json;

use super::*;

const CHATML: &str = "{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}";

fn render(source: Option<&str>, messages: &[Json]) -> Result<Prompt, TemplateError> {
    let template = Template::new(source, "<s>", "</s>")?;
    let tools = json!([{"name": "f", "b": [1, "<a>"]}]);
    let now = CivilTime::from_unix(1_700_000_000);
    template.render(&ChatInput { messages, tools: Some(&tools), add_generation_prompt: true, now })
}

#[track_caller]
fn check(source: &str, expect: &str) {
    let messages = [json!({"role": "user", "content": " Hi "})];
    assert_eq!(render(Some(source), &messages).map(|prompt| prompt.text), Ok(expect.to_owned()));
}

#[test]
fn templates_render_as_in_python() {
    check(CHATML, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    check("{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}", "<s>Hi");
    check("{{ tools | tojson }}", r#"[{"b": [1, "<a>"], "name": "f"}]"#);
    check("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]");
    check("{{ strftime_now('%d %b %Y') }}", "14 Nov 2023");
    check("{% if messages[0].content.startswith(' H') %}yes{% endif %}", "yes");
    check("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01");
    check("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1");
    check("{{ messages[1:] | length }}{{ 'a,b'.split(',')[1] }}{{ messages[0].get('name', 'none') }}", "0bnone");
}

#[test]
fn bos_is_written_once() {
    let messages = [json!({"role": "user", "content": "x"})];
    let special = |source| render(Some(source), &messages).unwrap().add_special;
    assert!(!special("{{ bos_token }}x"));
    assert!(special("x"));
}

#[test]
fn a_base_model_continues_the_text() {
    let messages = [
        json!({"role": "system", "content": "Notes."}),
        json!({"role": "user", "content": [{"type": "text", "text": "The river"}, {"type": "text", "text": " ran"}]}),
        json!({"role": "assistant", "content": null}),
    ];
    let expect = Prompt { text: "Notes.\n\nThe river ran".to_owned(), add_special: true, parse_special: false };
    assert_eq!(render(None, &messages), Ok(expect));
    assert_eq!(Template::new(None, "", "").unwrap().name(), PLAIN_NAME);
}

#[test]
fn failures_are_values() {
    let messages = [json!({"role": "user", "content": "x"})];
    let error = |source: &str| render(Some(source), &messages).unwrap_err();
    let refused = TemplateError::Refused { message: "roles must alternate".to_owned() };
    assert_eq!(error("{{ raise_exception('roles must alternate') }}"), refused);
    assert!(matches!(error("{% for %}"), TemplateError::Syntax { .. }));
    assert!(matches!(error("{{ messages.nothing() }}"), TemplateError::Failed { .. }));
    let nested = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
    assert_eq!(error(nested), TemplateError::OutOfFuel);
    assert_eq!(error("{{ 'x' * 9000000 }}"), TemplateError::OutputTooLarge);
    assert_eq!(error(&" ".repeat(MAX_TEMPLATE_BYTES + 1)), TemplateError::TooLarge { bytes: MAX_TEMPLATE_BYTES + 1 });
    assert!(matches!(error("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), TemplateError::Failed { .. }));
    assert_eq!(render(None, &[]), Err(TemplateError::NoMessages));
    assert_eq!(render(None, &[json!("text")]), Err(TemplateError::NotText { index: 0 }));
    let image = [json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]})];
    assert_eq!(render(None, &image), Err(TemplateError::NotText { index: 0 }));
}
