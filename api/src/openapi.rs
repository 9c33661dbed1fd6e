//! The OpenAPI document of this node's own surface, served at `/v1/openapi.json`.
//!
//! One table, [`ENDPOINTS`]; a test holds it against the routes that `router` registers. Bodies that are OpenAI's own are
//! named, not repeated: their schema is OpenAI's published document, and what is ours is described.

use axum::Json;
use serde_json::{Map, Value, json};

/// One method on one path.
struct Endpoint {
    method: &'static str,
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    /// Name of the body's schema.
    body: Option<&'static str>,
    /// Name of the answer's schema.
    answer: &'static str,
    /// Statuses beside 200 that mean something here.
    refusals: &'static [u16],
}

const fn get(path: &'static str, tag: &'static str, summary: &'static str, answer: &'static str) -> Endpoint {
    Endpoint { method: "get", path, tag, summary, body: None, answer, refusals: &[401, 404, 429] }
}

const fn post(
    path: &'static str,
    tag: &'static str,
    summary: &'static str,
    body: &'static str,
    answer: &'static str,
) -> Endpoint {
    let refusals = &[400, 401, 402, 403, 404, 429, 502, 503];
    Endpoint { method: "post", path, tag, summary, body: Some(body), answer, refusals }
}

const ENDPOINTS: &[Endpoint] = &[
    get("/health", "node", "Whether the node can take work: 200 or 503, with reasons", "Health"),
    get("/v1/openapi.json", "node", "This document", "Any"),
    get("/v1/models", "models", "Models that can be bought now, with prices and the number of sellers", "ModelList"),
    get("/v1/models/{id}", "models", "One model; its name may hold slashes", "Model"),
    post("/v1/chat/completions", "completions", "OpenAI's chat completions, streamed or not", "OpenAi", "Completion"),
    post("/v1/completions", "completions", "OpenAI's text completions, streamed or not", "OpenAi", "Completion"),
    post("/v1/responses", "completions", "OpenAI's responses, stateless, streamed or not", "OpenAi", "Response"),
    post("/v1/embeddings", "completions", "OpenAI's embeddings, for models that make them", "OpenAi", "Any"),
    post("/v1/tokenize", "models", "Token ids of a text or of messages; costs nothing", "Any", "Any"),
    post("/v1/detokenize", "models", "The text of token ids; costs nothing", "Any", "Any"),
    post("/v1/estimate", "money", "The most that a completion can cost if it is sent now", "OpenAi", "Estimate"),
    get("/v1/generations/{id}", "money", "What a completion has cost: providers, receipts, rate", "Generation"),
    get("/v1/key", "keys", "The key that is shown: its limits and figures", "Any"),
    get("/v1/keys", "keys", "Keys directly below a key that manages", "KeyList"),
    post("/v1/keys", "keys", "Makes a key below a key that manages; the secret is shown this once", "NewKey", "Key"),
    get("/v1/keys/{id}", "keys", "One key below a key that manages", "Key"),
    post("/v1/topup", "front door", "An invoice that fills a key, or makes one when it is paid", "TopUp", "Any"),
    get("/v1/invoices/{hash}", "front door", "Whether an invoice is paid", "Any"),
    post("/v1/refund", "front door", "Pays back what a key has left", "Refund", "Any"),
    get("/v1/refund", "front door", "The refunds of a key", "Any"),
    Endpoint {
        method: "delete",
        path: "/v1/keys/{id}",
        tag: "keys",
        summary: "Ends a key and every key below it",
        body: None,
        answer: "Key",
        refusals: &[401, 403, 404],
    },
];

pub(crate) async fn serve() -> Json<Value> {
    Json(document())
}

fn document() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for endpoint in ENDPOINTS {
        let path = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        path[endpoint.method] = operation(endpoint);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "satgrid",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An OpenAI-compatible endpoint that is paid in sats by the token. Where a body or an answer is \
                OpenAI's, its schema is that of OpenAI's published document; what is added is described here.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "http://127.0.0.1:8402" }],
        "security": [{}, { "bearer": [] }, { "apiKey": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "apiKey": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
            "schemas": schemas(),
        },
    })
}

fn operation(endpoint: &Endpoint) -> Value {
    let name = endpoint.path.trim_start_matches("/v1/").replace(['/', '{', '}', '.'], "_");
    let content = |schema: &str| json!({ "application/json": { "schema": reference(schema) } });
    let mut responses = json!({ "200": { "description": "Done", "content": content(endpoint.answer) } });
    for status in endpoint.refusals {
        responses[status.to_string()] = json!({ "description": meaning(*status), "content": content("Error") });
    }
    let mut operation = json!({
        "operationId": format!("{}_{}", endpoint.method, name.trim_matches('_')),
        "tags": [endpoint.tag],
        "summary": endpoint.summary,
        "responses": responses,
    });
    if let Some(name) = endpoint.path.split(['{', '}']).nth(1) {
        operation["parameters"] =
            json!([{ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }]);
    }
    if let Some(body) = endpoint.body {
        operation["requestBody"] = json!({ "required": true, "content": content(body) });
    }
    operation
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

const fn meaning(status: u16) -> &'static str {
    match status {
        400 => {
            "The request itself; `param` names the field. At a front door also `price_too_high`: no single invoice covers \
             what it may cost"
        }
        401 => "No key, or one that opens nothing",
        402 => "Money: the wallet's, the node's or the key's limit; never retried by clients",
        403 => "The key may not do this",
        404 => "No such path, model, key or generation",
        429 => "The key asks too often; `Retry-After` says how long to wait",
        502 => "The provider failed and no other took over",
        503 => "Not now",
        _ => "Refused",
    }
}

fn schemas() -> Value {
    let msat = || json!({ "type": "integer", "minimum": 0, "description": "millisatoshi" });
    let nullable = || json!({ "type": ["integer", "null"], "minimum": 0 });
    let rates = json!({
        "type": "object",
        "description": "msat for a million tokens",
        "properties": { "input": msat(), "cached_input": msat(), "output": msat() },
    });
    let limits = json!({
        "per_request_msat": nullable(), "per_day_msat": nullable(), "total_msat": nullable(),
        "requests_per_minute": nullable(), "models": { "type": "array", "items": { "type": "string" } },
        "expires_at": nullable(),
    });
    let mut new_key = limits.clone();
    new_key["name"] = json!({ "type": "string" });
    new_key["kind"] = json!({ "enum": ["infer", "manage"] });
    new_key["parent"] = json!({ "type": ["string", "null"] });
    let usage = json!({
        "type": "object",
        "description": "OpenAI's usage and what it cost",
        "properties": {
            "prompt_tokens": { "type": "integer" }, "completion_tokens": { "type": "integer" },
            "total_tokens": { "type": "integer" }, "cost_msat": msat(),
            "cost": { "type": "number", "description": "dollars, where an exchange rate is configured" },
            "cost_details": { "type": "object" },
            "receipt_ids": { "type": "array", "items": { "type": "string" } },
        },
    });
    json!({
        "Any": { "type": "object" },
        "OpenAi": { "type": "object", "description": "OpenAI's request; `provider` and `models` as OpenRouter has them" },
        "Completion": { "type": "object", "properties": { "id": { "type": "string" }, "usage": usage.clone() } },
        "Response": { "type": "object", "description": "OpenAI's response; nothing of it is kept", "properties": {
            "id": { "type": "string" }, "usage": { "type": "object", "properties": {
                "input_tokens": { "type": "integer" }, "output_tokens": { "type": "integer" },
                "total_tokens": { "type": "integer" }, "cost_msat": msat(), "cost_details": { "type": "object" },
                "receipt_ids": { "type": "array", "items": { "type": "string" } },
            } },
        } },
        "Health": { "type": "object", "properties": {
            "status": { "enum": ["ok", "unavailable"] }, "reasons": { "type": "array", "items": { "type": "string" } },
        } },
        "Error": { "type": "object", "required": ["error"], "properties": { "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {
                "message": { "type": "string" }, "type": { "type": "string" }, "param": { "type": ["string", "null"] },
                "code": { "type": "string" }, "metadata": { "type": "object" },
            },
        } } },
        "Model": { "type": "object", "required": ["id", "object", "created", "owned_by"], "properties": {
            "id": { "type": "string" }, "object": { "const": "model" }, "created": { "type": "integer" },
            "owned_by": { "type": "string" }, "context_length": { "type": "integer" }, "msat_per_mtok": rates.clone(),
            "per_request_msat": msat(), "sellers": { "type": "integer" },
            "quantizations": { "type": "array", "items": { "type": "string" } },
            "model_root": { "type": ["string", "null"] },
            "pricing": { "type": "object", "description": "dollars for a token, as decimal strings" },
        } },
        "ModelList": list_of("Model"),
        "Estimate": { "type": "object", "properties": {
            "prompt_tokens": { "type": "integer" }, "max_tokens": { "type": "integer" },
            "choices": { "type": "integer" }, "ceiling_msat": msat(),
            "ceiling_with_failover_msat": msat(), "available_msat": nullable(), "msat_per_mtok": rates,
            "per_request_msat": msat(), "providers": { "type": "integer" }, "ceiling_usd": { "type": "number" },
        } },
        "Generation": { "type": "object", "properties": {
            "id": { "type": "string" }, "model": { "type": "string" }, "key": { "type": ["string", "null"] },
            "created": { "type": "integer" }, "cost_msat": msat(), "charged_msat": msat(),
            "calls": { "type": "array", "items": { "type": "object", "properties": {
                "state": { "enum": ["open", "done", "failed"] }, "usage": usage,
            } } },
        } },
        "NewKey": { "type": "object", "required": ["name"], "properties": new_key },
        "Key": { "type": "object", "properties": {
            "id": { "type": "string" }, "name": { "type": "string" }, "kind": { "enum": ["infer", "manage", "prepaid"] },
            "secret": { "type": "string", "description": "only in the answer that made it" },
            "parent": { "type": ["string", "null"] }, "limits": { "type": "object", "properties": limits },
            "spent_msat": msat(), "reserved_msat": msat(), "spent_today_msat": msat(), "requests": { "type": "integer" },
            "available_msat": nullable(), "balance_msat": nullable(),
        } },
        "KeyList": list_of("Key"),
        "TopUp": { "type": "object", "required": ["amount_sat"], "properties": { "amount_sat": { "type": "integer" } } },
        "Refund": { "type": "object", "required": ["destination"], "properties": {
            "destination": { "type": "string", "description": "a BOLT 11 invoice or a Lightning address" },
            "amount_msat": nullable(),
        } },
    })
}

fn list_of(schema: &str) -> Value {
    json!({ "type": "object", "properties": {
        "object": { "const": "list" }, "data": { "type": "array", "items": reference(schema) },
    } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What the router registers, read from its own text: axum does not tell.
    fn routes() -> BTreeSet<(String, String)> {
        let text = include_str!("router.rs");
        let mut found = BTreeSet::new();
        for line in text.lines().map(str::trim).filter_map(|line| line.strip_prefix(".route(\"")) {
            let (path, handlers) = line.split_once('"').unwrap();
            for method in ["get", "post", "delete", "put", "patch"] {
                let called = format!("{method}(");
                let at = |text: &str| text.contains(&format!(" {called}")) || text.contains(&format!(".{called}"));
                if at(handlers) {
                    found.insert((method.to_owned(), path.replace("{*id}", "{id}")));
                }
            }
        }
        found
    }

    #[test]
    fn the_document_and_the_routes_are_the_same() {
        let told = ENDPOINTS.iter().map(|e| (e.method.to_owned(), e.path.to_owned())).collect::<BTreeSet<_>>();
        assert_eq!(told, routes());
        assert_eq!(told.len(), ENDPOINTS.len(), "nothing is there twice");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(map) => {
                    for (name, value) in map {
                        match (name.as_str(), value.as_str()) {
                            ("$ref", Some(target)) => found.push(target.to_owned()),
                            _ => references(value, found),
                        }
                    }
                }
                Value::Array(all) => all.iter().for_each(|value| references(value, found)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let document = document();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > ENDPOINTS.len());
        for target in found {
            let pointer = target.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{target}");
        }
        let ids: BTreeSet<String> = ENDPOINTS.iter().map(|e| operation(e)["operationId"].to_string()).collect();
        assert_eq!(ids.len(), ENDPOINTS.len(), "operation ids differ");
    }
}
