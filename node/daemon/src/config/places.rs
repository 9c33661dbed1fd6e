//! Where things are by default: the XDG folders, and paths as people write them.

use std::path::{Component, Path, PathBuf};

use super::types::Network;

/// An XDG base folder: the variable where it holds an absolute path, else `fallback` below the home folder.
fn xdg(env: &dyn Fn(&str) -> Option<String>, variable: &str, fallback: &str) -> PathBuf {
    env(variable).map(PathBuf::from).filter(|path| path.is_absolute()).unwrap_or_else(|| home(env).join(fallback))
}

fn home(env: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    env("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// `~/.config/satgrid/satgrid.toml`
pub(crate) fn config_file(env: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    xdg(env, "XDG_CONFIG_HOME", ".config").join("satgrid/satgrid.toml")
}

/// `~/.local/share/satgrid/NETWORK`: networks never share a seed or a ledger.
pub(crate) fn data_dir(env: &dyn Fn(&str) -> Option<String>, network: Network) -> PathBuf {
    xdg(env, "XDG_DATA_HOME", ".local/share").join("satgrid").join(network.name())
}

/// `~/.cache/satgrid/models`
pub(super) fn models_dir(env: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    xdg(env, "XDG_CACHE_HOME", ".cache").join("satgrid/models")
}

/// Expands `~/`, anchors a relative path at `base` and removes `.` parts.
pub(super) fn absolute(env: &dyn Fn(&str) -> Option<String>, base: &Path, text: &str) -> PathBuf {
    let path = match text.strip_prefix("~/") {
        Some(rest) => home(env).join(rest),
        None => base.join(text),
    };
    path.components().filter(|part| !matches!(part, Component::CurDir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders() {
        let env = |name: &str| match name {
            "HOME" => Some("/h".to_owned()),
            "XDG_DATA_HOME" => Some("relative/is/ignored".to_owned()),
            "XDG_CACHE_HOME" => Some("/c".to_owned()),
            _ => None,
        };
        assert_eq!(config_file(&env), Path::new("/h/.config/satgrid/satgrid.toml"));
        assert_eq!(data_dir(&env, Network::Signet), Path::new("/h/.local/share/satgrid/signet"));
        assert_eq!(models_dir(&env), Path::new("/c/satgrid/models"));
        let check = |text: &str, expect: &str| assert_eq!(absolute(&env, Path::new("/base"), text), Path::new(expect));
        check("~/models/x.gguf", "/h/models/x.gguf");
        check("./x", "/base/x");
        check("/abs", "/abs");
    }
}
