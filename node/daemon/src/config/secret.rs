//! Secrets are never written in the configuration: it says where they are (`env:NAME` or `file:PATH`).

use serde::Deserialize;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A reference to a secret. Printing it shows the reference, never the value.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Secret {
    Env(String),
    File(PathBuf),
    /// A credential that systemd gave this service (`LoadCredentialEncrypted=`): encrypted on disk, decrypted in memory.
    Credential(String),
    /// A file descriptor that this process inherited, such as a pipe; it can be read once.
    Fd(u32),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    #[error("the environment variable {0} is not set")]
    Unset(String),
    #[error("cannot read {path}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} can be read by others (mode {mode:o})")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("no credential {0}: this process has none, or systemd gave it others")]
    NoCredential(String),
    #[error("file descriptor {fd} cannot be read")]
    Descriptor { fd: u32, source: std::io::Error },
    #[error("{0} is empty")]
    Empty(Secret),
}

impl Secret {
    /// The value, without the line end that editors add.
    pub(crate) fn read(&self) -> Result<String, SecretError> {
        let text = match self {
            Secret::Env(name) => std::env::var(name).map_err(|_| SecretError::Unset(name.clone()))?,
            Secret::File(path) => read_private(path)?,
            Secret::Credential(name) => {
                let dir = std::env::var_os("CREDENTIALS_DIRECTORY");
                let path = dir.map(|dir| PathBuf::from(dir).join(name)).filter(|path| path.is_file());
                read_private(&path.ok_or_else(|| SecretError::NoCredential(name.clone()))?)?
            }
            Secret::Fd(fd) => std::fs::read_to_string(format!("/dev/fd/{fd}"))
                .map_err(|source| SecretError::Descriptor { fd: *fd, source })?,
        };
        let value = text.trim_end_matches(['\r', '\n']);
        if value.is_empty() { Err(SecretError::Empty(self.clone())) } else { Ok(value.to_owned()) }
    }
}

fn read_private(path: &Path) -> Result<String, SecretError> {
    check_private(path)?;
    std::fs::read_to_string(path).map_err(|source| SecretError::Unreadable { path: path.to_owned(), source })
}

/// Only the owner may read a secret's file.
fn check_private(path: &Path) -> Result<(), SecretError> {
    let metadata =
        std::fs::metadata(path).map_err(|source| SecretError::Unreadable { path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(SecretError::Exposed { path: path.to_owned(), mode }) }
}

impl TryFrom<String> for Secret {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(Secret::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Secret::File(PathBuf::from(path))),
            Some(("credential", name)) if !name.is_empty() && !name.contains('/') => {
                Ok(Secret::Credential(name.to_owned()))
            }
            Some(("fd", number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                number.parse().map(Secret::Fd).map_err(|_| "fd:NUMBER, such as fd:3".to_owned())
            }
            // The text is not repeated: it may well be the secret itself.
            _ => Err(
                "a secret is never written here; say where it is: env:NAME, file:PATH, credential:NAME or fd:NUMBER"
                    .to_owned(),
            ),
        }
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::Env(name) => write!(f, "env:{name}"),
            Secret::File(path) => write!(f, "file:{}", path.display()),
            Secret::Credential(name) => write!(f, "credential:{name}"),
            Secret::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_only() {
        assert_eq!(Secret::try_from("env:TOKEN".to_owned()).unwrap(), Secret::Env("TOKEN".into()));
        assert_eq!(Secret::try_from("fd:3".to_owned()).unwrap(), Secret::Fd(3));
        for bare in ["hunter2", "env:", "file:", "fd:hunter2", "sk-abc:def"] {
            let error = Secret::try_from(bare.to_owned()).unwrap_err();
            assert!(!error.contains("hunter2") && error.contains("env:NAME"), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        std::fs::write(&path, "hunter2\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let secret = Secret::File(path.clone());
        assert!(matches!(secret.read(), Err(SecretError::Exposed { mode: 0o644, .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(secret.read().unwrap(), "hunter2");
        assert!(matches!(Secret::Env("SATGRID_NO_SUCH".into()).read(), Err(SecretError::Unset(_))));
    }
}
