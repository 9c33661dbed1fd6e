//! Merges defaults, file, environment and flags, and remembers where each value came from.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use toml::Value;

use super::keys::{self, ENV_OTHER, ENV_PREFIX, KEYS, Key, Kind, Preset, SECTIONS, did_you_mean};
use super::places;
use super::types::{Config, Network};

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    /// `--config`; it must exist then.
    pub file: Option<PathBuf>,
    /// (flag as the user knows it, key, text)
    pub values: Vec<(String, String, String)>,
}

impl Overrides {
    /// Sets `key` from `flag` where the flag was given.
    pub(crate) fn set(&mut self, flag: &str, key: &str, text: Option<impl ToString>) {
        if let Some(text) = text {
            self.values.push((flag.to_owned(), key.to_owned(), text.to_string()));
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Flag(String),
    Env(String),
    /// Line in the configuration file, counted from 1.
    File(usize),
    Default,
    Derived(&'static str),
    Unset,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag(flag) => write!(f, "flag {flag}"),
            Origin::Env(name) => write!(f, "environment {name}"),
            Origin::File(line) => write!(f, "file, line {line}"),
            Origin::Default => f.write_str("default"),
            Origin::Derived(how) => write!(f, "default: {how}"),
            Origin::Unset => f.write_str("not set"),
        }
    }
}

/// One key with the value that will be used.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub key: &'static Key,
    pub value: Option<Value>,
    pub origin: Origin,
}

#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub config: Config,
    pub entries: Vec<Entry>,
    /// The file that was read, if there is one.
    pub file: Option<PathBuf>,
    /// Things that are no error but that the operator should hear.
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration file {path}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid TOML")]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{path}, line {line}: unknown key {key}")]
    UnknownKey { path: PathBuf, line: usize, key: String, meant: Option<String> },
    #[error("{flag}: unknown key {key}")]
    UnknownFlagKey { flag: String, key: String, meant: Option<String> },
    #[error("{key} ({origin}) must be {expected}, not {found}")]
    Type { key: String, origin: Origin, expected: &'static str, found: String },
    #[error("{key}{}: {reason}", .origin.as_ref().map(|o| format!(" ({o})")).unwrap_or_default())]
    Value { key: String, origin: Option<Origin>, reason: String },
}

impl ConfigError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            ConfigError::Unreadable { .. } => Some("`satgrid init` writes one; --config names another".to_owned()),
            ConfigError::Syntax { .. } | ConfigError::Value { .. } => None,
            ConfigError::UnknownKey { meant, .. } | ConfigError::UnknownFlagKey { meant, .. } => Some(match meant {
                Some(meant) => format!("did you mean {meant}?"),
                None => "`satgrid config check` lists every key".to_owned(),
            }),
            ConfigError::Type { key, expected, .. } => Some(format!("{key} takes {expected}")),
        }
    }
}

/// Reads and merges everything. `env` answers for the environment; tests pass their own.
pub(crate) fn load(overrides: &Overrides, env: &BTreeMap<String, String>) -> Result<Loaded, ConfigError> {
    let var = |name: &str| env.get(name).filter(|value| !value.is_empty()).cloned();
    let file = FileValues::read(overrides, &var)?;
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let flags = flag_values(overrides)?;

    let mut entries = Vec::with_capacity(KEYS.len());
    for key in KEYS {
        let (value, origin, base) = if let Some((flag, text)) = flags.get(key.path) {
            let origin = Origin::Flag(flag.clone());
            (Some(parse_text(key, text, &origin)?), origin, here.as_path())
        } else if let Some(text) = var(&key.env_name()) {
            let origin = Origin::Env(key.env_name());
            (Some(parse_text(key, &text, &origin)?), origin, here.as_path())
        } else if let Some((value, line)) = file.values.get(key.path) {
            let origin = Origin::File(*line);
            check_kind(key, value, &origin)?;
            (Some(value.clone()), origin, file.folder.as_path())
        } else {
            let (value, origin) = preset(key, &entries, &var)?;
            (value, origin, here.as_path())
        };
        let value = value.map(|value| anchor(key, value, base, &var));
        entries.push(Entry { key, value, origin });
    }
    let config = typed(&entries)?;
    Ok(Loaded { config, entries, file: file.path, warnings: stray_variables(env) })
}

/// What nobody set. Derived values read the entries before theirs: the table lists `node` first.
fn preset(
    key: &Key,
    before: &[Entry],
    var: &dyn Fn(&str) -> Option<String>,
) -> Result<(Option<Value>, Origin), ConfigError> {
    let text_of = |path: &str| {
        let entry = before.iter().find(|entry| entry.key.path == path)?;
        Some((entry.value.as_ref()?.as_str()?.to_owned(), entry.origin.clone()))
    };
    let below_node_dir = |name: &str| text_of("node.dir").map(|(dir, _)| Path::new(&dir).join(name));
    let how = match key.preset {
        Preset::Unset => return Ok((None, Origin::Unset)),
        Preset::Value(text) => return Ok((Some(literal(text)), Origin::Default)),
        Preset::Derived(how) => how,
    };
    let path = match key.path {
        "node.dir" => {
            let (name, origin) = text_of("node.network").unwrap_or_else(|| ("regtest".to_owned(), Origin::Default));
            let network = Network::deserialize(Value::String(name.clone())).map_err(|_| ConfigError::Value {
                key: "node.network".to_owned(),
                origin: Some(origin),
                reason: format!("{name:?} is no network; choose regtest, signet, testnet or mainnet"),
            })?;
            Some(places::data_dir(var, network))
        }
        "wallet.seed" => below_node_dir("seed").map(|path| PathBuf::from(format!("file:{}", path.display()))),
        "ledger.path" => below_node_dir("ledger.sqlite"),
        "models.dir" => Some(places::models_dir(var)),
        _ => None,
    };
    Ok((path.map(|path| Value::String(path.to_string_lossy().into_owned())), Origin::Derived(how)))
}

fn literal(text: &str) -> Value {
    // Tests parse every preset of the table.
    toml::from_str::<toml::Table>(&format!("x = {text}"))
        .ok()
        .and_then(|mut table| table.remove("x"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

struct FileValues {
    path: Option<PathBuf>,
    folder: PathBuf,
    /// key -> (value, line)
    values: BTreeMap<String, (Value, usize)>,
}

impl FileValues {
    fn read(overrides: &Overrides, var: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let named = overrides.file.clone().or_else(|| var("SATGRID_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| places::config_file(var));
        let path = std::path::absolute(&path).unwrap_or(path);
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(FileValues { path: None, folder, values: BTreeMap::new() });
            }
            Err(source) => return Err(ConfigError::Unreadable { path, source }),
        };
        let values = parse_file(&path, &text)?;
        Ok(FileValues { path: Some(path), folder, values })
    }
}

fn parse_file(path: &Path, text: &str) -> Result<BTreeMap<String, (Value, usize)>, ConfigError> {
    let syntax = |source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) };
    let mut table: toml::Table = toml::from_str(text).map_err(syntax)?;
    let spans = toml::de::DeTable::parse(text).map_err(syntax)?;
    let line_at = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
    let unknown = |line, key: String, meant| ConfigError::UnknownKey { path: path.to_owned(), line, key, meant };

    let mut values = BTreeMap::new();
    for (section, content) in spans.get_ref() {
        let name = section.get_ref().as_ref();
        let line = line_at(section.span().start);
        let (true, Some(inner)) = (SECTIONS.iter().any(|(known, _)| *known == name), content.get_ref().as_table())
        else {
            let meant = did_you_mean(name, SECTIONS.iter().map(|(known, _)| *known)).map(|s| format!("[{s}]"));
            return Err(unknown(line, name.to_owned(), meant));
        };
        for (key, content) in inner {
            let full = format!("{name}.{}", key.get_ref());
            let line = line_at(key.span().start);
            let Some(known) = keys::find(&full) else {
                return Err(unknown(line, full.clone(), meant_key(&full)));
            };
            if let (Kind::Tables(fields), Some(rows)) = (known.kind, content.get_ref().as_array()) {
                for (field, _) in rows.iter().filter_map(|row| row.get_ref().as_table()).flatten() {
                    let field_name = field.get_ref().as_ref();
                    if !fields.contains(&field_name) {
                        let meant = did_you_mean(field_name, fields.iter().copied()).map(str::to_owned);
                        return Err(unknown(line_at(field.span().start), format!("{full}.{field_name}"), meant));
                    }
                }
            }
            let value = table.get_mut(name).and_then(Value::as_table_mut).and_then(|t| t.remove(known.name()));
            if let Some(value) = value {
                values.insert(full, (value, line));
            }
        }
    }
    Ok(values)
}

/// The full key that a wrong one most likely meant: a near name in its section, else the same name in another.
fn meant_key(full: &str) -> Option<String> {
    let (section, name) = full.split_once('.').unwrap_or(("", full));
    let here = KEYS.iter().filter(|key| key.section() == section);
    did_you_mean(name, here.map(Key::name))
        .map(|name| format!("{section}.{name}"))
        .or_else(|| KEYS.iter().find(|key| key.name() == name).map(|key| key.path.to_owned()))
        .or_else(|| did_you_mean(full, KEYS.iter().map(|key| key.path)).map(str::to_owned))
}

fn flag_values(overrides: &Overrides) -> Result<BTreeMap<&str, (String, String)>, ConfigError> {
    let mut values = BTreeMap::new();
    for (flag, key, text) in &overrides.values {
        if keys::find(key).is_none() {
            return Err(ConfigError::UnknownFlagKey { flag: flag.clone(), key: key.clone(), meant: meant_key(key) });
        }
        values.insert(key.as_str(), (flag.clone(), text.clone()));
    }
    Ok(values)
}

/// A misspelt variable would be silently ignored, so it is named.
fn stray_variables(env: &BTreeMap<String, String>) -> Vec<String> {
    env.keys()
        .filter(|name| name.starts_with(ENV_PREFIX) && !ENV_OTHER.contains(&name.as_str()))
        .filter(|name| !KEYS.iter().any(|key| key.env_name() == **name))
        .map(|name| {
            let names: Vec<String> = KEYS.iter().map(Key::env_name).collect();
            match did_you_mean(name, names.iter().map(String::as_str)) {
                Some(meant) => format!("the environment variable {name} is no setting; did you mean {meant}?"),
                None => format!("the environment variable {name} is no setting and is ignored"),
            }
        })
        .collect()
}

fn parse_text(key: &Key, text: &str, origin: &Origin) -> Result<Value, ConfigError> {
    let wrong = || type_error(key, origin, format!("{text:?}"));
    match key.kind {
        Kind::Text | Kind::Path | Kind::Secret => Ok(Value::String(text.to_owned())),
        Kind::Number => text.replace('_', "").parse().map(Value::Integer).map_err(|_| wrong()),
        Kind::Switch => text.parse().map(Value::Boolean).map_err(|_| wrong()),
        Kind::Texts => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Ok(Value::Array(parts.map(|part| Value::String(part.to_owned())).collect()))
        }
        Kind::Tables(_) => Err(wrong()),
    }
}

fn check_kind(key: &Key, value: &Value, origin: &Origin) -> Result<(), ConfigError> {
    let fits = match key.kind {
        Kind::Text | Kind::Path | Kind::Secret => value.is_str(),
        Kind::Number => value.is_integer(),
        Kind::Switch => value.is_bool(),
        Kind::Texts => value.as_array().is_some_and(|list| list.iter().all(Value::is_str)),
        Kind::Tables(_) => value.as_array().is_some_and(|list| list.iter().all(Value::is_table)),
    };
    if fits { Ok(()) } else { Err(type_error(key, origin, format!("a value of type {}", value.type_str()))) }
}

fn type_error(key: &Key, origin: &Origin, found: String) -> ConfigError {
    let expected = match key.kind {
        Kind::Text | Kind::Path => "text",
        Kind::Secret => "env:NAME or file:PATH",
        Kind::Number => "a whole number",
        Kind::Switch => "true or false",
        Kind::Texts => "a list of texts",
        Kind::Tables(_) => "a list of tables, written in the file as [[...]]",
    };
    // What stands where a secret belongs is not repeated.
    let found = if key.kind == Kind::Secret { "what is there".to_owned() } else { found };
    ConfigError::Type { key: key.path.to_owned(), origin: origin.clone(), expected, found }
}

/// Makes the paths in a value absolute.
fn anchor(key: &Key, value: Value, base: &Path, var: &dyn Fn(&str) -> Option<String>) -> Value {
    let path = |text: &str| places::absolute(var, base, text).to_string_lossy().into_owned();
    let secret = |text: &str| match text.strip_prefix("file:") {
        Some(rest) => format!("file:{}", path(rest)),
        None => text.to_owned(),
    };
    match (key.kind, value) {
        (Kind::Path, Value::String(text)) => Value::String(path(&text)),
        (Kind::Secret, Value::String(text)) => Value::String(secret(&text)),
        (Kind::Tables(_), Value::Array(mut rows)) => {
            for row in rows.iter_mut().filter_map(Value::as_table_mut) {
                for name in ["path", "head", "tail"] {
                    let Some(Value::String(text)) = row.get_mut(name) else { continue };
                    *text = path(text);
                }
                if let Some(Value::String(text)) = row.get_mut("secret") {
                    *text = secret(text);
                }
            }
            Value::Array(rows)
        }
        (_, value) => value,
    }
}

/// The typed configuration, one section after the other so that a fault can be traced to its key.
fn typed(entries: &[Entry]) -> Result<Config, ConfigError> {
    let mut root = toml::Table::new();
    for (section, _) in SECTIONS {
        root.insert((*section).to_owned(), Value::Table(toml::Table::new()));
    }
    for entry in entries {
        if let (Some(value), Some(section)) =
            (&entry.value, root.get_mut(entry.key.section()).and_then(Value::as_table_mut))
        {
            section.insert(entry.key.name().to_owned(), value.clone());
        }
    }
    Config::deserialize(Value::Table(root)).map_err(|error| {
        let text = error.to_string();
        let (reason, place) = text.trim_end().split_once("\nin `").unwrap_or((text.trim_end(), ""));
        let place = place.trim_end_matches('`');
        let entry = entries.iter().find(|entry| {
            place.strip_prefix(entry.key.path).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        });
        ConfigError::Value {
            key: if place.is_empty() { "configuration".to_owned() } else { place.to_owned() },
            origin: entry.map(|entry| entry.origin.clone()),
            reason: reason.to_owned(),
        }
    })
}

#[cfg(test)]
mod tests;
