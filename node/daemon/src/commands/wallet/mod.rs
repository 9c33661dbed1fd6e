//! `satgrid wallet ...`: asks the running node over its admin port.

mod apps;
mod channels;
mod money;
mod qr;
mod restore;
mod show;
mod sweep;
mod vault;

use super::admin_client::Admin;
use crate::cli::{Globals, WalletCommand};
use serde_json::{Value, json};
use std::time::Duration;

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(500);

pub(super) fn run(globals: &Globals, command: &WalletCommand) -> anyhow::Result<()> {
    let config = globals.load()?.config;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // These work on a node that is stopped, too.
    if let WalletCommand::Restore(args) = command
        && !args.status
    {
        return runtime.block_on(restore::restore(globals.format, &config, args));
    }
    if let WalletCommand::Cold(command) = command {
        return runtime.block_on(sweep::cold(globals.format, &config, command));
    }
    if let WalletCommand::Encrypt { .. } | WalletCommand::Decrypt = command {
        return vault::change(globals.format, &config, command);
    }
    let admin = Admin::of(&config)?;
    runtime.block_on(async {
        let format = globals.format;
        match command {
            WalletCommand::Balance => show::balance(format, &admin.get("wallet").await?),
            WalletCommand::Channels => show::channels(format, &admin.get("wallet").await?),
            WalletCommand::Receive(args) => money::receive(format, &admin, args).await,
            WalletCommand::Address => money::address(format, &admin).await,
            WalletCommand::Pay(args) => money::pay(format, &admin, args).await,
            WalletCommand::Send(args) => money::send(format, &admin, args).await,
            WalletCommand::Open(args) => channels::open(format, &admin, args).await,
            WalletCommand::Close { channel, force } => channels::close(format, &admin, channel, *force).await,
            WalletCommand::Fees => {
                let chain = money::chain_fees(config.wallet.chain.as_ref()).await;
                show::fees(format, &admin.get("wallet/fees").await?, chain)
            }
            WalletCommand::History { all } => show::history(format, &admin.get("wallet/payments").await?, *all),
            WalletCommand::Backup { file } => money::backup(&admin, file.as_deref()).await,
            WalletCommand::Sweep(args) => sweep::sweep(format, &admin, args).await,
            WalletCommand::Cold(command) => sweep::cold(format, &config, command).await,
            WalletCommand::Restore(_) => restore::status(format, &admin.get("wallet/restore").await?),
            WalletCommand::App(command) => apps::run(format, &admin, command).await,
            WalletCommand::Encrypt { .. } | WalletCommand::Decrypt => vault::change(format, &config, command),
            WalletCommand::Refund { session } => {
                admin.post(&format!("sessions/{session}/close"), &json!({})).await?;
                eprintln!("asked; the refund arrives as a payment, or the ledger shows a credit note");
                Ok(())
            }
        }
    })
}

/// Millisatoshi as people read them.
fn sats(msat: &Value) -> String {
    match msat.as_u64() {
        None => "-".to_owned(),
        Some(msat) if msat % 1_000 == 0 => format!("{} sat", msat / 1_000),
        Some(msat) => format!("{}.{:03} sat", msat / 1_000, msat % 1_000),
    }
}
