//! What cannot work, said before anything starts: each problem with its key, the fault and the remedy.

use std::collections::BTreeSet;

use satgrid_engine_llama::MAX_SLOTS;

use satgrid_ledger::keys::KEY_PREFIX;

use super::types::DoorSells;
use super::types::{Config, ModelForSale, Network, Profile};
use crate::accounts::rate::Source;

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Problem {
    pub key: &'static str,
    pub fault: String,
    pub remedy: String,
}

/// Everything that would keep `satgrid up` from working with this configuration; empty when it is sound.
pub(crate) fn problems(config: &Config) -> Vec<Problem> {
    let mut found = Found(Vec::new());
    node(config, &mut found);
    api(config, &mut found);
    door(config, &mut found);
    session(config, &mut found);
    if config.is_provider() {
        provider(config, &mut found);
    }
    if config.is_consumer() {
        consumer(config, &mut found);
    }
    market(config, &mut found);
    wallet(config, &mut found);
    if let Some(endpoint) = &config.log.otlp_endpoint {
        let known = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        found.check(
            known,
            "log.otlp_endpoint",
            format!("{endpoint} is no http address"),
            "name it as http://host:4318",
        );
    }
    if let Err(error) = crate::telemetry::parse_filter(&config.log.level) {
        found.add("log.level", error.to_string(), "use error, warn, info, debug, trace or TARGET=LEVEL,...");
    }
    found.0
}

struct Found(Vec<Problem>);

impl Found {
    fn add(&mut self, key: &'static str, fault: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Problem { key, fault: fault.into(), remedy: remedy.into() });
    }

    fn check(&mut self, sound: bool, key: &'static str, fault: impl Into<String>, remedy: impl Into<String>) {
        if !sound {
            self.add(key, fault, remedy);
        }
    }
}

fn node(config: &Config, found: &mut Found) {
    found.check(
        !config.node.roles.is_empty(),
        "node.roles",
        "this node has no role",
        "set roles = [\"consumer\"], [\"provider\"] or both",
    );
}

fn api(config: &Config, found: &mut Found) {
    let api = &config.api;
    found.check(
        api.listen.ip().is_loopback() || !api.keys.is_empty(),
        "api.listen",
        format!("{} is reachable from outside and no client key is set: anyone could spend this wallet", api.listen),
        "listen on 127.0.0.1, or add [[api.keys]]",
    );
    found.check(
        api.admin.ip().is_loopback(),
        "api.admin",
        format!("{} is reachable from outside", api.admin),
        "listen on 127.0.0.1",
    );
    found.check(
        api.listen != api.admin || api.listen.port() == 0,
        "api.admin",
        format!("{} is api.listen too", api.admin),
        "choose another port",
    );
    if let Some(Err(error)) = api.exchange_rate.as_deref().map(str::parse::<Source>) {
        found.check(false, "api.exchange_rate", error, "leave it out to show no dollars");
    }
    let mut names = BTreeSet::new();
    for key in &api.keys {
        found.check(
            !key.name.starts_with(KEY_PREFIX),
            "api.keys",
            format!("{:?} looks like the id of a stored key", key.name),
            "choose another name",
        );
        found.check(
            names.insert(&key.name),
            "api.keys",
            format!("{:?} is there twice", key.name),
            "name each key once",
        );
    }
}

fn door(config: &Config, found: &mut Found) {
    let door = &config.door;
    let Some(listen) = door.listen else { return };
    let known = door.sells.as_deref().is_none_or(|sells| matches!(sells, "own" | "market"));
    let (shown, choose) = (door.sells.as_deref().unwrap_or_default(), "choose own or market");
    found.check(known, "door.sells", format!("{shown} is neither own nor market"), choose);
    match config.door_sells() {
        DoorSells::Own => {
            found.check(
                config.is_provider(),
                "door.sells",
                "there are no models of its own to sell, since this node is no provider".to_owned(),
                "add \"provider\" to node.roles, or set door.sells = \"market\"",
            );
            found.check(
                config.wallet.nwc.is_none(),
                "door.sells",
                "selling its own models needs the embedded wallet".to_owned(),
                "unset wallet.nwc, or sell through a second node with door.sells = \"market\"",
            );
        }
        DoorSells::Market => found.check(
            config.is_consumer(),
            "door.sells",
            "what others sell must be bought first, and this node is no consumer".to_owned(),
            "add \"consumer\" to node.roles",
        ),
    }
    found.check(
        door.certificate.is_some() == door.key.is_some(),
        "door.certificate",
        "only one of door.certificate and door.key is set".to_owned(),
        "set both, or none behind a proxy",
    );
    found.check(
        door.certificate.is_some()
            || !door.acme_domains.is_empty()
            || !door.trusted_proxies.is_empty()
            || listen.ip().is_loopback(),
        "door.listen",
        format!("{listen} is reachable from outside and keys would cross the network in the clear"),
        "set door.acme_domains, or door.certificate and door.key, or door.trusted_proxies where a proxy ends TLS",
    );
    found.0.extend(super::acme::problems(door));
    found.check(
        (1..=door.max_sat).contains(&door.min_sat),
        "door.min_sat",
        format!("{} is not between 1 and door.max_sat", door.min_sat),
        "choose 1 to door.max_sat",
    );
}

fn session(config: &Config, found: &mut Found) {
    let s = &config.session;
    let counts = [
        ("session.ack_tokens", u64::from(s.ack_tokens)),
        ("session.ack_ms", s.ack_ms),
        ("session.invoice_expiry_s", s.invoice_expiry_s),
        ("session.quote_validity_s", s.quote_validity_s),
        ("session.idle_close_s", s.idle_close_s),
    ];
    for (key, value) in counts {
        found.check(value > 0, key, "0 would stop every stream", "leave it out for the default");
    }
    found.check(
        s.window_tokens >= s.ack_tokens,
        "session.window_tokens",
        format!("{} is less than session.ack_tokens = {}: every stream would stall", s.window_tokens, s.ack_tokens),
        "make it at least twice session.ack_tokens",
    );
}

fn provider(config: &Config, found: &mut Found) {
    let p = &config.provider;
    found.check(
        !p.models.is_empty() || !p.stages.is_empty() || !p.packs.is_empty() || !p.leads.is_empty(),
        "provider.models",
        "a provider without a model has nothing to sell",
        "add [[provider.models]] with a name or a path and prices, or remove \"provider\" from node.roles",
    );
    let experts = p.models.iter().any(|model| model.buy_experts) || p.stages.iter().any(|stage| stage.buy_experts);
    let buys = experts || !p.leads.is_empty();
    found.check(
        !buys || config.is_consumer(),
        "provider.leads",
        "a node that leads buys layers or experts, and this one does not buy",
        "add \"consumer\" to node.roles",
    );
    for path in p.stages.iter().map(|stage| &stage.path).chain(p.leads.iter().flat_map(|lead| [&lead.head, &lead.tail]))
    {
        found.check(
            path.is_file(),
            "provider.stages",
            format!("{} is no file", path.display()),
            "make it with: satgrid models split MODEL A-B OUT",
        );
    }
    for (lead, draft) in p.leads.iter().filter_map(|lead| Some((lead, lead.draft.as_ref()?))) {
        found.check(
            draft.is_file(),
            "provider.leads",
            format!("{} is no file", draft.display()),
            "draft names a small GGUF with the vocabulary of the model that is led",
        );
        found.check(
            lead.speculate && lead.profile == Profile::Exact,
            "provider.leads",
            format!("{}: a draft model guesses, and guesses are verified in the profile exact alone", lead.alias),
            "set speculate = true and profile = \"exact\", or leave draft out",
        );
    }
    for stage in &p.stages {
        found.check(
            stage.witness_per_million <= 1_000_000,
            "provider.stages",
            format!("{}: {} rows of a million are witnessed", stage.path.display(), stage.witness_per_million),
            "choose 0 to 1000000",
        );
    }
    for path in p.packs.iter().map(|pack| &pack.path) {
        found.check(
            path.is_file(),
            "provider.packs",
            format!("{} is no file", path.display()),
            "make it with: satgrid models split MODEL --experts",
        );
    }
    found.check(
        0 < p.slice_min_sat && p.slice_min_sat <= p.slice_max_sat,
        "provider.slice_min_sat",
        format!("no slice lies between {} and {} sat", p.slice_min_sat, p.slice_max_sat),
        "make it at least 1 and at most provider.slice_max_sat",
    );
    found.check(
        (60..=86_400).contains(&p.listing_expiry_s),
        "provider.listing_expiry_s",
        format!("{} s is no sensible life of a listing", p.listing_expiry_s),
        "choose 900 to 3600",
    );
    for address in &p.public_addresses {
        found.check(
            address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()),
            "provider.public_addresses",
            format!("{address:?} is not host:port"),
            "write a name or address and a port, such as gpu.example.org:8404",
        );
    }
    found.check(
        !p.public_addresses.is_empty() || !p.quic_listen.ip().is_unspecified(),
        "provider.public_addresses",
        format!("nobody can tell from {} where to reach this provider", p.quic_listen),
        "name the host:port that consumers use",
    );
    let mut names = BTreeSet::new();
    for model in &p.models {
        model_for_sale(model, found);
        let name = model.listed_name();
        found.check(
            names.insert(name.clone()),
            "provider.models",
            format!("{name:?} is listed twice"),
            "give one of them another alias",
        );
    }
}

fn model_for_sale(model: &ModelForSale, found: &mut Found) {
    let name = model.listed_name();
    found.check(
        model.path.is_some() != model.name.is_some(),
        "provider.models",
        format!("model {name:?} has {} path and name", if model.path.is_some() { "both" } else { "neither" }),
        "give exactly one: path = a GGUF file, or name = one of `satgrid models list`",
    );
    found.check(
        (1..=MAX_SLOTS).contains(&model.slots),
        "provider.models",
        format!("model {name:?}: slots = {}", model.slots),
        format!("choose 1 to {MAX_SLOTS}"),
    );
    found.check(
        model.context.is_none_or(|context| context >= 64),
        "provider.models",
        format!("model {name:?}: a context of {} tokens holds no conversation", model.context.unwrap_or(0)),
        "choose at least 64, or leave it out",
    );
    found.check(
        model.threads != Some(0),
        "provider.models",
        format!("model {name:?}: threads = 0"),
        "choose at least 1, or leave it out",
    );
    let url = model.upstream.as_deref();
    found.check(
        url.is_none_or(|url| url.starts_with("http://") || url.starts_with("https://")),
        "provider.models",
        format!("model {name:?}: upstream {:?} is no URL", url.unwrap_or_default()),
        "write http://HOST:PORT",
    );
    found.check(
        url.is_none() || model.profile == Profile::Fast,
        "provider.models",
        format!("model {name:?}: nobody promises the exact profile for an upstream"),
        "set profile = \"fast\"",
    );
    found.check(
        model.witness_per_million <= 1_000_000,
        "provider.models",
        format!("model {name:?}: {} rows of a million are witnessed", model.witness_per_million),
        "choose 0 to 1000000",
    );
    let cached = model.cached_price();
    found.check(
        cached <= model.price_in_msat_per_mtok,
        "provider.models",
        format!("model {name:?}: cached input at {cached} is dearer than input at {}", model.price_in_msat_per_mtok),
        "make price_cached_msat_per_mtok at most price_in_msat_per_mtok",
    );
}

fn consumer(config: &Config, found: &mut Found) {
    let c = &config.consumer;
    for (key, first) in
        [("consumer.slice_first_sat", c.slice_first_sat), ("consumer.slice_first_direct_sat", c.slice_first_direct_sat)]
    {
        found.check(
            0 < first && first <= c.slice_max_sat,
            key,
            format!("{first} sat is not between 1 and consumer.slice_max_sat = {}", c.slice_max_sat),
            "choose a smaller first slice or a larger slice_max_sat",
        );
    }
    found.check(
        c.max_exposure_sat >= c.slice_first_direct_sat,
        "consumer.max_exposure_sat",
        format!("{} sat does not cover one first slice", c.max_exposure_sat),
        "make it at least consumer.slice_max_sat",
    );
    found.check(
        c.max_session_sat >= c.slice_first_direct_sat,
        "consumer.max_session_sat",
        format!("{} sat does not cover one first slice", c.max_session_sat),
        "make it at least consumer.slice_max_sat",
    );
}

fn market(config: &Config, found: &mut Found) {
    found.check(
        !config.market.relays.is_empty(),
        "market.relays",
        "without a relay this node neither sees nor is seen",
        "name one or more: relays = [\"wss://...\"]",
    );
    for relay in &config.market.relays {
        found.check(
            relay.starts_with("ws://") || relay.starts_with("wss://"),
            "market.relays",
            format!("{relay:?} is no relay address"),
            "write ws://host:port or wss://host",
        );
        found.check(
            config.node.network != Network::Mainnet || !relay.starts_with("ws://") || relay.contains("127.0.0.1"),
            "market.relays",
            format!("{relay:?} is not encrypted, on mainnet"),
            "use wss://",
        );
    }
}

/// What a first implementation may hold at most, whatever the configuration says: 0.1 BTC.
const BALANCE_CEILING_SAT: u64 = 10_000_000;

fn wallet(config: &Config, found: &mut Found) {
    let w = &config.wallet;
    if let Some(lsp) = &w.lsp {
        found.check(
            super::lsp(lsp).is_some(),
            "wallet.lsp",
            format!("{lsp:?} is not NODE_ID@HOST:PORT"),
            "write the 66 hex digits of its node, @, and its address",
        );
    }
    match &w.chain {
        _ if w.nwc.is_some() => {}
        None => found.add(
            "wallet.chain",
            "the wallet has no source for the chain",
            "set chain = \"esplora:URL\", \"electrum:HOST:PORT\" or \"bitcoind:USER@HOST:PORT\"",
        ),
        Some(super::types::ChainSource::Bitcoind { .. }) => found.check(
            w.chain_password.is_some(),
            "wallet.chain_password",
            "bitcoind asks for a password",
            "set chain_password = \"env:NAME\" or \"file:PATH\"",
        ),
        Some(super::types::ChainSource::Esplora { .. } | super::types::ChainSource::Electrum { .. }) => {}
    }
    found.check(
        config.node.network != Network::Mainnet || w.max_balance_sat <= BALANCE_CEILING_SAT,
        "wallet.max_balance_sat",
        format!("{} sat is a lot of money in a hot wallet", w.max_balance_sat),
        format!("choose at most {BALANCE_CEILING_SAT}"),
    );
    if let Some(to) = &w.sweep_to {
        let read = to.parse::<satgrid_wallet::sweep::Destination>();
        found.check(
            read.is_ok(),
            "wallet.sweep_to",
            read.err().map(|error| error.to_string()).unwrap_or_default(),
            "`satgrid wallet sweep` shows what would be sent there",
        );
    }
    for id in &w.trusted_0conf {
        found.check(
            id.len() == 66 && (id.starts_with("02") || id.starts_with("03")) && hex::decode(id).is_ok(),
            "wallet.trusted_0conf",
            format!("{id:?} is no Lightning node id"),
            "write the 66 hex digits of the node's public key",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Overrides, load};
    use std::collections::BTreeMap;

    const SOUND: &str = "[node]\nroles = [\"provider\", \"consumer\"]\n[provider]\n\
        public_addresses = [\"127.0.0.1:8404\"]\n[[provider.models]]\nname = \"gemma-3-270m\"\n\
        price_in_msat_per_mtok = 1000\nprice_out_msat_per_mtok = 2000\n[market]\nrelays = [\"ws://127.0.0.1:7\"]\n\
        [wallet]\nchain = \"esplora:http://127.0.0.1:3\"\n";

    fn keys_of(text: &str, flags: &[(&str, &str)]) -> Vec<&'static str> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let mut overrides = Overrides { file: Some(path), values: Vec::new() };
        for (key, value) in flags {
            overrides.set("--set", key, Some(value));
        }
        let env = BTreeMap::from([("HOME".to_owned(), "/h".to_owned())]);
        problems(&load(&overrides, &env).unwrap().config).into_iter().map(|problem| problem.key).collect()
    }

    #[test]
    fn a_sound_configuration_has_no_problem() {
        assert_eq!(keys_of(SOUND, &[]), Vec::<&str>::new());
    }

    #[test]
    fn an_empty_one_lacks_a_relay_and_a_chain() {
        assert_eq!(keys_of("", &[]), ["market.relays", "wallet.chain"]);
    }

    #[test]
    fn each_fault_is_found() {
        let check = |key: &str, value: &str, expect: &str| {
            assert_eq!(keys_of(SOUND, &[(key, value)]), [expect], "{key} = {value}");
        };
        check("node.roles", "", "node.roles");
        check("api.listen", "0.0.0.0:8402", "api.listen");
        check("api.admin", "0.0.0.0:8403", "api.admin");
        check("api.admin", "127.0.0.1:8402", "api.admin");
        check("session.ack_ms", "0", "session.ack_ms");
        check("session.window_tokens", "64", "session.window_tokens");
        check("provider.slice_min_sat", "6000", "provider.slice_min_sat");
        check("provider.public_addresses", "nowhere", "provider.public_addresses");
        check("provider.public_addresses", "", "provider.public_addresses");
        check("provider.listing_expiry_s", "5", "provider.listing_expiry_s");
        check("consumer.slice_first_sat", "9000", "consumer.slice_first_sat");
        check("consumer.max_exposure_sat", "1", "consumer.max_exposure_sat");
        check("market.relays", "http://x", "market.relays");
        check("wallet.chain", "bitcoind:rpc@127.0.0.1:1", "wallet.chain_password");
        check("wallet.trusted_0conf", "02ab", "wallet.trusted_0conf");
        check("wallet.lsp", "02ab@host", "wallet.lsp");
        check("wallet.sweep_to", "somewhere", "wallet.sweep_to");
        check("log.level", "satgrid=loud", "log.level");
    }

    #[test]
    fn models_for_sale() {
        let check = |line: &str, count: usize| {
            let text = SOUND.replace("name = \"gemma-3-270m\"", line);
            assert_eq!(keys_of(&text, &[]), vec!["provider.models"; count], "{line}");
        };
        check("path = \"x.gguf\"", 0);
        check("path = \"x.gguf\"\nname = \"x\"", 1);
        check("alias = \"x\"", 1);
        check("path = \"x.gguf\"\nexperts = [\"a.gguf\", \"b.gguf\"]\nspare_experts = \"c.gguf\"", 0);
        check("name = \"x\"\nwitness_per_million = 1000001", 1);
        check("name = \"x\"\nslots = 0", 1);
        check("name = \"x\"\nslots = 0\nthreads = 0\ncontext = 1", 3);
        check("name = \"x\"\nprice_cached_msat_per_mtok = 1001", 1);
    }
}
