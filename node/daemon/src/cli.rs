//! The command line: what can be said, not what is done. Doing is in [`crate::commands`].

mod wallet;

pub(crate) use wallet::{
    AppCommand, ColdCommand, OpenArgs, PayArgs, ReceiveArgs, RestoreArgs, SendArgs, SweepArgs, WalletCommand,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use satgrid_types::LayerRange;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::{self, Loaded, LogFormat, Network, Overrides};
use crate::failure::{HintExt, Unusable};
use crate::telemetry;

/// Sell and buy AI inference for sats: a local OpenAI-compatible endpoint, paid in small Lightning slices.
#[derive(Debug, Parser)]
#[command(name = "satgrid", version, propagate_version = true, disable_help_subcommand = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed or something was found, 2 unusable command line or configuration."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command understands.
#[derive(Clone, Debug, Args)]
pub(crate) struct Globals {
    /// Configuration file [default: ~/.config/satgrid/satgrid.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of this node's state (node.dir)
    #[arg(long, global = true, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Bitcoin network (node.network)
    #[arg(long, global = true, value_enum)]
    pub network: Option<Network>,
    /// Any other setting, such as --set api.listen=127.0.0.1:9000; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = parse_setting)]
    pub set: Vec<(String, String)>,
    /// How data is printed on standard output
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// How much is logged on standard error (log.level)
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How it is logged (log.format)
    #[arg(long, global = true, value_enum)]
    pub log_format: Option<LogFormat>,
    /// Stop when this parent process ends
    #[arg(long, global = true, value_name = "PID", hide = true)]
    pub with_parent: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a configuration file, a data folder and a seed
    Init(InitArgs),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Fetch, list and check model files
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Run this node: provider, consumer or both, as configured
    Up,
    /// What the running node does, owes and may lose: roles, sessions, wallet, engines, relays
    Status,
    /// What is for sale, and why a model is or is not to be had
    #[command(subcommand)]
    Market(MarketCommand),
    /// The wallet of the running node
    #[command(subcommand)]
    Wallet(WalletCommand),
    /// The keys that others know this node by: show, rotate or revoke them
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// API keys of the running node: what each may spend and has spent
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at, export and verify the ledger (the same as satgrid-ledger)
    #[command(disable_help_flag = true)]
    Ledger {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Say what is missing on this machine
    Doctor,
    /// Parts of a market on this machine, for the demo and for tests
    #[command(subcommand, hide = true)]
    Devnet(DevnetCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum MarketCommand {
    /// Every live listing on the configured relays
    List,
    /// Providers' keys that were given up or revoked, with what proves it
    Keys,
    /// Which listings of a model were considered, and why each was refused or where it ranks
    Why {
        model: String,
        /// Tokens of prompt to plan for
        #[arg(long, default_value_t = 100)]
        prompt: u32,
        /// Tokens of output to plan for
        #[arg(long, default_value_t = 256)]
        output: u32,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// The key in use and those before it
    Show,
    /// Give the node key and the Nostr key up for the seed's next ones: the old key signs the new one, relays are told
    Rotate {
        /// Somebody else may have the old key
        #[arg(long)]
        stolen: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Give them up for none: nothing is sold under them again, by whoever has them
    Revoke {
        /// Somebody else may have the key
        #[arg(long)]
        stolen: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key and print its secret, this once
    Create(NewKeyArgs),
    /// Every key with its limits and figures
    List,
    /// One key
    Show {
        /// Its id, such as key_17
        id: String,
    },
    /// End a key and every key below it
    Revoke { id: String },
}

#[derive(Debug, Args)]
pub(crate) struct NewKeyArgs {
    /// What it is for
    pub name: String,
    /// It makes and revokes keys below itself, over the API, and asks for no completions
    #[arg(long)]
    pub manage: bool,
    /// The key that it stands below: its calls count against that one too
    #[arg(long, value_name = "KEY")]
    pub parent: Option<String>,
    /// The most that one request may cost, in sat
    #[arg(long, value_name = "SAT")]
    pub per_request_sat: Option<u64>,
    /// The most that it may spend in a day (UTC), in sat
    #[arg(long, value_name = "SAT")]
    pub per_day_sat: Option<u64>,
    /// The most that it may ever spend, in sat
    #[arg(long, value_name = "SAT")]
    pub total_sat: Option<u64>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub requests_per_minute: Option<u32>,
    /// A model that it may use; may be repeated [default: all]
    #[arg(long = "model", value_name = "NAME")]
    pub models: Vec<String>,
    /// How long it lives
    #[arg(long, value_name = "DAYS")]
    pub days: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DevnetCommand {
    /// A regtest chain: Esplora and bitcoind's JSON-RPC on one port; prints the address once it listens
    Chain {
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Serve Electrum's protocol too, at this address
        #[arg(long)]
        electrum: Option<SocketAddr>,
        /// The fee rate that it answers with, in sat per virtual byte
        #[arg(long, default_value_t = 1)]
        fee_rate: u32,
    },
    /// A Nostr relay; prints its address once it listens
    Relay {
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Writes a tiny model of random weights with a chat template: what it says means nothing
    TinyModel { file: PathBuf },
    /// Writes a tiny model of random weights that embeds texts: what its rows mean is nothing
    TinyEmbedder {
        file: PathBuf,
        /// How the rows of a text become one; `mean` is a BERT's, which sees both directions
        #[arg(long, value_enum, default_value_t = TinyPooling::Mean)]
        pooling: TinyPooling,
    },
    /// Writes a tiny random mixture of experts: what it says means nothing, and every bit of it counts
    TinyMoe {
        out: PathBuf,
        #[command(flatten)]
        shape: TinyMoeArgs,
    },
    /// A whole market as separate processes: two providers, a consumer, one paid answer and its bill to the msat
    Demo(DemoArgs),
}

/// How a tiny model embeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TinyPooling {
    Mean,
    Cls,
    Last,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct TinyMoeArgs {
    /// qwen3moe, qwen2moe, olmoe, llama or granitemoe
    #[arg(long, default_value = "qwen3moe")]
    pub architecture: String,
    #[arg(long, default_value_t = 4)]
    pub layers: u32,
    /// Width of a hidden state
    #[arg(long, default_value_t = 128)]
    pub width: u32,
    /// Width of an expert
    #[arg(long, default_value_t = 64)]
    pub expert_width: u32,
    #[arg(long, default_value_t = 16)]
    pub experts: u32,
    /// Experts for each row
    #[arg(long, default_value_t = 4)]
    pub used: u32,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Leave everything running afterwards, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// A GGUF file to sell [default: gemma-3-270m, fetched where it is not in the store]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// One more GGUF file that both providers sell, beside the model of the demo
    #[arg(long, value_name = "FILE", conflicts_with = "experts")]
    pub also: Option<PathBuf>,
    /// Sell a tiny mixture of experts, split over a lead and three worker processes, and prove that it is exact
    #[arg(long, conflicts_with = "model")]
    pub experts: bool,
    /// Port of the OpenAI API on 127.0.0.1
    #[arg(long, default_value_t = 8402)]
    pub port: u16,
    /// What the model is to continue
    #[arg(long)]
    pub prompt: Option<String>,
    /// The longest answer
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_tokens: u32,
    /// Sequences in one batch of each provider's engine
    #[arg(long, hide = true, default_value_t = 4)]
    pub slots: u32,
    /// Sign as often as nodes do by default, not every few tokens
    #[arg(long, hide = true)]
    pub default_acks: bool,
    /// The engines' profile
    #[arg(long, hide = true, default_value = "exact")]
    pub profile: String,
    /// Threads of each provider's engine [default: one for each physical core]
    #[arg(long, hide = true, value_name = "N")]
    pub threads: Option<u32>,
    /// What a token read costs at both providers, in msat per million [default: 100000000]; 0 gives it away
    #[arg(long, hide = true, value_name = "MSAT")]
    pub input_price: Option<u64>,
    /// What a token written costs at the cheaper provider; the other one asks half as much again [default: 400000000]
    #[arg(long, hide = true, value_name = "MSAT")]
    pub output_price: Option<u64>,
    /// Kill the serving provider (SIGKILL) after so many pieces of text: the other one is to go on
    #[arg(long, hide = true, value_name = "N")]
    pub kill_provider_after: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// This node sells
    #[arg(long)]
    pub provider: bool,
    /// This node buys (the default)
    #[arg(long)]
    pub consumer: bool,
    /// Read the words of an existing seed from standard input
    #[arg(long)]
    pub restore: bool,
    /// A seed of 12 words instead of 24
    #[arg(long, conflicts_with = "restore")]
    pub twelve: bool,
    /// Do not show the words of a new seed
    #[arg(long)]
    pub hide_words: bool,
    /// Keep the seed encrypted, under a passphrase that is asked for
    #[arg(long)]
    pub passphrase: bool,
    /// Keep it encrypted, under the passphrase at this place: env:NAME, file:PATH, credential:NAME or fd:NUMBER
    #[arg(long, value_name = "PLACE", conflicts_with = "passphrase")]
    pub passphrase_from: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting that will be used, where it came from, and what is wrong
    Check,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Bring a model into the store; prints its path
    Pull {
        /// A name of the catalogue, hf:ORG/REPO/FILE.gguf[@REVISION][#sha256=HEX], or a path
        reference: String,
        /// Keep it under this name
        #[arg(long)]
        name: Option<String>,
    },
    /// List what is in the store and what the catalogue knows
    List,
    /// Describe a model, by name or path
    Show { model: String },
    /// Write a model of a real shape with random weights, for benchmarks
    Random {
        /// llama-8b, llama-1b, llama-deep or moe-4b
        shape: String,
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Fewer or more layers than the shape has
        #[arg(long)]
        layers: Option<u32>,
    },
    /// Cut layers out of a model, or its experts off, as files of their own, which prove what model they are of
    Split(SplitArgs),
    /// Read the files again and compare their SHA-256; all of them where none is named
    Verify { models: Vec<String> },
}

#[derive(Debug, Args)]
pub(crate) struct SplitArgs {
    /// A name in the store, or a path
    pub model: String,
    /// The layers A up to, not including, B; a part that ends with the last layer has the head too
    #[arg(long, value_name = "A..B", value_parser = parse_layers, required_unless_present = "experts")]
    pub layers: Option<LayerRange>,
    /// Of a mixture of experts: the layers without their experts, for a stage that finds these elsewhere
    #[arg(long, requires = "layers")]
    pub trunk: bool,
    /// Cut the experts of a mixture off: a trunk without them, and packs
    #[arg(long, conflicts_with = "layers")]
    pub experts: bool,
    /// Deal all experts evenly over so many packs
    #[arg(long, requires = "experts", conflicts_with = "pack")]
    pub packs: Option<u32>,
    /// Deal by how often the router chose each expert while this node led the model: packs that are equally busy
    #[arg(long, requires = "packs")]
    pub by_heat: bool,
    /// Put so many of the hottest experts of each layer into two packs
    #[arg(long, requires = "by_heat", value_name = "N", default_value_t = 0)]
    pub copies: u32,
    /// A pack with these experts, as LAYERS:EXPERTS[;...], for example `*:0-15` or `0:1,3;2:*`; may be repeated
    #[arg(long, requires = "experts")]
    pub pack: Vec<String>,
    /// Where to write the part; with --experts, the folder for the files
    #[arg(long, short)]
    pub out: PathBuf,
}

fn parse_layers(text: &str) -> Result<LayerRange, String> {
    let wrong = || "write A..B, with A before B".to_owned();
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
    LayerRange::new(number(start)?, number(end)?).ok_or_else(wrong)
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

impl Globals {
    /// The flags as the configuration sees them. Named flags win over `--set`.
    pub(crate) fn overrides(&self) -> Overrides {
        let mut overrides = Overrides { file: self.config.clone(), values: Vec::new() };
        for (key, value) in &self.set {
            overrides.set("--set", key, Some(value));
        }
        overrides.set("--dir", "node.dir", self.dir.as_ref().map(|dir| dir.display()));
        overrides.set("--network", "node.network", self.network.map(Network::name));
        overrides.set("--log-level", "log.level", self.log_level.as_ref());
        let format = self.log_format.map(|format| match format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        });
        overrides.set("--log-format", "log.format", format);
        overrides
    }

    /// Logging by flags alone, for commands that need no configuration.
    pub(crate) fn start_logging(&self) -> anyhow::Result<()> {
        let level = self.log_level.as_deref().unwrap_or("info");
        Ok(telemetry::init(level, self.log_format.unwrap_or(LogFormat::Text))?)
    }

    /// The merged configuration, and logging as it says; warnings go to standard error.
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        let env: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let loaded = config::load(&self.overrides(), &env).map_err(|error| {
            let hint = error.hint();
            let error = anyhow::Error::new(error);
            let error = match hint {
                Some(hint) => Err::<(), _>(error).hint(hint).err().unwrap_or_else(|| anyhow::anyhow!("unreadable")),
                None => error,
            };
            anyhow::Error::new(Unusable(error))
        })?;
        let log = &loaded.config.log;
        if let Err(error) = telemetry::init(&log.level, log.format) {
            eprintln!("warning: log.level: {error}; logging at info");
            telemetry::init("info", log.format)?;
        }
        for warning in &loaded.warnings {
            eprintln!("warning: {warning}");
        }
        Ok(loaded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn named_flags_win_over_set() {
        let cli =
            Cli::parse_from(["satgrid", "config", "check", "--set", "node.network=signet", "--network", "testnet"]);
        let values = cli.globals.overrides().values;
        assert_eq!(values.last().unwrap().2, "testnet");
        assert!(Cli::try_parse_from(["satgrid", "doctor", "--set", "nonsense"]).is_err());
    }
}
