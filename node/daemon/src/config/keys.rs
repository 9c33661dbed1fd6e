//! Every key of the configuration file in one table: its kind, its default and what it means.
//!
//! The table drives the merge (flag over environment over file over default), the names of the environment
//! variables, the did-you-mean hints, the commented file that `satgrid init` writes and what `config check` prints.
//! The typed structs in [`super::types`] hold no defaults of their own, so a default is written down once, here.

/// What a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    /// A file or folder: `~/` is the home folder; relative to the file that says it, else to the working folder.
    Path,
    /// `env:NAME` or `file:PATH`.
    Secret,
    Number,
    Switch,
    /// A list of strings; in the environment, separated by commas.
    Texts,
    /// A list of tables (`[[section.key]]`); only a file can hold it.
    Tables(&'static [&'static str]),
}

/// Where the value comes from when nobody sets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preset {
    /// This, as TOML text.
    Value(&'static str),
    /// Worked out from other values; the text says how.
    Derived(&'static str),
    /// Nothing: the key may stay unset.
    Unset,
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    /// `section.name`
    pub path: &'static str,
    pub kind: Kind,
    pub preset: Preset,
    pub help: &'static str,
}

impl Key {
    pub(crate) fn section(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(section, _)| section)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, name)| name)
    }

    /// `api.listen` is `SATGRID_API_LISTEN`.
    pub(crate) fn env_name(&self) -> String {
        format!("{ENV_PREFIX}{}", self.path.to_uppercase().replace('.', "_"))
    }
}

pub(super) const ENV_PREFIX: &str = "SATGRID_";

/// Variables with our prefix that are no configuration key: they point scripts and tests at things.
pub(super) const ENV_OTHER: &[&str] = &["SATGRID_CONFIG", "SATGRID_BIN", "SATGRID_TEST_MODEL"];

/// Keys of one `[[provider.models]]` table.
pub(super) const MODEL_KEYS: &[&str] = &[
    "path",
    "name",
    "alias",
    "price_in_msat_per_mtok",
    "price_cached_msat_per_mtok",
    "price_out_msat_per_mtok",
    "per_request_msat",
    "profile",
    "slots",
    "context",
    "threads",
    "device",
    "gpu_layers",
    "upstream",
    "upstream_model",
    "upstream_kind",
    "upstream_key",
    "experts",
    "spare_experts",
    "witness_per_million",
    "buy_experts",
    "max_price_msat_per_million_expert_rows",
    "wire",
];

/// Keys of one `[[provider.packs]]` table.
pub(super) const PACK_KEYS: &[&str] = &[
    "path",
    "alias",
    "price_msat_per_million_expert_rows",
    "per_request_msat",
    "profile",
    "slots",
    "threads",
    "device",
];

/// Keys of one `[[provider.stages]]` table.
pub(super) const STAGE_KEYS: &[&str] = &[
    "path",
    "alias",
    "price_msat_per_million_position_layers",
    "per_request_msat",
    "profile",
    "slots",
    "context",
    "threads",
    "device",
    "gpu_layers",
    "memory_mib",
    "experts",
    "spare_experts",
    "witness_per_million",
    "buy_experts",
    "max_price_msat_per_million_expert_rows",
    "wire",
];

/// Keys of one `[[provider.leads]]` table.
pub(super) const LEAD_KEYS: &[&str] = &[
    "head",
    "tail",
    "alias",
    "price_in_msat_per_mtok",
    "price_out_msat_per_mtok",
    "max_price_msat_per_million_position_layers",
    "wire",
    "speculate",
    "draft",
    "profile",
    "slots",
    "context",
    "threads",
    "device",
];

/// Keys of one `[[api.keys]]` table.
pub(super) const API_KEY_KEYS: &[&str] = &["name", "secret"];

const fn key(path: &'static str, kind: Kind, preset: Preset, help: &'static str) -> Key {
    Key { path, kind, preset, help }
}

use Kind::{Number, Path, Secret, Switch, Tables, Text, Texts};
use Preset::{Derived, Unset, Value};

/// Sections in the order in which they are printed, with what each is for.
pub(crate) const SECTIONS: &[(&str, &str)] = &[
    ("node", "Who this node is."),
    ("api", "The OpenAI-compatible endpoint for clients on this machine."),
    ("door", "The front door: selling over HTTPS to clients without a node, who pay invoices."),
    ("session", "How both roles meter and settle (docs/money.md says why these figures)."),
    ("provider", "Selling inference."),
    ("consumer", "Buying inference."),
    ("market", "Where listings are published and read."),
    ("wallet", "The embedded Lightning node."),
    ("ledger", "The journal of every msat."),
    ("models", "Where model files are kept."),
    ("log", "What is written to standard error. Prompts and completions never are."),
];

/// The table.
pub(super) const KEYS: &[Key] = &[
    key("node.network", Text, Value("\"regtest\""), "regtest, signet, testnet or mainnet; mainnet only ever by name"),
    key("node.dir", Path, Derived("the data folder, one per network"), "state of this node: seed, wallet, ledger"),
    key("node.min_free_mib", Number, Value("128"), "with less space on the disk than this, no new work is taken"),
    key("node.threads", Number, Value("0"), "of the node itself, beside its engines'; 0: half the cores"),
    key("node.roles", Texts, Value("[\"consumer\"]"), "provider, consumer or both"),
    key("api.listen", Text, Value("\"127.0.0.1:8402\""), "address of the OpenAI-compatible endpoint"),
    key("api.admin", Text, Value("\"127.0.0.1:8403\""), "address of metrics and administration, loopback only"),
    key(
        "api.keys",
        Tables(API_KEY_KEYS),
        Value("[]"),
        "client keys; none means that no key is asked for (loopback only)",
    ),
    key(
        "api.exchange_rate",
        Text,
        Unset,
        "dollars for a bitcoin, shown beside msat: fixed:97000.50, or https://...#/json/pointer",
    ),
    key("api.exchange_refresh_s", Number, Value("600"), "how often a URL is asked for it"),
    key("door.listen", Text, Unset, "address for strangers, who need no node"),
    key("door.sells", Text, Unset, "own: this provider's models; market: what others sell; unset: own on a provider"),
    key("door.certificate", Path, Unset, "PEM file of the certificate chain; read again when it changes"),
    key("door.key", Path, Unset, "PEM file of its private key"),
    key(
        "door.acme_domains",
        Texts,
        Value("[]"),
        "names that an authority (ACME) signs a certificate for, instead of files",
    ),
    key("door.acme_contact", Text, Unset, "where the authority may write: mailto:you@example.com"),
    key(
        "door.acme_directory",
        Text,
        Value("\"https://acme-v02.api.letsencrypt.org/directory\""),
        "the authority; it connects to the names on port 443, which must lead to door.listen",
    ),
    key("door.acme_terms_agreed", Switch, Value("false"), "you agree to the authority's terms of service"),
    key("door.acme_ca", Path, Unset, "PEM file of the root behind an authority of your own"),
    key("door.trusted_proxies", Texts, Value("[]"), "addresses of proxies that end TLS and set X-Forwarded-For"),
    key(
        "door.margin_permille",
        Number,
        Value("100"),
        "what strangers pay on top of what the node pays in the market, in thousandths",
    ),
    key("door.min_sat", Number, Value("10"), "smallest invoice"),
    key("door.max_sat", Number, Value("100000"), "largest invoice"),
    key("door.max_balance_sat", Number, Value("1000000"), "the most that one key may hold"),
    key("session.ack_tokens", Number, Value("128"), "both sides sign after so many tokens ..."),
    key("session.ack_ms", Number, Value("1000"), "... or after so many milliseconds"),
    key("session.window_tokens", Number, Value("256"), "a provider pauses when so much work is not yet acknowledged"),
    key("session.invoice_expiry_s", Number, Value("120"), "life of a slice invoice"),
    key("session.quote_validity_s", Number, Value("600"), "life of a quote"),
    key("session.idle_close_s", Number, Value("300"), "an idle connection is closed after this"),
    key(
        "session.refund_idle",
        Switch,
        Value("true"),
        "ask an idle session's balance back when its connection is closed",
    ),
    key("session.resume_s", Number, Value("60"), "a stream whose connection broke is held so long by its provider"),
    key("session.refund_dust_sat", Number, Value("10"), "remainders below this become a credit note at once"),
    key("provider.quic_listen", Text, Value("\"0.0.0.0:8404\""), "UDP address for consumers"),
    key("provider.public_addresses", Texts, Value("[]"), "host:port under which consumers reach it; published"),
    key("provider.region", Text, Unset, "region hint for the listing, such as eu-central"),
    key("provider.listing_expiry_s", Number, Value("1800"), "life of a listing; it is published anew at half of it"),
    key("provider.slice_min_sat", Number, Value("10"), "smallest slice that it accepts"),
    key("provider.slice_max_sat", Number, Value("5000"), "largest slice that it accepts"),
    key(
        "provider.requests_per_peer",
        Number,
        Value("0"),
        "open requests of one consumer, over all its sessions; 0: twice as many as run at once, at least 16",
    ),
    key("provider.models", Tables(MODEL_KEYS), Value("[]"), "what is for sale"),
    key("provider.stages", Tables(STAGE_KEYS), Value("[]"), "layers for sale, to nodes that lead"),
    key("provider.packs", Tables(PACK_KEYS), Value("[]"), "experts for sale, to nodes that lead"),
    key(
        "provider.leads",
        Tables(LEAD_KEYS),
        Value("[]"),
        "models whose middle layers this node buys; needs both roles",
    ),
    key("consumer.slice_first_sat", Number, Value("250"), "first slice to a provider over a route"),
    key(
        "consumer.slice_first_direct_sat",
        Number,
        Value("10"),
        "first slice over a direct channel, or where fees are at most 1 %",
    ),
    key("consumer.slice_max_sat", Number, Value("5000"), "largest slice that it pays"),
    key("consumer.max_session_sat", Number, Value("10000"), "most that one session may spend"),
    key("consumer.max_exposure_sat", Number, Value("20000"), "most that may be prepaid and unused over all providers"),
    key(
        "consumer.max_fee_permille",
        Number,
        Value("10"),
        "routing fee, in thousandths of a slice, above which a provider is not used",
    ),
    key(
        "consumer.allow_unverified_names",
        Switch,
        Value("false"),
        "buy by name even where the catalogue has no root for it",
    ),
    key("consumer.prefer", Texts, Value("[]"), "provider keys to prefer at equal price, in this order"),
    key("consumer.only", Texts, Value("[]"), "use no provider but these"),
    key("market.relays", Texts, Value("[]"), "Nostr relays, ws:// or wss://"),
    key("market.catalogue", Path, Unset, "your own catalogue of model names and roots, beside the built-in one"),
    key("wallet.chain", Text, Unset, "esplora:URL, electrum:HOST:PORT or bitcoind:USER@HOST:PORT"),
    key("wallet.chain_password", Secret, Unset, "password of bitcoind's RPC, as env:NAME or file:PATH"),
    key(
        "wallet.seed",
        Secret,
        Derived("file:seed in node.dir"),
        "the words, as env:NAME, file:PATH or credential:NAME",
    ),
    key(
        "wallet.passphrase",
        Secret,
        Unset,
        "opens an encrypted seed: env:NAME, file:PATH, credential:NAME or fd:NUMBER; asked for where it is not set",
    ),
    key("wallet.listen", Text, Value("\"127.0.0.1:9735\""), "TCP address for Lightning peers"),
    key("wallet.alias", Text, Unset, "name in the Lightning graph"),
    key("wallet.max_balance_sat", Number, Value("100000"), "above this it takes no more money in"),
    key("wallet.trusted_0conf", Texts, Value("[]"), "Lightning node ids whose channels are used unconfirmed"),
    key("wallet.public_address", Text, Unset, "host:port under which Lightning peers reach it; published in listings"),
    key(
        "wallet.lsp",
        Text,
        Unset,
        "NODE_ID@HOST:PORT of a liquidity provider (LSPS2) that opens channels as payments come",
    ),
    key("wallet.lsp_token", Secret, Unset, "token that the liquidity provider asks for, as env:NAME or file:PATH"),
    key("wallet.lsp_max_fee_permille", Number, Value("50"), "most that it may keep of a payment, in thousandths"),
    key(
        "wallet.lsp_serve_fee_ppm",
        Number,
        Unset,
        "open such channels for others at this fee, in millionths (experimental)",
    ),
    key("wallet.backup", Path, Unset, "also write the channel backup here at every change; another disk is best"),
    key("wallet.reopen", Switch, Value("true"), "open a force-closed channel of ours again"),
    key(
        "wallet.sweep_to",
        Text,
        Unset,
        "where spare money goes: user@host, a BOLT 12 offer, an on-chain address, or cold",
    ),
    key("wallet.sweep_above_sat", Number, Value("50000"), "sweep when more than this can be moved"),
    key("wallet.sweep_keep_sat", Number, Value("20000"), "what a sweep leaves in the wallet, reserves aside"),
    key("wallet.sweep_every_s", Number, Value("86400"), "least seconds between two sweeps"),
    key("wallet.sweep_max_fee_permille", Number, Value("10"), "most that a sweep's route may cost, in thousandths"),
    key(
        "wallet.sweep_max_onchain_fee_permille",
        Number,
        Value("50"),
        "most that miners get of a scheduled sweep on chain, in thousandths; what is dearer waits",
    ),
    key("wallet.sweep_fee_rate", Number, Unset, "sat per virtual byte of sweeps on chain, instead of the estimate"),
    key(
        "wallet.cold_xpub",
        Text,
        Unset,
        "the cold account's public key or descriptor; else it hangs on the node's words",
    ),
    key("wallet.nwc", Secret, Unset, "a Nostr Wallet Connect address: pay and be paid with that wallet instead"),
    key("ledger.path", Path, Derived("ledger.sqlite in node.dir"), "the journal, an SQLite file"),
    key(
        "ledger.url",
        Secret,
        Unset,
        "a PostgreSQL database instead of the file, as env:NAME or file:PATH of its postgres:// address",
    ),
    key("models.dir", Path, Derived("models in the cache folder"), "downloaded and linked model files"),
    key("models.hub_endpoint", Text, Unset, "another hub than the public one, for hf: references"),
    key("models.hub_token", Secret, Unset, "token for gated repositories, as env:NAME or file:PATH"),
    key(
        "log.level",
        Text,
        Value("\"info\""),
        "error, warn, info, debug, trace, or a filter such as info,satgrid=debug",
    ),
    key("log.format", Text, Value("\"text\""), "text or json"),
    key(
        "log.otlp_endpoint",
        Text,
        Unset,
        "a collector that is told of calls, without their texts: http://127.0.0.1:4318",
    ),
];

/// The key with this path.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// The candidate that `word` most likely meant: at most a third of its letters wrong, or its beginning.
pub(super) fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| {
            *distance <= word.len().max(candidate.len()).div_ceil(3) || (word.len() > 3 && candidate.starts_with(word))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance over bytes; two letters swapped count as two.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn table_is_consistent() {
        let mut paths = BTreeSet::new();
        let mut variables = BTreeSet::new();
        for key in KEYS {
            assert!(paths.insert(key.path), "{} twice", key.path);
            assert!(variables.insert(key.env_name()), "{} twice", key.env_name());
            assert!(SECTIONS.iter().any(|(name, _)| *name == key.section()), "{} has no section", key.path);
            if let Preset::Value(text) = key.preset {
                let parsed: toml::Table = toml::from_str(&format!("x = {text}")).unwrap();
                let value = &parsed["x"];
                let fits = match key.kind {
                    Text | Path | Secret => value.is_str(),
                    Number => value.is_integer(),
                    Switch => value.is_bool(),
                    Texts | Tables(_) => value.is_array(),
                };
                assert!(fits, "{}: {text} is not {:?}", key.path, key.kind);
            }
        }
    }

    #[test]
    fn hints() {
        let check = |word: &str, expect: Option<&str>| {
            let names = KEYS.iter().filter(|key| key.section() == "provider").map(Key::name);
            assert_eq!(did_you_mean(word, names), expect, "{word}");
        };
        check("quic_listn", Some("quic_listen"));
        check("quik_listen", Some("quic_listen"));
        check("slice_mx_sat", Some("slice_max_sat"));
        check("model", Some("models"));
        check("colour", None);
    }
}
