//! A conversation on its way to the process that renders it: a template is a stranger's program, and may take a process
//! with it.

use minicbor::{Decode, Encode};
use serde_json::Value as Json;

use super::{ChatInput, CivilTime, Prompt, Template, TemplateError};

/// A [`ChatInput`] that travels.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ChatOrder {
    /// OpenAI's message objects, as a JSON array.
    #[n(0)]
    messages: String,
    #[n(1)]
    tools: Option<String>,
    #[n(2)]
    add_generation_prompt: bool,
    /// What `strftime_now` tells, in seconds since 1970.
    #[n(3)]
    now: i64,
}

impl ChatOrder {
    pub fn new(messages: &[Json], tools: Option<&Json>, add_generation_prompt: bool, now: i64) -> Self {
        let messages = Json::Array(messages.to_vec()).to_string();
        Self { messages, tools: tools.map(Json::to_string), add_generation_prompt, now }
    }

    pub fn render(&self, template: &Template) -> Result<Prompt, TemplateError> {
        let failed = |error: serde_json::Error| TemplateError::Failed { reason: error.to_string() };
        let messages: Vec<Json> = serde_json::from_str(&self.messages).map_err(failed)?;
        let tools: Option<Json> = self.tools.as_deref().map(serde_json::from_str).transpose().map_err(failed)?;
        let now = CivilTime::from_unix(self.now);
        let add_generation_prompt = self.add_generation_prompt;
        template.render(&ChatInput { messages: &messages, tools: tools.as_ref(), add_generation_prompt, now })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_order_renders_as_its_input_does() {
        let source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}{{ strftime_now('%Y') }}";
        let template = Template::new(Some(source), "<s>", "</s>").unwrap();
        let (messages, tools) =
            ([json!({"role": "user", "content": "naïve \u{6c34}"})], json!([{"name": "f", "a": 1.5}]));
        let order = ChatOrder::new(&messages, Some(&tools), true, 1_700_000_000);
        let read: ChatOrder = minicbor::decode(&minicbor::to_vec(&order).unwrap()).unwrap();
        let now = CivilTime::from_unix(1_700_000_000);
        let input = ChatInput { messages: &messages, tools: Some(&tools), add_generation_prompt: true, now };
        assert_eq!(read.render(&template), template.render(&input));
        assert!(read.render(&template).unwrap().text.ends_with("2023"));
    }
}
