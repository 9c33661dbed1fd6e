//! Sweeps: by schedule as the configuration says, and by hand as the operator asks; one at a time.
//!
//! What is decided stands in `wallet::sweep`; here it is carried out. Every sweep is kept in `sweeps.json` below the
//! node's folder, before anything is sent, so that a crash never makes a second one of the same moment. A payment's fate
//! is the wallet's to tell, as of every payment; in the books a sweep is the operator's own money.

use super::{bookkeeper::Own, channels::write, now};
use crate::{
    config::Config,
    lnurl::{self, Named},
};
use anyhow::{Context, bail, ensure};
use satgrid_types::{Msat, UnixMs};
use satgrid_wallet::{
    Balance, Embedded, PayError,
    embedded::{OnchainDraft, OnchainSend, SendError},
    invoice,
    sweep::{Destination, Rules, Sweep, Swept, TooDear},
};
use satgrid_wallet_ldk::{Cold, ColdKeys};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

const FILE: &str = "sweeps.json";
/// How often the purse is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// After a sweep that failed the next try waits so long.
const AGAIN_MS: u64 = 10 * 60 * 1_000;
/// Sweeps that are remembered.
const REMEMBERED: usize = 1_000;

/// What an operator may say beside the configuration.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ask {
    pub to: Option<String>,
    pub keep_sat: Option<u64>,
    pub sat_per_vb: Option<u32>,
    pub label: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Preview {
    #[serde(flatten)]
    pub sweep: Sweep,
    pub holds_sat: u64,
    pub keep_sat: u64,
    pub anchor_reserve_sat: u64,
    pub sat_per_vb: Option<u32>,
    /// On chain: the transaction that would be sent.
    pub onchain: Option<OnchainDraft>,
    /// Why the schedule would not send it now.
    pub waits: Option<String>,
}

/// Whether an operator has seen what miners get. Where nobody has, it is held to the configured cap.
#[derive(Clone, Copy)]
enum MinersFee {
    Seen,
    Unseen,
}

pub(crate) struct Sweeper {
    wallet: Arc<dyn Embedded>,
    own: Own,
    rules: Option<Rules>,
    defaults: Rules,
    sat_per_vb: Option<u32>,
    cold: (satgrid_wallet::Network, ColdKeys),
    dir: PathBuf,
    one: Mutex<()>,
}

/// What the configuration says of sweeps.
pub(crate) fn rules(config: &Config, to: Destination) -> Rules {
    let wallet = &config.wallet;
    Rules {
        to,
        above_sat: wallet.sweep_above_sat,
        keep_sat: wallet.sweep_keep_sat,
        every_ms: wallet.sweep_every_s.saturating_mul(1_000),
        max_fee_permille: wallet.sweep_max_fee_permille,
        max_onchain_fee_permille: wallet.sweep_max_onchain_fee_permille,
    }
}

impl Sweeper {
    pub(crate) fn new(
        config: &Config,
        wallet: Arc<dyn Embedded>,
        own: Own,
        cold: (satgrid_wallet::Network, ColdKeys),
    ) -> anyhow::Result<Sweeper> {
        let to = config.wallet.sweep_to.as_deref().map(str::parse::<Destination>).transpose();
        let to = to.context("wallet.sweep_to")?;
        Ok(Sweeper {
            wallet,
            own,
            defaults: rules(config, to.clone().unwrap_or(Destination::Cold)),
            rules: to.map(|to| rules(config, to)),
            sat_per_vb: config.wallet.sweep_fee_rate,
            cold,
            dir: config.node.dir.clone(),
            one: Mutex::new(()),
        })
    }

    /// By schedule, until the node stops.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let Some(rules) = self.rules.clone() else { return };
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut failed: Option<UnixMs> = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = look.tick() => {}
            }
            if failed.is_some_and(|at| now().since(at) < AGAIN_MS) {
                continue;
            }
            match self.by_schedule(&rules).await {
                Ok(None) => {}
                Ok(Some(swept)) => tracing::info!(to = swept.to, sat = swept.amount_sat, by = swept.by, "swept"),
                Err(error) => {
                    failed = Some(now());
                    match error.downcast_ref::<TooDear>() {
                        Some(why) => tracing::info!(%why, "a sweep waits for lower fees"),
                        None => tracing::warn!(error = format!("{error:#}"), "a sweep was not made"),
                    }
                }
            }
        }
    }

    /// The sweep that is due, if one is. One that waits for lower fees is an error, [`TooDear`].
    async fn by_schedule(&self, rules: &Rules) -> anyhow::Result<Option<Swept>> {
        let due = |last: Option<UnixMs>, balance: &Balance| -> anyhow::Result<Option<Sweep>> {
            Ok(rules.due(now(), last, balance))
        };
        self.carry_out(due, self.sat_per_vb, MinersFee::Unseen, Some("by schedule".to_owned())).await
    }

    fn asked(&self, ask: &Ask) -> anyhow::Result<Rules> {
        let mut rules = match (&ask.to, &self.rules) {
            (Some(to), _) => Rules { to: to.parse()?, ..self.defaults.clone() },
            (None, Some(rules)) => rules.clone(),
            (None, None) => bail!("no destination: name one with --to, or set wallet.sweep_to"),
        };
        rules.keep_sat = ask.keep_sat.unwrap_or(rules.keep_sat);
        Ok(rules)
    }

    /// What a sweep would do now. Nothing is sent.
    pub(crate) async fn preview(&self, ask: &Ask) -> anyhow::Result<Preview> {
        let rules = self.asked(ask)?;
        let balance = self.wallet.balance().await?;
        let sweep = rules.plan(&balance)?;
        let sat_per_vb = ask.sat_per_vb.or(self.sat_per_vb);
        let onchain = self.draft(&sweep, sat_per_vb).await?;
        let waits = onchain.as_ref().and_then(|draft| sweep.allows_miners(draft.fee_sat).err());
        Ok(Preview {
            sweep,
            holds_sat: rules.holds_sat(&balance),
            keep_sat: rules.keep_sat,
            anchor_reserve_sat: self.wallet.facts().await?.anchor_reserve_sat,
            // The rate that was shown is the one to send with.
            sat_per_vb: onchain.and_then(|draft| u32::try_from(draft.sat_per_vb).ok()).or(sat_per_vb),
            onchain,
            waits: waits.map(|why| why.to_string()),
        })
    }

    /// The rate to send at by schedule: that of a draft whose fee is within the cap, so that an estimate that rises meanwhile
    /// does not count.
    async fn capped_rate(&self, sweep: &Sweep, sat_per_vb: Option<u32>) -> anyhow::Result<Option<u32>> {
        let Some(draft) = self.draft(sweep, sat_per_vb).await? else { return Ok(None) };
        sweep.allows_miners(draft.fee_sat)?;
        Ok(Some(u32::try_from(draft.sat_per_vb).context("no such fee rate")?))
    }

    /// The transaction of a sweep of coins, made and not sent. The cold account's next address is looked at, not given away.
    async fn draft(&self, sweep: &Sweep, sat_per_vb: Option<u32>) -> anyhow::Result<Option<OnchainDraft>> {
        let address = match &sweep.to {
            Destination::LightningAddress { .. } | Destination::Offer(_) => return Ok(None),
            Destination::OnChain(address) => address.clone(),
            Destination::Cold => Cold::open(&self.dir, self.cold.0, &self.cold.1)?.peek_address(),
        };
        let amount_sat = (!sweep.all).then_some(sweep.amount_sat);
        Ok(Some(self.wallet.draft_onchain(OnchainSend { address, amount_sat, sat_per_vb }).await?))
    }

    /// A sweep now, whatever the schedule says.
    pub(crate) async fn now(&self, ask: &Ask) -> anyhow::Result<Swept> {
        let rules = self.asked(ask)?;
        let planned =
            |_: Option<UnixMs>, balance: &Balance| -> anyhow::Result<Option<Sweep>> { Ok(Some(rules.plan(balance)?)) };
        let swept =
            self.carry_out(planned, ask.sat_per_vb.or(self.sat_per_vb), MinersFee::Seen, ask.label.clone()).await?;
        swept.context("nothing was swept")
    }

    /// What to sweep is decided from the last one's time and from the balance once no other sweep is under way: two that
    /// were planned from one balance would together take what was to stay.
    async fn carry_out(
        &self,
        plan: impl FnOnce(Option<UnixMs>, &Balance) -> anyhow::Result<Option<Sweep>> + Send,
        sat_per_vb: Option<u32>,
        miners_fee: MinersFee,
        label: Option<String>,
    ) -> anyhow::Result<Option<Swept>> {
        let _one = self.one.lock().await;
        let mut list = self.list().context("no sweep without knowing the last one")?;
        let balance = self.wallet.balance().await?;
        let Some(sweep) = plan(list.last().map(|swept| swept.at), &balance)? else { return Ok(None) };
        // Before it is written down: a sweep that waits was not begun, and does not put off the next one.
        let sat_per_vb = match miners_fee {
            MinersFee::Seen => sat_per_vb,
            MinersFee::Unseen => self.capped_rate(&sweep, sat_per_vb).await?,
        };
        list.push(Swept {
            at: now(),
            to: sweep.to.to_string(),
            amount_sat: sweep.amount_sat,
            by: "begun".into(),
            label,
        });
        self.save(&list)?;
        let sent = self.send(&sweep, sat_per_vb).await;
        let last = list.last_mut().context("a sweep was begun")?;
        last.by = match &sent {
            Ok(by) => by.clone(),
            Err(error) => format!("failed: {error:#}"),
        };
        let swept = last.clone();
        if sent.as_ref().is_err_and(sent_nothing) {
            // It does not hold the next one back. What may be out does: the wallet tells what becomes of it.
            list.pop();
        }
        self.save(&list)?;
        sent.map(|_| Some(swept))
    }

    async fn send(&self, sweep: &Sweep, sat_per_vb: Option<u32>) -> anyhow::Result<String> {
        let amount = Msat::from_sat(sweep.amount_sat).context("that amount is not possible")?;
        match &sweep.to {
            Destination::LightningAddress { user, host } => {
                let bolt11 = lnurl::invoice(user, host, amount, Named::ByOwner).await?;
                let facts = invoice::read(&bolt11).context("the address gave no invoice")?;
                ensure!(facts.amount == Some(amount), "the address asks for {:?} instead of {amount}", facts.amount);
                self.own.add(facts.payment_hash);
                self.wallet.pay(&bolt11, sweep.max_fee).await?;
                Ok(facts.payment_hash.to_string())
            }
            Destination::Offer(offer) => Ok(self.wallet.pay_offer(offer, amount, sweep.max_fee).await?),
            Destination::OnChain(address) => self.send_coins(address.clone(), sweep, sat_per_vb).await,
            Destination::Cold => {
                let address = Cold::open(&self.dir, self.cold.0, &self.cold.1)?.next_address(Some("sweep"))?.address;
                self.send_coins(address, sweep, sat_per_vb).await
            }
        }
    }

    async fn send_coins(&self, address: String, sweep: &Sweep, sat_per_vb: Option<u32>) -> anyhow::Result<String> {
        let amount_sat = (!sweep.all).then_some(sweep.amount_sat);
        Ok(self.wallet.send_onchain(OnchainSend { address, amount_sat, sat_per_vb }).await?)
    }

    /// Every sweep, oldest first.
    pub(crate) fn list(&self) -> anyhow::Result<Vec<Swept>> {
        let path = self.dir.join(FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn save(&self, list: &[Swept]) -> anyhow::Result<()> {
        let from = list.len().saturating_sub(REMEMBERED);
        let path = self.dir.join(FILE);
        write(&path, &serde_json::to_string_pretty(&list[from..])?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Whether a sweep that failed has certainly moved nothing.
fn sent_nothing(error: &anyhow::Error) -> bool {
    match (error.downcast_ref::<PayError>(), error.downcast_ref::<SendError>()) {
        (Some(error), _) => error.sent_nothing(),
        (None, Some(error)) => !matches!(error, SendError::Wallet(_)),
        // Before the wallet was asked.
        (None, None) => true,
    }
}

#[cfg(test)]
mod tests;
