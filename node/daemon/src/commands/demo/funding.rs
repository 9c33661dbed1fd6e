//! From running processes to a market that can trade: coins, channels, listings.

use anyhow::{Context, bail};
use futures::future::try_join_all;
use satgrid_types::Msat;
use std::time::{Duration, Instant};

use super::nodes::Market;

/// A regtest address whose key nobody has.
pub(super) const NOBODY: &str = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202";
/// Blocks on top of a coinbase before it may be spent.
const MATURITY: u32 = 100;
/// Blocks in which a channel is safe for both sides by default.
const CONFIRMATIONS: u32 = 6;
const CHANNEL_SAT: u64 = 100_000;
/// Given to each provider with its channel: a payee can only pay back what lies above its reserve of 1 %.
const PUSH: Msat = Msat::sat(5_000);
const WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// A block reward for each provider (for the fees of a force-close), and one for each channel of the consumer.
pub(super) async fn fund(market: &mut Market) -> anyhow::Result<()> {
    let rpc = market.rpc()?;
    for node in market.nodes() {
        let address = node.admin.new_address().await?;
        let rewards = if node.output_price.is_some() { 1 } else { market.providers.len() };
        rpc.mine(u32::try_from(rewards)?, &address).await?;
    }
    rpc.mine(MATURITY, NOBODY).await?;
    sync_all(market).await?;
    for node in market.nodes() {
        if node.admin.wallet().await?.balance.onchain_confirmed_sat == 0 {
            bail!("{} sees no coins although they are {MATURITY} blocks deep", node.name);
        }
    }
    market.clock.say("block rewards for all three wallets, mature");
    Ok(())
}

/// A channel from the consumer to each provider, mined in, usable on both ends.
pub(super) async fn open_channels(market: &mut Market) -> anyhow::Result<()> {
    let rpc = market.rpc()?;
    let consumer = market.consumer()?.admin.clone();
    for (opened, provider) in market.providers.iter().enumerate() {
        let peer = provider.identity()?;
        let opening = consumer.open_channel(peer.lightning_node, peer.lightning_listen, CHANNEL_SAT, PUSH).await;
        opening.with_context(|| format!("no channel to {}", provider.name))?;
        // The next funding transaction must not spend the coin of this one.
        wait("a funding transaction", || async { Ok((rpc.waiting().await? > opened).then_some(())) }).await?;
        consumer.sync().await?;
    }
    rpc.mine(CONFIRMATIONS, NOBODY).await?;
    let deadline = Instant::now() + WITHIN;
    loop {
        market.check()?;
        sync_all(market).await?;
        let waited = Instant::now();
        while waited.elapsed() < Duration::from_secs(1) {
            if all_usable(market).await? {
                let text =
                    format!("a channel of {CHANNEL_SAT} sat to each provider, {CONFIRMATIONS} blocks deep and usable");
                market.clock.say(text);
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
        if Instant::now() > deadline {
            bail!("the channels are not usable after {} s", WITHIN.as_secs());
        }
        rpc.mine(1, NOBODY).await?;
    }
}

async fn all_usable(market: &Market) -> anyhow::Result<bool> {
    for node in market.nodes() {
        let wanted = if node.output_price.is_some() { 1 } else { market.providers.len() };
        let wallet = node.admin.wallet().await?;
        if wallet.channels.iter().filter(|channel| channel.usable).count() < wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Every wallet looks at the chain now: payer and payee must agree on the height.
async fn sync_all(market: &Market) -> anyhow::Result<()> {
    try_join_all(market.nodes().map(|node| node.admin.sync())).await.map(drop)
}

/// Until the consumer has heard of both providers and its gateway says that it is ready.
pub(super) async fn wait_for_listings(market: &mut Market) -> anyhow::Result<()> {
    let consumer = market.consumer()?.admin.clone();
    let wanted = market.providers.len();
    wait("the providers' listings at the consumer", || async {
        Ok((consumer.status().await?.listings >= wanted).then_some(()))
    })
    .await?;
    let health = format!("{}/health", market.api_url().trim_end_matches("/v1"));
    let client = reqwest::Client::builder().no_proxy().build()?;
    wait("the gateway's health", || async {
        Ok(client.get(&health).send().await?.status().is_success().then_some(()))
    })
    .await?;
    market
        .clock
        .say(format!("the consumer has verified {wanted} listings; the gateway is ready at {}", market.api_url()));
    Ok(())
}

/// Starts providers again that the demo killed: their wallets and ledgers are part of the bill.
pub(super) async fn revive(market: &mut Market) -> anyhow::Result<()> {
    let dead: Vec<&'static str> =
        market.providers.iter().filter(|node| !node.is_running()).map(|node| node.name).collect();
    if dead.is_empty() {
        return Ok(());
    }
    for name in dead {
        market.restart(name).await?;
    }
    // What was on its way to it when it died is decided once the peers have found each other. ldk-node 0.7.1 may also
    // close such a channel by force; then the bill says so.
    let usable = wait("the channels after the kill", || async { Ok(all_usable(market).await?.then_some(())) }).await;
    market.clock.say(match usable {
        Ok(()) => "its channel is usable again".to_owned(),
        Err(error) => format!("{error}"),
    });
    Ok(())
}

/// Asks until there is an answer. Errors count as none until the time is over.
pub(super) async fn wait<T, F>(what: &str, mut ask: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<Option<T>>>,
{
    let deadline = Instant::now() + WITHIN;
    loop {
        let last = match ask().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > deadline {
            let missing = format!("{what} did not come within {} s", WITHIN.as_secs());
            return Err(match last {
                Some(error) => error.context(missing),
                None => anyhow::anyhow!(missing),
            });
        }
        tokio::time::sleep(POLL).await;
    }
}
