//! House rules that a compiler does not know: the dependency drawing, pure rooms, and what files may look like.
//!
//! The drawing is the table [`ROOMS`]. To let one room use another, change the table and say why in `docs/adr/`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// A room: its folder, its package, whether it is pure, and the rooms that it may use.
struct Room {
    folder: &'static str,
    package: &'static str,
    pure: bool,
    may_use: &'static [&'static str],
}

const fn pure(folder: &'static str, package: &'static str, may_use: &'static [&'static str]) -> Room {
    Room { folder, package, pure: true, may_use }
}

const fn effects(folder: &'static str, package: &'static str, may_use: &'static [&'static str]) -> Room {
    Room { folder, package, pure: false, may_use }
}

/// The dependency drawing. Adapters point at their own domain only; they meet only in the daemon.
const ROOMS: &[Room] = &[
    pure("types", "satgrid-types", &[]),
    pure("pricing", "satgrid-pricing", &["types"]),
    pure("market", "satgrid-market", &["types", "pricing"]),
    pure("ledger", "satgrid-ledger", &["types", "pricing"]),
    pure("protocol", "satgrid-protocol", &["types", "pricing", "ledger"]),
    pure("wallet", "satgrid-wallet", &["types"]),
    pure("engine", "satgrid-engine", &["types"]),
    pure("node", "satgrid-node", &["types", "pricing", "market", "ledger", "protocol", "wallet", "engine"]),
    effects("market/nostr", "satgrid-market-nostr", &["types", "market"]),
    effects("protocol/quic", "satgrid-protocol-quic", &["types", "protocol"]),
    effects("ledger/sqlite", "satgrid-ledger-sqlite", &["types", "ledger"]),
    effects("ledger/postgres", "satgrid-ledger-postgres", &["types", "ledger"]),
    effects("ledger/cli", "satgrid-ledger-cli", &["types", "ledger", "ledger/sqlite", "ledger/postgres"]),
    effects("wallet/ldk", "satgrid-wallet-ldk", &["types", "wallet"]),
    effects("wallet/nwc", "satgrid-wallet-nwc", &["types", "wallet"]),
    effects("engine/llama", "satgrid-engine-llama", &["types", "engine"]),
    effects("engine/openai", "satgrid-engine-openai", &["types", "engine"]),
    effects("api", "satgrid-api", &["types"]),
    effects("node/devnet", "satgrid-devnet", &[]),
];

/// These may use every room: the daemon joins them, the tests exercise them.
const JOINERS: &[&str] = &["satgrid", "satgrid-tests"];

/// What no pure room may reach, not even through others: runtimes, sockets, databases, heavy technologies.
const NEVER_IN_PURE: &[&str] = &[
    "tokio",
    "async-std",
    "smol",
    "mio",
    "socket2",
    "quinn",
    "quinn-proto",
    "rustls",
    "reqwest",
    "hyper",
    "axum",
    "tower-http",
    "sqlx",
    "sqlx-core",
    "rusqlite",
    "libsqlite3-sys",
    "nostr-sdk",
    "ldk-node",
    "bdk_wallet",
    "llama-cpp-2",
    "llama-cpp-sys-2",
    "tracing-subscriber",
    "clap",
    "tempfile",
    "hf-hub",
];

/// Features that exist for tests and simulations. The shipped binary can have none of them.
const TEST_FEATURES: &[&str] = &["fake", "toy", "conformance", "tiny", "test", "testing", "sim"];

const MOST_LINES: usize = 600;

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// `cargo metadata`, from what is on this machine; a fresh one may have to fetch manifests first.
fn metadata() -> Value {
    let ask = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO"));
        command.args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"]);
        command.args(more).current_dir(root()).output().expect("cargo starts")
    };
    let offline = ask(&["--offline"]);
    let output = if offline.status.success() { offline } else { ask(&[]) };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The packages of this workspace, by name.
fn members(metadata: &Value) -> BTreeMap<&str, &Value> {
    let ids: BTreeSet<&str> = list(metadata, "workspace_members").iter().filter_map(Value::as_str).collect();
    let packages = list(metadata, "packages").iter().filter(|package| ids.contains(text(package, "id")));
    packages.map(|package| (text(package, "name"), package)).collect()
}

/// What a package needs to run: no build scripts' needs, no tests'.
fn normal_dependencies(package: &Value) -> impl Iterator<Item = &Value> {
    list(package, "dependencies").iter().filter(|dependency| dependency["kind"].is_null())
}

fn package_of(folder: &str) -> &'static str {
    ROOMS.iter().find(|room| room.folder == folder).map_or("", |room| room.package)
}

#[test]
fn the_dependency_drawing_is_true() {
    let metadata = metadata();
    let members = members(&metadata);
    let mut faults = Vec::new();
    for (name, package) in &members {
        if JOINERS.contains(name) {
            continue;
        }
        let Some(room) = ROOMS.iter().find(|room| room.package == *name) else {
            faults.push(format!("{name} is in no room of the drawing"));
            continue;
        };
        let manifest = root().join(room.folder).join("Cargo.toml");
        if Path::new(text(package, "manifest_path")) != manifest {
            faults.push(format!("{name} is not in {}", room.folder));
        }
        let allowed: BTreeSet<&str> = room.may_use.iter().map(|folder| package_of(folder)).collect();
        for dependency in normal_dependencies(package).map(|dependency| text(dependency, "name")) {
            if members.contains_key(dependency) && !allowed.contains(dependency) {
                faults.push(format!("{name} uses {dependency}"));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
    assert_eq!(members.len(), ROOMS.len() + JOINERS.len(), "the drawing has rooms that the workspace has not");
}

#[test]
fn pure_rooms_reach_no_technology() {
    let metadata = metadata();
    let names: BTreeMap<&str, &str> =
        list(&metadata, "packages").iter().map(|package| (text(package, "id"), text(package, "name"))).collect();
    let nodes: BTreeMap<&str, &Value> =
        list(&metadata["resolve"], "nodes").iter().map(|node| (text(node, "id"), node)).collect();
    let mut faults = Vec::new();
    for room in ROOMS.iter().filter(|room| room.pure) {
        let start = names.iter().find(|(_, name)| **name == room.package).map(|(id, _)| *id);
        let mut queue: Vec<&str> = start.into_iter().collect();
        let mut seen: BTreeSet<&str> = queue.iter().copied().collect();
        assert!(!queue.is_empty(), "{} is not in the workspace", room.package);
        while let Some(id) = queue.pop() {
            if NEVER_IN_PURE.contains(&names[id]) {
                faults.push(format!("{} reaches {}", room.package, names[id]));
            }
            for dependency in nodes.get(id).map_or(&[][..], |node| list(node, "deps")) {
                let normal = list(dependency, "dep_kinds").iter().any(|kind| kind["kind"].is_null());
                if normal && seen.insert(text(dependency, "pkg")) {
                    queue.push(text(dependency, "pkg"));
                }
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

#[test]
fn the_shipped_binary_has_no_test_features() {
    let metadata = metadata();
    let mut faults = Vec::new();
    for (name, package) in members(&metadata) {
        if name == "satgrid-tests" {
            continue;
        }
        for dependency in normal_dependencies(package).filter(|d| text(d, "name").starts_with("satgrid")) {
            for feature in list(dependency, "features").iter().filter_map(Value::as_str) {
                if TEST_FEATURES.contains(&feature) {
                    faults.push(format!("{name} turns on {}/{feature}", text(dependency, "name")));
                }
            }
        }
        for (feature, turns_on) in package["features"].as_object().into_iter().flatten() {
            let turns_on: Vec<&str> = turns_on.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let shipped = feature == "default" || !TEST_FEATURES.contains(&feature.as_str());
            let test_part = |part: &&str| TEST_FEATURES.contains(&part.rsplit(['/', ':']).next().unwrap_or(part));
            if shipped && turns_on.iter().any(test_part) {
                faults.push(format!("feature {feature} of {name} turns on {turns_on:?}"));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

#[test]
fn every_crate_inherits_the_lints() {
    let metadata = metadata();
    for (name, package) in members(&metadata) {
        let manifest = fs::read_to_string(text(package, "manifest_path")).expect("the manifest is there");
        let inherits =
            manifest.split("[lints]").nth(1).is_some_and(|rest| rest.trim_start().starts_with("workspace = true"));
        assert!(inherits, "{name} does not inherit the workspace's lints");
        assert!(package["publish"].as_array().is_some_and(Vec::is_empty), "{name} could be published by mistake");
        assert_eq!(text(package, "license"), "MIT OR Apache-2.0", "{name}");
    }
}

#[test]
fn pure_rooms_ban_effects_by_lint_and_adapters_do_not_inherit_that() {
    let read = |folder: &str| fs::read_to_string(root().join(folder).join("clippy.toml")).unwrap_or_default();
    let rules = read("types");
    for method in ["SystemTime::now", "Instant::now", "thread::sleep", "thread_rng", "fs::read"] {
        assert!(rules.contains(method), "types/clippy.toml does not ban {method}");
    }
    for room in ROOMS {
        let text = read(room.folder);
        if room.pure {
            assert_eq!(text, rules, "{}/clippy.toml differs from types/clippy.toml", room.folder);
        } else if room.folder.contains('/') {
            assert!(!text.is_empty() && !text.contains("disallowed"), "{} needs a clippy.toml of its own", room.folder);
        }
    }
}

/// Every file that could be committed, relative to the root.
fn files() -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry")) {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let kind = entry.file_type().expect("a kind");
            let ours = !name.starts_with('.') || matches!(name.as_str(), ".ci" | ".cargo" | ".gitignore");
            if kind.is_dir() && ours && !name.starts_with("target") && name != "__pycache__" {
                walk(&path, found);
            } else if kind.is_file() && ours {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    assert!(found.len() > 50, "only {} files found", found.len());
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[test]
fn source_files_say_what_they_are_for_and_stay_short() {
    let mut faults = Vec::new();
    // The shim is one line of re-export under another crate's name.
    let sources = files().into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    for path in sources.filter(|path| !relative(path).contains("shim-rusqlite")) {
        let source = fs::read_to_string(&path).expect("a text");
        let first = source.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        // Tests beside the code are introduced by the module that they test.
        let place = relative(&path);
        let unit_tests = place.contains("/src/") && (place.ends_with("/tests.rs") || place.contains("/tests/"));
        if !first.starts_with("//!") && !unit_tests {
            faults.push(format!("{} does not begin with //!", relative(&path)));
        }
        let lines = source.lines().count();
        if lines > MOST_LINES {
            faults.push(format!("{} has {lines} lines, more than {MOST_LINES}", relative(&path)));
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

#[test]
fn no_file_names_a_machine_or_leaves_a_note_to_self() {
    // Put together here so that this file does not find itself.
    let banned: Vec<String> = [
        ("/wo", "rk/"),
        ("/ro", "ot/"),
        ("TO", "DO"),
        ("FIX", "ME"),
        ("XX", "X"),
        ("crates", ".io"),
        ("pypi", ".org"),
        ("python", "hosted"),
    ]
    .map(|(a, b)| format!("{a}{b}"))
    .to_vec();
    let mut faults = Vec::new();
    for path in files().into_iter().filter(|path| !path.ends_with("Cargo.lock")) {
        // Files that are no text (golden vectors, pictures) hold no notes.
        let Ok(source) = fs::read_to_string(&path) else { continue };
        for (number, line) in source.lines().enumerate() {
            for word in banned.iter().filter(|word| line.contains(word.as_str())) {
                faults.push(format!("{}:{} contains {word}", relative(&path), number + 1));
            }
            if line.contains("/home/") && !line.contains("/home/someone") {
                faults.push(format!("{}:{} names a home folder", relative(&path), number + 1));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

/// `20260101120000_create_entries.sql`
fn is_migration_name(name: &str) -> bool {
    let Some((stamp, rest)) = name.strip_suffix(".sql").and_then(|stem| stem.split_once('_')) else { return false };
    let words: Vec<&str> = rest.split('_').collect();
    let word = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    stamp.len() == 14 && stamp.bytes().all(|b| b.is_ascii_digit()) && words.len() >= 2 && words.iter().all(word)
}

#[test]
fn migrations_are_named_by_time_verb_and_object() {
    for (name, good) in [
        ("20260101120000_create_entries.sql", true),
        ("20260101120000_add_index_on_entries.sql", true),
        ("20260101120000_entries.sql", false),
        ("1_create_entries.sql", false),
        ("20260101120000_Create_entries.sql", false),
        ("20260101120000_create_entries.txt", false),
    ] {
        assert_eq!(is_migration_name(name), good, "{name}");
    }
    let migrations = root().join("migrations");
    for path in files().into_iter().filter(|path| path.starts_with(&migrations)) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        assert!(name == "README.md" || is_migration_name(&name), "{}", relative(&path));
    }
}

/// The scripts install a library where it is missing, and another of a like name is none.
#[test]
fn scripts_tell_libclang_from_its_neighbours() {
    let rows = [
        ("usr/lib/llvm-14/lib/libclang-cpp.so.14", false),
        ("usr/lib/x86_64-linux-gnu/libclang-cpp.so.14", false),
        ("usr/lib/llvm-14/lib/libclang.so.1", true),
        ("usr/lib/llvm-19/lib/libclang.so", true),
        ("usr/lib/aarch64-linux-gnu/libclang-14.so.1", true),
    ];
    for (name, expect) in rows {
        let system = tempfile::tempdir().expect("a folder");
        let file = system.path().join(name);
        fs::create_dir_all(file.parent().expect("it is below the root")).expect("folders");
        fs::write(file, "").expect("a file");
        let ask = ". tests/scripts/env.sh && have_system_libclang \"$1\"";
        let asked = Command::new("bash").current_dir(root()).args(["-euc", ask, "-"]).arg(system.path()).status();
        assert_eq!(asked.expect("bash").code(), Some(i32::from(!expect)), "{name}");
    }
}
