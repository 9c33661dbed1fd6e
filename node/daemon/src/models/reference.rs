//! What `satgrid models pull` takes: a name of the catalogue, a file on the hub, or a file here.

use std::path::PathBuf;

use super::catalogue::{self, Entry};

#[derive(Debug)]
pub(crate) enum Reference {
    Catalogue(&'static Entry),
    Hub(HubFile),
    Local(PathBuf),
}

/// `hf:ORG/REPO/FILE.gguf[@REVISION][#sha256=HEX]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubFile {
    /// `org/repo`
    pub repo: String,
    /// Path in the repository.
    pub file: String,
    pub revision: String,
    /// Lower-case hex.
    pub sha256: Option<String>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReferenceError {
    #[error("{0:?} is neither a model of the catalogue, nor hf:ORG/REPO/FILE.gguf, nor a file")]
    Unknown(String),
    #[error("{0:?} is not of the form hf:ORG/REPO/FILE.gguf[@REVISION][#sha256=HEX]")]
    Hub(String),
    #[error("{0:?} is not a SHA-256: 64 hex digits are")]
    Hash(String),
}

impl ReferenceError {
    pub(crate) fn hint(&self) -> String {
        let names: Vec<&str> = catalogue::CATALOGUE.iter().map(|entry| entry.name).collect();
        format!("the catalogue has: {}", names.join(", "))
    }
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Reference, ReferenceError> {
        if let Some(rest) = text.strip_prefix("hf:") {
            return HubFile::parse(rest).map(Reference::Hub);
        }
        if let Some(entry) = catalogue::find(text) {
            return Ok(Reference::Catalogue(entry));
        }
        let path = PathBuf::from(text);
        // A name with a slash or an ending is meant as a path, and "no such file" says more than "unknown".
        if path.exists() || text.contains('/') || text.ends_with(".gguf") {
            Ok(Reference::Local(path))
        } else {
            Err(ReferenceError::Unknown(text.to_owned()))
        }
    }
}

impl HubFile {
    fn parse(text: &str) -> Result<HubFile, ReferenceError> {
        let wrong = || ReferenceError::Hub(format!("hf:{text}"));
        let (rest, sha256) = match text.split_once("#sha256=") {
            Some((rest, hash)) => (rest, Some(parse_sha256(hash)?)),
            None => (text, None),
        };
        let (rest, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let mut pieces = rest.splitn(3, '/');
        let (Some(org), Some(repo), Some(file)) = (pieces.next(), pieces.next(), pieces.next()) else {
            return Err(wrong());
        };
        let parts = [org, repo, revision].into_iter().chain(file.split('/'));
        if parts.into_iter().any(|part| part.is_empty() || part == "." || part == ".." || part.contains(['#', '?'])) {
            return Err(wrong());
        }
        let (repo, file, revision) = (format!("{org}/{repo}"), file.to_owned(), revision.to_owned());
        Ok(HubFile { repo, file, revision, sha256 })
    }

    /// The reference without its hash.
    pub(crate) fn text(&self) -> String {
        format!("hf:{}/{}@{}", self.repo, self.file, self.revision)
    }
}

fn parse_sha256(hash: &str) -> Result<String, ReferenceError> {
    let lower = hash.to_lowercase();
    let valid = lower.len() == 64 && hex::decode(&lower).is_ok();
    if valid { Ok(lower) } else { Err(ReferenceError::Hash(hash.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_references() {
        let file = |repo: &str, file: &str, revision: &str, sha256: Option<String>| HubFile {
            repo: repo.into(),
            file: file.into(),
            revision: revision.into(),
            sha256,
        };
        let hash = "A5".repeat(32);
        let check =
            |text: &str, expect: Result<HubFile, ReferenceError>| assert_eq!(HubFile::parse(text), expect, "{text}");
        check("o/r/f.gguf", Ok(file("o/r", "f.gguf", "main", None)));
        check("o/r/d/f.gguf@v1", Ok(file("o/r", "d/f.gguf", "v1", None)));
        check(&format!("o/r/f.gguf@v1#sha256={hash}"), Ok(file("o/r", "f.gguf", "v1", Some("a5".repeat(32)))));
        check("o/r/f.gguf#sha256=12", Err(ReferenceError::Hash("12".into())));
        for bad in ["", "o", "o/r", "o/r/", "o//f.gguf", "o/r/../f", "o/r/f@"] {
            check(bad, Err(ReferenceError::Hub(format!("hf:{bad}"))));
        }
    }

    #[test]
    fn kinds() {
        assert!(matches!(Reference::parse("gemma-3-270m"), Ok(Reference::Catalogue(_))));
        assert!(matches!(Reference::parse("/tmp/none.gguf"), Ok(Reference::Local(_))));
        assert!(matches!(Reference::parse("llama-70b"), Err(ReferenceError::Unknown(_))));
    }
}
