//! `satgrid config check`: what will be used, where it came from, and what is wrong with it.

use serde_json::json;

use super::print;
use crate::cli::{ConfigCommand, Format, Globals};
use crate::config::{Entry, Loaded, Problem, SECTIONS, problems};
use crate::failure::Findings;

pub(super) fn run(globals: &Globals, command: &ConfigCommand) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Check => check(globals),
    }
}

fn check(globals: &Globals) -> anyhow::Result<()> {
    let loaded = globals.load()?;
    let problems = problems(&loaded.config);
    match globals.format {
        Format::Text => {
            print::out(&text(&loaded))?;
            for problem in &problems {
                eprintln!("problem: {}: {}\n   hint: {}", problem.key, problem.fault, problem.remedy);
            }
            if problems.is_empty() {
                eprintln!("sound: `satgrid up` can use this");
            }
        }
        Format::Json => print::json(&as_json(&loaded, &problems))?,
    }
    if problems.is_empty() { Ok(()) } else { Err(Findings.into()) }
}

fn text(loaded: &Loaded) -> String {
    let mut rows = Vec::new();
    for (section, _) in SECTIONS {
        for entry in loaded.entries.iter().filter(|entry| entry.key.section() == *section) {
            rows.push(vec![entry.key.path.to_owned(), shown(entry), entry.origin.to_string()]);
        }
    }
    let file = match &loaded.file {
        Some(file) => format!("file: {}", file.display()),
        None => "file: none (defaults, environment and flags only)".to_owned(),
    };
    format!("{file}\n{}", print::table(&["key", "value", "from"], rows))
}

/// References to secrets are shown; secrets are never in here.
fn shown(entry: &Entry) -> String {
    match &entry.value {
        None => "-".to_owned(),
        Some(toml::Value::String(text)) => text.clone(),
        Some(toml::Value::Array(list)) if list.is_empty() => "none".to_owned(),
        Some(toml::Value::Array(list)) => {
            let items: Vec<String> = list.iter().map(item).collect();
            items.join("\n")
        }
        Some(value) => value.to_string(),
    }
}

/// One of a list; a table as one field a line.
fn item(value: &toml::Value) -> String {
    if let Some(text) = value.as_str() {
        return text.to_owned();
    }
    match value.as_table() {
        Some(table) => {
            let fields: Vec<String> = table.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            fields.join("\n")
        }
        None => value.to_string(),
    }
}

fn as_json(loaded: &Loaded, problems: &[Problem]) -> serde_json::Value {
    let settings: serde_json::Map<String, serde_json::Value> = loaded
        .entries
        .iter()
        .map(|entry| {
            let setting = json!({ "value": entry.value, "from": entry.origin.to_string() });
            (entry.key.path.to_owned(), setting)
        })
        .collect();
    json!({ "file": loaded.file, "settings": settings, "warnings": loaded.warnings, "problems": problems })
}
