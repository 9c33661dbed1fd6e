//! The front door's certificate from an authority (ACME, RFC 8555), proved on the door's own port (TLS-ALPN-01), kept on disk
//! and renewed when a third of its life is left. Nothing that goes wrong here closes the door: what was signed before serves on.
//!
//! | state | awaits | a crash there means |
//! |---|---|---|
//! | nothing on disk | an order, tried again from 5 minutes on, twice as long each time, 6 hours at most | a new order; the account is kept |
//! | a certificate serves | the last third of its life | it serves again at once |
//! | renewing | the new one; the old one serves meanwhile | as above |
//!
//! The authority learns the names, the contact and this port; no key leaves this machine.

mod authority;
mod kept;

pub(crate) use kept::Kept;

use crate::config;
use crate::drive;
use satgrid_api::{Certificates, Tls};
use std::{path::Path, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

use super::life::Life;

const FIRST_RETRY: Duration = Duration::from_secs(5 * 60);
const LAST_RETRY: Duration = Duration::from_secs(6 * 3_600);
/// The clock may be set while a long sleep goes on.
const LONGEST_SLEEP: Duration = Duration::from_secs(6 * 3_600);

/// Who keeps which certificate.
struct Keeper {
    settings: config::Acme,
    kept: Kept,
    certificates: Arc<Certificates>,
}

/// Begins to keep a certificate. What is on disk serves at once; where there is none, handshakes fail until the first is made.
pub(crate) fn start(settings: config::Acme, data_dir: &Path, shutdown: CancellationToken) -> anyhow::Result<Tls> {
    let kept = Kept::of(&settings, data_dir);
    kept.make_folder()?;
    let certificates = Arc::new(Certificates::default());
    let keeper = Keeper { settings, kept, certificates: Arc::clone(&certificates) };
    let tls = Tls::managed(certificates)?;
    let life = keeper.take_up();
    tokio::spawn(async move { shutdown.run_until_cancelled(keeper.keep(life)).await });
    Ok(tls)
}

impl Keeper {
    /// The certificate on disk serves, if it does still.
    fn take_up(&self) -> Option<Life> {
        let taken = || -> anyhow::Result<Option<Life>> {
            let Some(held) = self.kept.held()?.filter(|held| held.life.ends > unix_now()) else { return Ok(None) };
            self.certificates.set(&held.chain, &held.key)?;
            Ok(Some(held.life))
        };
        taken().unwrap_or_else(|error| {
            tracing::warn!("the front door's certificate on disk is not used: {error:#}");
            None
        })
    }

    async fn keep(self, mut life: Option<Life>) {
        let mut retry = FIRST_RETRY;
        loop {
            let due = life.map_or(Duration::ZERO, |life| life.until_renewal(unix_now()));
            if !due.is_zero() {
                tracing::debug!(
                    days = due.as_secs() / 86_400,
                    "the front door's certificate is renewed in so many days"
                );
                tokio::time::sleep(due.min(LONGEST_SLEEP)).await;
                continue;
            }
            match self.renew().await {
                Ok(fresh) => {
                    tracing::info!(domains = ?self.settings.domains, "the front door has a new certificate");
                    life = Some(fresh);
                    retry = FIRST_RETRY;
                }
                Err(why) => {
                    let left = life.map_or(0, |life| life.ends.saturating_sub(unix_now()) / 3_600);
                    let again = retry.as_secs();
                    tracing::error!(hours_left = left, again_in_s = again, "no certificate for the front door: {why}");
                    self.kept.keep_failure(&why);
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// A fresh certificate, on disk and served. On disk first: what serves is what a restart would serve.
    async fn renew(&self) -> Result<Life, String> {
        let asked = authority::order(&self.settings, &self.kept, &self.certificates).await;
        self.certificates.forget_answers();
        let held = asked.map_err(|error| match error.hint(&self.settings) {
            Some(hint) => format!("{error}; {hint}"),
            None => error.to_string(),
        })?;
        self.kept.keep(&held).map_err(|error| format!("{error:#}"))?;
        self.certificates.set(&held.chain, &held.key).map_err(|error| error.to_string())?;
        Ok(held.life)
    }
}

fn unix_now() -> u64 {
    drive::now().as_secs()
}

#[cfg(test)]
mod tests;
