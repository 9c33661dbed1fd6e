//! `POST /v1/embeddings`: texts to embed, and how their rows are written.

use serde_json::Value;

use super::{Parsed, fields::Fields, fields::wrong_type, json, messages::token_ids, models, routing};
use crate::{
    config::limits,
    error::ApiError,
    service::{CompletionRequest, Format, Prompt, TextToEmbed, ToolChoice},
};

/// How a row's numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// An array of numbers.
    Float,
    /// The little-endian bytes of 32-bit floats.
    Base64,
}

/// The request, how its rows are written, and how many numbers a row shall have, where that is said.
pub(crate) fn embeddings(body: &[u8]) -> Result<(Parsed, Encoding, Option<u32>), ApiError> {
    let value = json(body)?;
    let top = Fields::of(&value, "")?;
    let (model, fallback_models) = models(&top)?;
    let encoding = match top.string("encoding_format")? {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(_) => return Err(top.invalid("encoding_format", "`encoding_format` must be `float` or `base64`.")),
    };
    let dimensions = top.integer_u32("dimensions", 1..=limits::MAX_TOKENS)?;
    let request = CompletionRequest {
        model,
        fallback_models,
        prompt: Prompt::Embed(texts(&top)?),
        sampling: satgrid_types::Sampling::default(),
        stop: Vec::new(),
        max_tokens: Some(0),
        routing: routing::routing(&top)?,
        format: Format::Text,
        tools: Vec::new(),
        tool_choice: ToolChoice::None,
        parallel_tool_calls: false,
        top_logprobs: None,
    };
    Ok((super::ask(request, false), encoding, dimensions))
}

/// A text, token ids, or a list of either.
fn texts(top: &Fields<'_>) -> Result<Vec<TextToEmbed>, ApiError> {
    let value = top.required("input", top.get("input"))?;
    let list = match value {
        Value::Array(list) if matches!(list.first(), Some(Value::String(_) | Value::Array(_))) => list,
        Value::Array(list) if list.is_empty() => return Err(top.invalid("input", "`input` is empty.")),
        Value::Array(_) | Value::String(_) => return Ok(vec![text("input", value)?]),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            return Err(wrong_type("input", "a string or an array", value));
        }
    };
    if list.len() > limits::MAX_TEXTS {
        let message = format!("`input` holds {} texts; at most {} are taken at a time.", list.len(), limits::MAX_TEXTS);
        return Err(top.invalid("input", message));
    }
    list.iter().enumerate().map(|(i, value)| text(&format!("input[{i}]"), value)).collect()
}

fn text(name: &str, value: &Value) -> Result<TextToEmbed, ApiError> {
    match value {
        Value::String(text) if text.is_empty() => {
            Err(ApiError::bad("invalid_value", name, format!("`{name}` is an empty string.")))
        }
        Value::String(text) => Ok(TextToEmbed::Text(text.clone())),
        Value::Array(ids) => Ok(TextToEmbed::Tokens(token_ids(name, ids)?)),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_type(name, "a string or an array of token ids", other))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json as value;

    fn read(input: Value) -> Result<Vec<TextToEmbed>, (String, String)> {
        let body = value!({"model": "m", "input": input}).to_string();
        match embeddings(body.as_bytes()) {
            Ok((parsed, _, _)) => match parsed.request.prompt {
                Prompt::Embed(texts) => Ok(texts),
                other @ (Prompt::Messages(_) | Prompt::Text(_) | Prompt::Tokens(_)) => panic!("{other:?}"),
            },
            Err(error) => Err((
                error.body.param().unwrap_or_default().to_owned(),
                serde_json::to_value(&*error.body).unwrap()["message"].as_str().unwrap().to_owned(),
            )),
        }
    }

    #[test]
    fn every_form_of_input_is_read() {
        let text = |text: &str| TextToEmbed::Text(text.to_owned());
        let ids = |ids: &[u32]| TextToEmbed::Tokens(ids.to_vec());
        assert_eq!(read(value!("a")), Ok(vec![text("a")]));
        assert_eq!(read(value!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(read(value!([1, 2])), Ok(vec![ids(&[1, 2])]));
        assert_eq!(read(value!([[1], [2, 3]])), Ok(vec![ids(&[1]), ids(&[2, 3])]));
        assert_eq!(read(value!([[1], "a"])), Ok(vec![ids(&[1]), text("a")]));
    }

    #[test]
    fn what_is_no_input_is_named() {
        let rows = [
            (Value::Null, "input", "required"),
            (value!(""), "input", "empty"),
            (value!([]), "input", "empty"),
            (value!([[]]), "input[0]", "empty"),
            (value!(["a", ""]), "input[1]", "empty"),
            (value!(["a", 5]), "input[1]", "string"),
            (value!([1, -2]), "input[1]", "token id"),
            (value!([1.5]), "input[0]", "token id"),
            (value!({"a": 1}), "input", "a string or an array"),
            (value!(7), "input", "a string or an array"),
            (value!(vec!["x"; limits::MAX_TEXTS + 1]), "input", "at a time"),
        ];
        for (input, param, says) in rows {
            let (named, message) = read(input).unwrap_err();
            assert!(named == param && message.contains(says), "{named}: {message}");
        }
    }

    #[test]
    fn encodings_and_dimensions_are_read() {
        let with = |extra: Value| {
            let mut body = value!({"model": "m", "input": "x"});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            embeddings(body.to_string().as_bytes()).map(|(_, encoding, dimensions)| (encoding, dimensions))
        };
        assert_eq!(with(value!({})).unwrap(), (Encoding::Float, None));
        assert_eq!(
            with(value!({"encoding_format": "base64", "dimensions": 64})).unwrap(),
            (Encoding::Base64, Some(64))
        );
        for (bad, param) in [
            (value!({"encoding_format": "hex"}), "encoding_format"),
            (value!({"encoding_format": 1}), "encoding_format"),
            (value!({"dimensions": 0}), "dimensions"),
            (value!({"dimensions": "64"}), "dimensions"),
        ] {
            assert_eq!(with(bad).unwrap_err().body.param(), Some(param));
        }
    }
}
