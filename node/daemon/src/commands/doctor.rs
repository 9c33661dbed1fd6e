//! `satgrid doctor`: what this machine lacks for what the configuration asks, each lack with its remedy.

mod devices;
mod door;

use serde::Serialize;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::print;
use crate::cli::{Format, Globals};
use crate::clock::Word;
use crate::config::{ChainSource, Config, Secret, problems};
use crate::failure::Findings;
use crate::models::{Store, free_bytes, inspect};
use crate::progress::megabytes;
use crate::seed;
use satgrid_wallet::keys::Phrase;
use satgrid_wallet::sealed::is_sealed;
use zeroize::Zeroizing;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    level: Level,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

fn ok(what: &str, detail: impl Into<String>) -> Finding {
    Finding { what: what.to_owned(), level: Level::Ok, detail: detail.into(), remedy: None }
}

fn warn(what: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { what: what.to_owned(), level: Level::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
}

fn fail(what: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { level: Level::Fail, ..warn(what, detail, remedy) }
}

pub(super) fn run(globals: &Globals) -> anyhow::Result<()> {
    let loaded = globals.load()?;
    let config = &loaded.config;
    let mut findings = vec![match &loaded.file {
        Some(file) => ok("configuration", file.display().to_string()),
        None => warn("configuration", "no file; defaults only", "satgrid init"),
    }];
    findings.extend(problems(config).into_iter().map(|p| fail(p.key, p.fault, p.remedy)));
    findings.push(seed_finding(config));
    findings.push(disk(config));
    findings.extend(ports(config));
    findings.extend(door::certificate(config));
    findings.extend(relays(config));
    findings.extend(chain(config));
    findings.extend(clock(config));
    if config.is_provider() {
        findings.extend(models_for_sale(config));
        findings.push(processor());
        findings.extend(devices::findings(config));
    }
    findings.push(pip());
    show(globals.format, &findings)?;
    if findings.iter().any(|finding| finding.level == Level::Fail) { Err(Findings.into()) } else { Ok(()) }
}

fn show(format: Format, findings: &[Finding]) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(&findings);
    }
    let rows = findings.iter().map(|finding| {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let detail = match &finding.remedy {
            Some(remedy) => format!("{}\nhint: {remedy}", finding.detail),
            None => finding.detail.clone(),
        };
        vec![level.to_owned(), finding.what.clone(), detail]
    });
    print::out(&print::table(&["", "what", "found"], rows.collect()))
}

fn seed_finding(config: &Config) -> Finding {
    let place = config.wallet.seed.to_string();
    let text = match config.wallet.seed.read() {
        Ok(text) => Zeroizing::new(text),
        Err(error) => {
            return fail("seed", error.to_string(), "satgrid init makes one; an existing file needs chmod 600");
        }
    };
    if is_sealed(&text) {
        return encrypted_seed(config, &place);
    }
    if let Err(error) = Phrase::parse(&text) {
        return fail("seed", format!("{place}: {error}"), "restore it from paper: satgrid init --restore");
    }
    match &config.wallet.seed {
        Secret::File(_) => ok(
            "seed",
            format!(
                "{place}, as plain text that only its owner can read (mode 0600)\nwho takes the disk, a backup of it or root \
                 on this machine takes the money; `satgrid wallet encrypt` puts it under a passphrase, `credential:NAME` \
                 leaves it to systemd"
            ),
        ),
        Secret::Credential(_) => ok("seed", format!("{place}, decrypted by the service manager")),
        Secret::Fd(_) => ok("seed", format!("{place}, given by whoever starts the node")),
        Secret::Env(_) => warn(
            "seed",
            format!("{place}: every process of this user can read the environment"),
            "use file:PATH or credential:NAME",
        ),
    }
}

/// Opened where that needs nobody at the keyboard.
fn encrypted_seed(config: &Config, place: &str) -> Finding {
    let from = match &config.wallet.passphrase {
        None => {
            let detail =
                format!("{place}, encrypted; `satgrid up` asks for its passphrase, so it starts on a terminal only");
            return ok("seed", detail);
        }
        Some(from @ Secret::Fd(_)) => {
            return ok("seed", format!("{place}, encrypted; its passphrase comes from {from}, not tried"));
        }
        Some(from @ (Secret::Env(_) | Secret::File(_) | Secret::Credential(_))) => from,
    };
    match (seed::read(config), from) {
        (Err(error), _) => {
            fail("seed", format!("{error:#}"), "set wallet.passphrase right; the words on paper open it too")
        }
        (Ok(_), Secret::File(path)) if path.parent() == Some(config.node.dir.as_path()) => warn(
            "seed",
            format!("{place}, encrypted, and its passphrase lies beside it: a copy of the folder has both"),
            "keep the passphrase elsewhere: credential:NAME, fd:NUMBER, another disk",
        ),
        (Ok(_), _) => ok("seed", format!("{place}, encrypted; {from} opens it")),
    }
}

/// Below this a node should not promise work.
const LOW_DISK_BYTES: u64 = 1_000_000_000;

fn disk(config: &Config) -> Finding {
    let existing = config.node.dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match free_bytes(existing) {
        Ok(free) if free >= LOW_DISK_BYTES => ok("disk", format!("{} free in {}", megabytes(free), existing.display())),
        Ok(free) => fail("disk", format!("only {} free in {}", megabytes(free), existing.display()), "free some space"),
        Err(error) => warn("disk", error.to_string(), "check node.dir"),
    }
}

fn ports(config: &Config) -> Vec<Finding> {
    let taken = |what: &str, address: SocketAddr, result: std::io::Result<()>| match result {
        Ok(()) => ok(what, format!("{address} is free")),
        Err(error) => warn(
            what,
            format!("{address}: {error}"),
            "stop what listens there (perhaps this node), or choose another port",
        ),
    };
    let tcp = |address: SocketAddr| TcpListener::bind(address).map(drop);
    let mut findings = vec![taken("wallet.listen", config.wallet.listen, tcp(config.wallet.listen))];
    if config.is_consumer() {
        findings.push(taken("api.listen", config.api.listen, tcp(config.api.listen)));
        findings.push(taken("api.admin", config.api.admin, tcp(config.api.admin)));
    }
    findings.extend(config.door.listen.map(|address| taken("door.listen", address, tcp(address))));
    if config.is_provider() {
        let address = config.provider.quic_listen;
        findings.push(taken("provider.quic_listen", address, UdpSocket::bind(address).map(drop)));
    }
    findings
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

fn reach(what: &str, host_port: &str, remedy: &str) -> Finding {
    let connect = || -> std::io::Result<()> {
        let none = || std::io::Error::other("the name has no address");
        let address = host_port.to_socket_addrs()?.next().ok_or_else(none)?;
        TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map(drop)
    };
    match connect() {
        Ok(()) => ok(what, format!("{host_port} answers")),
        Err(error) => fail(what, format!("{host_port}: {error}"), remedy),
    }
}

fn clock(config: &Config) -> Vec<Finding> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let words = runtime.block_on(crate::clock::words(config));
    let finding = |word: Word| match word {
        Word::Right(detail) => ok("clock", detail),
        Word::Doubtful(detail) => warn("clock", detail, crate::clock::REMEDY),
        Word::Wrong(detail) => fail("clock", detail, crate::clock::REMEDY),
    };
    words.into_iter().map(finding).collect()
}

fn relays(config: &Config) -> Vec<Finding> {
    let address = |relay: &String| url_host_port(relay);
    let reachable = |host_port: String| reach("market.relays", &host_port, "check the address, or name another relay");
    config.market.relays.iter().filter_map(address).map(reachable).collect()
}

fn chain(config: &Config) -> Option<Finding> {
    let host_port = match config.wallet.chain.as_ref()? {
        ChainSource::Esplora { url } => url_host_port(url)?,
        ChainSource::Electrum { server } => server.rsplit("//").next()?.to_owned(),
        ChainSource::Bitcoind { host, port, .. } => format!("{host}:{port}"),
    };
    Some(reach("wallet.chain", &host_port, "check that the chain source runs and is reachable"))
}

/// `host:port` of an address such as `wss://host/path`.
fn url_host_port(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?']).next()?;
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let default = if matches!(scheme, "wss" | "https") { 443 } else { 80 };
    Some(if has_port { host.to_owned() } else { format!("{host}:{default}") })
}

fn models_for_sale(config: &Config) -> Vec<Finding> {
    let store = Store::new(&config.models.dir);
    let check = |model: &crate::config::ModelForSale| {
        let name = model.listed_name();
        let path = match (&model.path, &model.name) {
            (Some(path), _) => path.clone(),
            (None, Some(name)) => match store.find(name) {
                Some(record) => store.path(&record),
                None => {
                    return fail("model", format!("{name} is not in the store"), format!("satgrid models pull {name}"));
                }
            },
            (None, None) => return fail("model", format!("{name} has no file"), "give a path or a name"),
        };
        match inspect(&path) {
            Ok(_) => ok("model", format!("{name}: {}", path.display())),
            Err(fault) => fail("model", format!("{name}: {}: {fault}", path.display()), fault.hint()),
        }
    };
    config.provider.models.iter().map(check).collect()
}

fn processor() -> Finding {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cfg!(not(target_arch = "x86_64")) || info.contains(" avx2 ") {
        ok("processor", format!("{cores} cores"))
    } else {
        fail("processor", "it has no AVX2, which the engine is built for", "sell from another machine")
    }
}

fn pip() -> Finding {
    let run = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match run {
        Ok(status) if status.success() => ok("pip", "python3 -m pip works"),
        Ok(_) | Err(_) => warn(
            "pip",
            "python3 -m pip does not work; catalogue models are fetched by it",
            "apt-get install python3 python3-pip",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let check = |url: &str, expect: Option<&str>| assert_eq!(url_host_port(url).as_deref(), expect, "{url}");
        check("ws://127.0.0.1:7777", Some("127.0.0.1:7777"));
        check("wss://relay.example/path", Some("relay.example:443"));
        check("http://host", Some("host:80"));
        check("nonsense", None);
    }
}
