//! Connecting other apps to this wallet.

use super::{qr, sats};
use crate::cli::{AppCommand, Format};
use crate::commands::{admin_client::Admin, print};
use serde_json::json;

pub(super) async fn run(format: Format, admin: &Admin, command: &AppCommand) -> anyhow::Result<()> {
    match command {
        AppCommand::Add { name, budget_sat, renewal } => {
            let new = json!({ "name": name, "budget_msat": budget_sat.saturating_mul(1_000), "renewal": renewal });
            let made = admin.post("wallet/apps", &new).await?;
            if format == Format::Json {
                return print::json(&made);
            }
            let uri = made["uri"].as_str().unwrap_or_default();
            if let Some(code) = qr::lines(uri) {
                print::out(&code)?;
            }
            eprintln!("give this to the app; whoever has it may spend up to {budget_sat} sat. It is not shown again.");
            print::out(uri)
        }
        AppCommand::List => {
            let apps = admin.get("wallet/apps").await?;
            if format == Format::Json {
                return print::json(&apps);
            }
            let rows = apps.as_array().into_iter().flatten().map(|app| {
                let text = |key: &str| app[key].as_str().unwrap_or("-").to_owned();
                vec![text("name"), sats(&app["budget_msat"]), text("renewal"), sats(&app["left_msat"])]
            });
            print::out(&print::table(&["APP", "BUDGET", "RENEWED", "LEFT"], rows.collect()))
        }
        AppCommand::Revoke { name } => {
            admin.post("wallet/apps/revoke", &json!({ "name": name })).await?;
            eprintln!("{name} can no longer use this wallet");
            Ok(())
        }
    }
}
