//! Errors for the person who must act: `error:`, its causes, and `hint:` where one is known.
//!
//! Exit codes: 0 done, 1 it failed or something was found, 2 the command line or the configuration cannot be used.

use std::error::Error;
use std::fmt;

/// An error that knows what to do about it. Prints as the error itself, so the hint never doubles as a cause.
#[derive(Debug)]
pub(crate) struct Hinted {
    error: anyhow::Error,
    hint: String,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl Error for Hinted {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

pub(crate) trait HintExt<T> {
    /// Adds what to do about the error.
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> HintExt<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| anyhow::Error::new(Hinted { error: error.into(), hint: hint.into() }))
    }
}

/// Asks for exit code 2 instead of 1.
#[derive(Debug)]
pub(crate) struct Unusable(pub anyhow::Error);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Error for Unusable {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        // The inner error's own links follow it in the chain.
        Some(self.0.as_ref())
    }
}

/// Something was found and has been printed already; only the exit code is left to say.
#[derive(Debug)]
pub(crate) struct Findings;

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("problems were found")
    }
}

impl Error for Findings {}

/// The lines for standard error.
pub(crate) fn report(error: &anyhow::Error) -> String {
    if error.is::<Findings>() {
        return String::new();
    }
    let mut said: Vec<String> = Vec::new();
    let mut hints = Vec::new();
    for cause in error.chain() {
        if let Some(hinted) = cause.downcast_ref::<Hinted>() {
            hints.push(hinted.hint.clone());
        }
        let text = cause.to_string().trim_end().to_owned();
        // Wrappers repeat what they wrap.
        if !said.iter().any(|earlier| earlier.ends_with(&text)) {
            said.push(text);
        }
    }
    let mut lines = Vec::new();
    for (index, text) in said.iter().enumerate() {
        lines.push(if index == 0 { format!("error: {text}") } else { format!("  because: {text}") });
    }
    lines.extend(hints.iter().map(|hint| format!("hint: {hint}")));
    lines.join("\n") + "\n"
}

pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<Unusable>()) { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn causes_and_hints() {
        let io = std::io::Error::other("no route");
        let result: anyhow::Result<()> = Err(io).context("cannot reach the relay").hint("is it running?");
        let error = result.context("cannot start").unwrap_err();
        let expect =
            "error: cannot start\n  because: cannot reach the relay\n  because: no route\nhint: is it running?\n";
        assert_eq!(report(&error), expect);
        assert_eq!(exit_code(&error), 1);
    }

    #[test]
    fn unusable_is_said_once_and_exits_2() {
        let inner: anyhow::Result<()> = Err(std::io::Error::other("bad key")).hint("spell it");
        let error = anyhow::Error::new(Unusable(inner.unwrap_err()));
        assert_eq!(report(&error), "error: bad key\nhint: spell it\n");
        assert_eq!(exit_code(&error), 2);
        assert_eq!(report(&anyhow::Error::new(Findings)), "");
    }
}
