//! Reading one JSON object field by field, so that every complaint names its parameter.
//!
//! Unknown fields are left alone: clients send many that change nothing. A field that would change the meaning of the
//! reply and is not supported is refused by name, never dropped. `null` is the same as absent, as in OpenAI's schema.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// `provider.` or `messages[2].`; empty at the top.
    path: String,
}

impl<'a> Fields<'a> {
    pub(super) fn of(value: &'a Value, path: impl Into<String>) -> Result<Fields<'a>, ApiError> {
        let path = path.into();
        match value.as_object() {
            Some(object) if path.is_empty() => Ok(Fields { object, path }),
            Some(object) => Ok(Fields { object, path: path + "." }),
            None if path.is_empty() => Err(ApiError::new(
                axum::http::StatusCode::BAD_REQUEST,
                "invalid_type",
                format!("The body must be a JSON object, not {}.", kind(value)),
            )),
            None => Err(wrong_type(&path, "an object", value)),
        }
    }

    /// The parameter's full name, for complaints.
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(field, "a string", Value::as_str)
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, ApiError> {
        self.read(field, "a boolean", Value::as_bool)
    }

    pub(super) fn list(&self, field: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.read(field, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(field).map(|value| Fields::of(value, self.name(field))).transpose()
    }

    /// A number in `range`, in millionths: the fixed point of signed statements.
    pub(super) fn micro(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<i32>, ApiError> {
        let Some(number) = self.read(field, "a number", Value::as_f64)? else { return Ok(None) };
        micro(number, &range).map(Some).ok_or_else(|| self.outside(field, range.start(), range.end(), &number))
    }

    /// [`Fields::micro`] where the range has no negative part.
    pub(super) fn micro_unsigned(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<u32>, ApiError> {
        Ok(self.micro(field, range)?.map(i32::unsigned_abs))
    }

    pub(super) fn integer(&self, field: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // 2.0 is an integer to a Python client that computed it.
        let whole = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        match (whole, value.is_number()) {
            (Some(n), _) if range.contains(&n) => Ok(Some(n)),
            (_, true) => Err(self.outside(field, range.start(), range.end(), value)),
            (_, false) => Err(wrong_type(&self.name(field), "an integer", value)),
        }
    }

    /// The object, where strings that hold a number are that number.
    pub(super) fn with_numbers(&self) -> Map<String, Value> {
        let read = |value: &Value| {
            let number = value.as_str().and_then(|text| serde_json::from_str(text).ok()).filter(Value::is_number);
            number.unwrap_or_else(|| value.clone())
        };
        self.object.iter().map(|(name, value)| (name.clone(), read(value))).collect()
    }

    pub(super) fn integer_u32(&self, field: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        Ok(self.integer(field, wide)?.and_then(|n| u32::try_from(n).ok()))
    }

    /// A list of names, each once or more, none empty.
    pub(super) fn names(&self, field: &str, most: usize, bytes: usize) -> Result<Vec<String>, ApiError> {
        let Some(list) = self.list(field)? else { return Ok(Vec::new()) };
        if list.len() > most {
            return Err(self.invalid(field, format!("`{}` may hold at most {most} entries.", self.name(field))));
        }
        let mut names = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            let name = format!("{}[{i}]", self.name(field));
            match value.as_str() {
                None => return Err(wrong_type(&name, "a string", value)),
                Some(text) if text.is_empty() || text.len() > bytes => {
                    return Err(ApiError::bad(
                        "invalid_value",
                        &name,
                        format!("`{name}` must have 1 to {bytes} bytes."),
                    ));
                }
                Some(text) => names.push(text.to_owned()),
            }
        }
        Ok(names)
    }

    pub(super) fn required<T>(&self, field: &str, value: Option<T>) -> Result<T, ApiError> {
        value.ok_or_else(|| {
            let name = self.name(field);
            ApiError::bad("missing_required_parameter", &name, format!("Missing required parameter: `{name}`."))
        })
    }

    pub(super) fn invalid(&self, field: &str, message: impl Into<String>) -> ApiError {
        ApiError::bad("invalid_value", self.name(field), message)
    }

    /// For what OpenAI has and this node does not have yet.
    pub(super) fn unsupported(&self, field: &str, what: &str) -> ApiError {
        let name = self.name(field);
        ApiError::bad("unsupported_parameter", &name, format!("`{name}`: {what} is not supported yet."))
    }

    fn read<T>(
        &self,
        field: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| wrong_type(&self.name(field), wanted, value))
    }

    fn outside(
        &self,
        field: &str,
        low: &impl std::fmt::Display,
        high: &impl std::fmt::Display,
        given: &impl std::fmt::Display,
    ) -> ApiError {
        let name = self.name(field);
        self.invalid(field, format!("`{name}` must be from {low} to {high}, not {given}."))
    }
}

/// `None` outside `range`, for NaN, and for what millionths in 32 bits cannot hold.
pub(super) fn micro(number: f64, range: &RangeInclusive<f64>) -> Option<i32> {
    let scaled = (number * 1e6).round();
    let fits = range.contains(&number) && scaled.abs() <= f64::from(i32::MAX);
    #[expect(clippy::cast_possible_truncation, reason = "rounded and checked to fit")]
    fits.then_some(scaled as i32)
}

fn whole(number: f64) -> Option<u64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let fits = number.fract() == 0.0 && (0.0..=EXACT).contains(&number);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, not negative, within 2^53")]
    fits.then_some(number as u64)
}

pub(super) fn wrong_type(name: &str, wanted: &str, given: &Value) -> ApiError {
    let message = format!("Invalid type for `{name}`: expected {wanted}, got {}.", kind(given));
    ApiError::bad("invalid_type", name, message)
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
