//! A node whose key was rotated or revoked: its journal says so before anything is signed by the newer key, and relays hear it.

use super::open::Keys;
use crate::config::Config;
use crate::drive::journal::JournalWriter;
use crate::identity;
use crate::store::Store;
use satgrid_ledger::entry::{Draft, Evidence};
use satgrid_node::recover::Recovered;
use std::time::Duration;

/// Between two tries to reach relays that did not hear it.
const TELL_EVERY: Duration = Duration::from_secs(60);

pub(super) async fn follow(
    config: &Config,
    keys: &Keys,
    recovered: &Recovered,
    writer: &JournalWriter,
    journal: &Store,
) -> anyhow::Result<()> {
    if let Some(genesis) = recovered.genesis {
        let unwritten = identity::unwritten(&keys.seed, &keys.standing, genesis, recovered.successions)?;
        if !unwritten.is_empty() {
            let drafts = unwritten.into_iter().map(|signed| Draft::of(Evidence::Succession(signed))).collect();
            writer.append(drafts).await.map_err(anyhow::Error::msg)?;
            // From here on the log's heads are the newest key's.
            journal.checkpoint(&keys.identity).await?;
            tracing::info!(index = keys.standing.index, "this node's key was rotated or revoked; the ledger says so");
        }
    }
    if let Some(said) = keys.standing.revoked() {
        tracing::warn!(
            why = said.why.name(),
            "this node's key is revoked: it pays back what it owes and lists nothing for sale"
        );
    }
    let events = keys.standing.events(&keys.seed)?;
    tokio::spawn(identity::tell(config.market.relays.clone(), events, TELL_EVERY));
    Ok(())
}
