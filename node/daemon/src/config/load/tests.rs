//! What the merge must do, with files in a temporary folder and an environment of the test's own.

use super::*;
use crate::config::Role;

fn env_of(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let home = [("HOME", "/h")];
    home.iter().chain(pairs).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn load_text(text: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("satgrid.toml");
    std::fs::write(&path, text).unwrap();
    let mut overrides = Overrides { file: Some(path), values: Vec::new() };
    for (key, value) in flags {
        overrides.set("--set", key, Some(value));
    }
    load(&overrides, &env_of(env))
}

fn origin_of(loaded: &Loaded, key: &str) -> Origin {
    loaded.entries.iter().find(|entry| entry.key.path == key).unwrap().origin.clone()
}

#[test]
fn defaults_are_those_of_the_money_design() {
    let config = load_text("", &[], &[]).unwrap().config;
    let session = &config.session;
    assert_eq!((session.ack_tokens, session.ack_ms, session.window_tokens), (128, 1000, 256));
    assert_eq!((session.invoice_expiry_s, session.quote_validity_s), (120, 600));
    assert_eq!((session.idle_close_s, session.refund_dust_sat), (300, 10));
    let consumer = &config.consumer;
    assert_eq!((consumer.slice_first_sat, consumer.slice_first_direct_sat, consumer.slice_max_sat), (250, 10, 5000));
    assert_eq!(config.wallet.max_balance_sat, 100_000);
    assert_eq!(config.node.network, Network::Regtest);
    assert_eq!(config.api.listen.to_string(), "127.0.0.1:8402");
    assert_eq!(config.api.admin.to_string(), "127.0.0.1:8403");
    assert_eq!(config.ledger.path, Path::new("/h/.local/share/satgrid/regtest/ledger.sqlite"));
    assert_eq!(config.wallet.seed.to_string(), "file:/h/.local/share/satgrid/regtest/seed");
}

#[test]
fn flag_over_environment_over_file_over_default() {
    let text = "[api]\nlisten = \"127.0.0.1:1\"\n";
    let env = [("SATGRID_API_LISTEN", "127.0.0.1:2")];
    let check = |loaded: &Loaded, port: u16, origin: Origin| {
        assert_eq!(loaded.config.api.listen.port(), port);
        assert_eq!(origin_of(loaded, "api.listen"), origin);
    };
    check(&load_text("", &[], &[]).unwrap(), 8402, Origin::Default);
    check(&load_text(text, &[], &[]).unwrap(), 1, Origin::File(2));
    check(&load_text(text, &env, &[]).unwrap(), 2, Origin::Env("SATGRID_API_LISTEN".into()));
    let flags = [("api.listen", "127.0.0.1:3")];
    check(&load_text(text, &env, &flags).unwrap(), 3, Origin::Flag("--set".into()));
}

#[test]
fn every_kind_from_the_environment() {
    let env = [
        ("SATGRID_NODE_ROLES", "provider, consumer"),
        ("SATGRID_NODE_NETWORK", "signet"),
        ("SATGRID_SESSION_ACK_TOKENS", "64"),
        ("SATGRID_CONSUMER_ALLOW_UNVERIFIED_NAMES", "true"),
        ("SATGRID_MARKET_RELAYS", "ws://a,ws://b"),
    ];
    let config = load_text("", &env, &[]).unwrap().config;
    assert_eq!(config.node.roles, [Role::Provider, Role::Consumer]);
    assert_eq!(config.node.dir, Path::new("/h/.local/share/satgrid/signet"));
    assert_eq!(config.session.ack_tokens, 64);
    assert!(config.consumer.allow_unverified_names);
    assert_eq!(config.market.relays, ["ws://a", "ws://b"]);
}

#[test]
fn paths_are_anchored_at_the_file() {
    let text = "[node]\ndir = \"state\"\n[[provider.models]]\npath = \"m/x.gguf\"\nprice_in_msat_per_mtok = 1\n\
                price_out_msat_per_mtok = 2\n[wallet]\nchain_password = \"file:pw\"\n";
    let loaded = load_text(text, &[], &[]).unwrap();
    let folder = loaded.file.as_ref().unwrap().parent().unwrap().to_owned();
    let config = loaded.config;
    assert_eq!(config.node.dir, folder.join("state"));
    assert_eq!(config.ledger.path, folder.join("state/ledger.sqlite"));
    assert_eq!(config.wallet.chain_password.unwrap().to_string(), format!("file:{}", folder.join("pw").display()));
    let model = &config.provider.models[0];
    assert_eq!(model.path.as_deref().unwrap(), folder.join("m/x.gguf"));
    assert_eq!((model.listed_name().as_str(), model.cached_price(), model.slots), ("x", 1, 16));
}

#[test]
fn faults_say_where_and_what() {
    let check = |text: &str, env: &[(&str, &str)], message: &str, hint: &str| {
        let error = load_text(text, env, &[]).unwrap_err();
        assert!(error.to_string().contains(message), "{text:?}: {error}");
        let got = error.hint().unwrap_or_default();
        assert!(got.contains(hint), "{text:?}: hint {got:?}");
    };
    check("[api]\n\nlisen = \"x\"", &[], "line 3: unknown key api.lisen", "api.listen");
    check("[apii]\n", &[], "line 1: unknown key apii", "[api]");
    check("[api]\nslice_max_sat = 1", &[], "unknown key api.slice_max_sat", "provider.slice_max_sat");
    check(
        "[[provider.models]]\nprice_in_msat = 1",
        &[],
        "line 2: unknown key provider.models.price_in_msat",
        "price_in",
    );
    check("[session]\nack_tokens = \"many\"", &[], "session.ack_tokens (file, line 2) must be a whole number", "whole");
    check("", &[("SATGRID_SESSION_ACK_TOKENS", "x")], "(environment SATGRID_SESSION_ACK_TOKENS)", "whole");
    check("[session]\nack_tokens = -1", &[], "session.ack_tokens (file, line 2)", "");
    check("[node]\nnetwork = \"bitcoin\"", &[], "node.network (file, line 2)", "");
    check("[api]\nlisten = \"localhost\"", &[], "api.listen (file, line 2)", "");
    check("[wallet]\nchain = \"esplora\"", &[], "wallet.chain (file, line 2)", "");
    check("[api\n", &[], "not valid TOML", "");
}

#[test]
fn a_secret_in_the_file_is_refused_and_not_repeated() {
    let error = load_text("[wallet]\nchain_password = \"hunter2\"", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("wallet.chain_password") && error.contains("env:NAME"), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn a_stray_variable_is_named() {
    let loaded = load_text("", &[("SATGRID_API_LISTN", "x"), ("SATGRID_BIN", "y")], &[]).unwrap();
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].contains("SATGRID_API_LISTEN"), "{:?}", loaded.warnings);
}

#[test]
fn a_missing_file_matters_only_when_it_was_named() {
    let absent = Overrides { file: Some("/nowhere/satgrid.toml".into()), values: Vec::new() };
    assert!(matches!(load(&absent, &env_of(&[])), Err(ConfigError::Unreadable { .. })));
    assert!(load(&Overrides::default(), &env_of(&[("XDG_CONFIG_HOME", "/nowhere")])).unwrap().file.is_none());
}
