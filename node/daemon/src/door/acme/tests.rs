//! A certificate from a real authority, Let's Encrypt's own test server: `tests/scripts/acme.sh` brings it and names its folder in
//! `SATGRID_PEBBLE`. Those that need it are run by that script alone.

use super::*;
use async_trait::async_trait;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use satgrid_api::{
    Api, ApiConfig, CallContext, CompletionRequest, CompletionStream, ModelInfo, Readiness, Service, ServiceError,
    TokenizeRequest, Tokenized,
};
use serde_json::json;
use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
};
use tokio::{net::TcpListener, time::timeout};

const NAME: &str = "door.example";
/// Long enough for a slow machine, short enough to see a renewal.
const LIFE_S: u64 = 9;
const PATIENCE: Duration = Duration::from_secs(60);

/// A door behind which is nothing.
struct Nothing;

#[async_trait]
impl Service for Nothing {
    async fn ready(&self) -> Readiness {
        Readiness { ready: true, reasons: Vec::new() }
    }
    async fn models(&self) -> Vec<ModelInfo> {
        Vec::new()
    }
    async fn complete(&self, request: CompletionRequest, _: CallContext) -> Result<CompletionStream, ServiceError> {
        Err(ServiceError::UnknownModel { model: request.model })
    }
    async fn tokenize(&self, request: TokenizeRequest) -> Result<Tokenized, ServiceError> {
        Err(ServiceError::UnknownModel { model: request.model })
    }
    async fn detokenize(&self, model: String, _: Vec<u32>) -> Result<String, ServiceError> {
        Err(ServiceError::UnknownModel { model })
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The authority, its name service, and where they are.
struct Authority {
    _processes: Vec<Ended>,
    dir: tempfile::TempDir,
    api: SocketAddr,
    management: SocketAddr,
}

fn free() -> SocketAddr {
    let held = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    held.local_addr().unwrap()
}

impl Authority {
    /// One that looks for answers on this port.
    async fn start(door: u16) -> Authority {
        let programs = std::env::var_os("SATGRID_PEBBLE").map(PathBuf::from).expect("SATGRID_PEBBLE names a folder");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (api, management, dns, control) = (free(), free(), free(), free());
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_key = KeyPair::generate().unwrap();
        fs::write(at("root.pem"), root.clone().self_signed(&root_key).unwrap().pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let own = own.signed_by(&key, &Issuer::new(root, root_key)).unwrap();
        fs::write(at("own.pem"), own.pem()).unwrap();
        fs::write(at("own.key"), key.serialize_pem()).unwrap();
        let config = json!({ "pebble": {
            "listenAddress": api, "managementListenAddress": management,
            "certificate": at("own.pem"), "privateKey": at("own.key"), "httpPort": 1, "tlsPort": door,
            "ocspResponderURL": "", "externalAccountBindingRequired": false, "certificateValidityPeriod": LIFE_S,
        }});
        fs::write(at("pebble.json"), config.to_string()).unwrap();
        let quiet = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let names = quiet("pebble-challtestsrv")
            .args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", "", "-defaultIPv4", "127.0.0.1"])
            .args(["-dns01", &dns.to_string(), "-management", &control.to_string()])
            .spawn()
            .unwrap();
        let authority = quiet("pebble")
            .arg("-config")
            .arg(at("pebble.json"))
            .args(["-dnsserver", &dns.to_string()])
            .env("PEBBLE_VA_NOSLEEP", "1")
            .spawn()
            .unwrap();
        let _processes = vec![Ended(names), Ended(authority)];
        let up = Authority { _processes, dir, api, management };
        let listens = async {
            while tokio::net::TcpStream::connect(up.api).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, listens).await.expect("pebble listens");
        up
    }

    fn settings(&self) -> config::Acme {
        config::Acme {
            domains: vec![NAME.to_owned()],
            contact: Some("mailto:operator@door.example".to_owned()),
            directory: format!("https://localhost:{}/dir", self.api.port()),
            ca: Some(self.dir.path().join("root.pem")),
        }
    }

    /// A client that trusts what this authority signs.
    async fn client(&self, door: SocketAddr) -> reqwest::Client {
        let own = reqwest::Certificate::from_pem(&fs::read(self.dir.path().join("root.pem")).unwrap()).unwrap();
        let ask = reqwest::Client::builder().add_root_certificate(own).build().unwrap();
        let roots = format!("https://localhost:{}/roots/0", self.management.port());
        let root = ask.get(roots).send().await.unwrap().bytes().await.unwrap();
        let root = reqwest::Certificate::from_pem(&root).unwrap();
        let client = reqwest::Client::builder().add_root_certificate(root).resolve(NAME, door);
        // No connection is kept: each request shakes hands anew.
        client.pool_max_idle_per_host(0).build().unwrap()
    }
}

async fn until<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let look = async {
        loop {
            if let Some(found) = found() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(PATIENCE, look).await.expect("in time")
}

fn keeper(settings: &config::Acme, dir: &Path) -> Keeper {
    let kept = Kept::of(settings, dir);
    kept.make_folder().unwrap();
    Keeper { settings: settings.clone(), kept, certificates: Arc::default() }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs pebble: tests/scripts/acme.sh"]
async fn a_real_authority_signs_and_signs_again() {
    let port = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let door = port.local_addr().unwrap();
    let authority = Authority::start(door.port()).await;
    let (settings, shutdown) = (authority.settings(), CancellationToken::new());
    let data = authority.dir.path();
    let tls = start(settings.clone(), data, shutdown.clone()).unwrap();
    let api = Api::new(Arc::new(Nothing), ApiConfig::default());
    let served = tokio::spawn(async move { api.serve_over(port, Some(tls), std::future::pending::<()>()).await });

    let kept = Kept::of(&settings, data);
    let first = until(|| kept.held().unwrap()).await;
    let client = authority.client(door).await;
    let url = format!("https://{NAME}:{}/health", door.port());
    assert_eq!(client.get(&url).send().await.unwrap().status().as_u16(), 200);

    // What is kept is only its owner's to read, and serves after a restart before anything is asked.
    use std::os::unix::fs::PermissionsExt;
    for entry in fs::read_dir(data.join("acme")).unwrap().flatten() {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    assert!(keeper(&settings, data).take_up().is_some());

    // Renewed before its end, and served: the first one alone would be refused by now.
    let second = until(|| kept.held().unwrap().filter(|held| held.chain != first.chain)).await;
    assert!(second.life.ends > first.life.ends);
    until(|| (unix_now() > first.life.ends).then_some(())).await;
    assert_eq!(client.get(&url).send().await.unwrap().status().as_u16(), 200);
    assert_eq!(kept.failure(), None);
    shutdown.cancel();
    served.abort();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs pebble: tests/scripts/acme.sh"]
async fn an_authority_that_finds_no_answer_is_told_in_words() {
    // Nobody listens where the authority looks.
    let authority = Authority::start(free().port()).await;
    let keeper = keeper(&authority.settings(), authority.dir.path());
    let error = keeper.renew().await.unwrap_err();
    assert!(error.contains("that port must lead to door.listen"), "{error}");
    assert!(keeper.take_up().is_none());

    // An account that the authority does not know any more is made anew.
    let account = fs::read_to_string(account_file(authority.dir.path())).unwrap();
    let mut forgotten: serde_json::Value = serde_json::from_str(&account).unwrap();
    forgotten["id"] = format!("https://localhost:{}/my-account/none", authority.api.port()).into();
    fs::write(account_file(authority.dir.path()), forgotten.to_string()).unwrap();
    let error = keeper.renew().await.unwrap_err();
    assert!(error.contains("that port must lead to door.listen"), "{error}");
}

fn account_file(data: &Path) -> PathBuf {
    let mut files = fs::read_dir(data.join("acme")).unwrap().flatten().map(|entry| entry.path());
    files.find(|path| path.extension().is_some_and(|end| end == "json")).unwrap()
}

#[tokio::test]
async fn without_its_authority_the_old_certificate_serves() {
    let dir = tempfile::tempdir().unwrap();
    let settings = config::Acme {
        domains: vec![NAME.to_owned()],
        contact: None,
        directory: format!("https://{}/dir", free()),
        ca: None,
    };
    let keeper = keeper(&settings, dir.path());
    let key = KeyPair::generate().unwrap();
    let chain = CertificateParams::new(settings.domains.clone()).unwrap().self_signed(&key).unwrap().pem();
    let life = Life::of_pem(&chain).unwrap();
    keeper.kept.keep(&kept::Held { key: key.serialize_pem(), chain, life }).unwrap();
    let error = keeper.renew().await.unwrap_err();
    assert!(error.contains("door.acme_directory"), "{error}");
    keeper.kept.keep_failure(&error);
    assert_eq!(keeper.take_up(), Some(life));
    assert_eq!(keeper.kept.failure(), Some(error));
}

#[test]
fn problems_come_with_what_to_do() {
    for (kind, says) in [
        ("urn:ietf:params:acme:error:connection", "door.listen"),
        ("urn:ietf:params:acme:error:dns", "must resolve"),
        ("urn:ietf:params:acme:error:rateLimited", "staging"),
        ("urn:ietf:params:acme:error:caa", "CAA"),
    ] {
        assert!(authority::hint_of(kind, "a.example").unwrap().contains(says), "{kind}");
    }
    assert_eq!(authority::hint_of("urn:ietf:params:acme:error:malformed", "a.example"), None);
}
