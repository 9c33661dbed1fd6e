//! Logs: to standard error, as text or JSON, with a request id on every line that belongs to a request.
//!
//! Prompts, completions, keys and words of a seed are never logged. A request is its id, its model and its counts.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;

/// A bare level is for our own crates, the libraries below stay at `warn`; anything else is taken as it stands.
pub(crate) fn parse_filter(level: &str) -> Result<EnvFilter, ParseError> {
    let bare = level.parse::<tracing::Level>().is_ok() || level == "off";
    if bare { EnvFilter::try_new(format!("warn,satgrid={level}")) } else { EnvFilter::try_new(level) }
}

/// Starts logging for this process; a second call changes nothing.
pub(crate) fn init(level: &str, format: LogFormat) -> Result<(), ParseError> {
    let registry = tracing_subscriber::registry().with(parse_filter(level)?);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => registry.with(layer.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_span_list(false)).try_init(),
    };
    // Only tests start twice in one process.
    let _ = started;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters() {
        for good in ["info", "debug", "off", "info,satgrid=debug", "satgrid_wallet_ldk=trace"] {
            assert!(parse_filter(good).is_ok(), "{good}");
        }
        assert!(parse_filter("satgrid=loud").is_err());
        assert_eq!(parse_filter("debug").unwrap().to_string().split(',').count(), 2);
    }
}
