use super::*;
use satgrid_devnet::{ChainServer, Shared, chain};
use satgrid_wallet::{Lightning, Network, keys::Phrase};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet};
use serde_json::json;
use std::time::Instant;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(30);
/// What is swept; at 5% miners may get 2,000 sat of it.
const GOES_SAT: u64 = 40_000;
const NOBODY: &str = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202";

/// A wallet with coins on a regtest chain in this process, and its sweeps.
struct Purse {
    chain: Shared,
    server: ChainServer,
    wallet: Arc<LdkWallet>,
    sweeper: Sweeper,
    _dir: TempDir,
}

impl Purse {
    async fn new() -> Purse {
        let chain = chain::shared();
        let server = satgrid_devnet::serve(chain.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let dir = TempDir::new().unwrap();
        let seed = Phrase::from_entropy(&[7; 16]).unwrap().seed();
        let source = ChainSource::Esplora { url: server.url() };
        let config = LdkConfig::new(dir.path().join("wallet"), seed.clone(), source);
        mine(&server, 1, NOBODY).await;
        let wallet = Arc::new(LdkWallet::start(config).await.unwrap());
        mine(&server, 1, &wallet.new_address().await.unwrap()).await;
        mine(&server, 100, NOBODY).await;
        let defaults = Rules {
            to: Destination::Cold,
            above_sat: 0,
            keep_sat: 0,
            every_ms: 3_600_000,
            max_fee_permille: 10,
            max_onchain_fee_permille: 50,
        };
        let sweeper = Sweeper {
            wallet: wallet.clone(),
            own: Own::default(),
            rules: None,
            defaults,
            sat_per_vb: None,
            cold: (Network::Regtest, ColdKeys::Words(seed)),
            dir: dir.path().to_owned(),
            one: Mutex::new(()),
        };
        let purse = Purse { chain, server, wallet, sweeper, _dir: dir };
        purse.until(|balance| balance.onchain_confirmed_sat > 0).await;
        purse
    }

    async fn until(&self, fits: impl Fn(&Balance) -> bool) -> Balance {
        let since = Instant::now();
        loop {
            self.wallet.sync().await.unwrap();
            let balance = self.wallet.balance().await.unwrap();
            if fits(&balance) {
                return balance;
            }
            assert!(since.elapsed() < LIMIT, "{balance:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn estimate(&self, sat_per_vb: u32) {
        self.chain.lock().unwrap().set_estimate(sat_per_vb);
    }

    /// What stays where [`GOES_SAT`] goes.
    async fn keep_sat(&self) -> u64 {
        self.wallet.balance().await.unwrap().onchain_confirmed_sat - GOES_SAT
    }

    /// What miners got of the transactions that left the wallet.
    async fn paid_sat(&self) -> Vec<u64> {
        let rows = self.wallet.onchain_rows().await.unwrap();
        rows.iter().filter(|row| !row.inbound).map(|row| row.fee.0 / 1_000).collect()
    }
}

async fn mine(server: &ChainServer, blocks: u32, to: &str) {
    let call = json!({ "id": 1, "method": "generatetoaddress", "params": [blocks, to] });
    let sent = reqwest::Client::new().post(server.url()).json(&call).send().await.unwrap();
    assert!(sent.status().is_success(), "{sent:?}");
}

/// Nobody looks at what a sweep by schedule costs: it is held back over the cap, and sent under it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_by_schedule_waits_for_lower_fees() {
    let purse = Purse::new().await;
    let keep_sat = purse.keep_sat().await;
    let rules = Rules { keep_sat, ..purse.sweeper.defaults.clone() };
    // Some 140 vB at 50 sat each are more than the 2,000 sat that miners may get.
    purse.estimate(50);
    let ask = Ask { to: Some("cold".into()), keep_sat: Some(keep_sat), ..Ask::default() };
    let preview = purse.sweeper.preview(&ask).await.unwrap();
    assert!(preview.waits.is_some_and(|why| why.contains("sweep_max_onchain_fee_permille")));
    for _ in 0..2 {
        let waits = purse.sweeper.by_schedule(&rules).await.unwrap_err();
        let why = waits.downcast_ref::<TooDear>().unwrap_or_else(|| panic!("{waits:#}"));
        assert_eq!((why.amount_sat, why.max_fee), (GOES_SAT, Msat::sat(2_000)));
        assert!(why.fee_sat > 2_000);
        assert_eq!(purse.sweeper.list().unwrap(), [], "it was not begun, and puts off no other");
    }
    assert!(purse.paid_sat().await.is_empty(), "nothing was sent");

    // Lower fees: it goes, at the rate that was judged, and the next one waits for its time.
    purse.estimate(5);
    assert_eq!(purse.sweeper.preview(&ask).await.unwrap().waits, None);
    let swept = purse.sweeper.by_schedule(&rules).await.unwrap().unwrap();
    assert_eq!((swept.amount_sat, swept.label.as_deref()), (GOES_SAT, Some("by schedule")));
    assert_eq!(purse.sweeper.list().unwrap(), [swept]);
    let before = keep_sat + GOES_SAT;
    let since = Instant::now();
    while purse.until(|_| true).await.onchain_confirmed_sat >= before {
        assert!(since.elapsed() < LIMIT);
        mine(&purse.server, 1, NOBODY).await;
    }
    let paid = purse.paid_sat().await;
    assert!(matches!(paid[..], [fee] if (500..=2_000).contains(&fee)), "{paid:?}");
    let again = Rules { keep_sat: purse.keep_sat().await, ..rules };
    assert_eq!(purse.sweeper.by_schedule(&again).await.unwrap(), None);
    purse.wallet.stop().await.unwrap();
}

/// Who sends by hand has seen what it costs.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_by_hand_is_not_held_back() {
    let purse = Purse::new().await;
    purse.estimate(50);
    let ask = Ask { to: Some("cold".into()), keep_sat: Some(purse.keep_sat().await), ..Ask::default() };
    let preview = purse.sweeper.preview(&ask).await.unwrap();
    assert!(preview.waits.is_some() && preview.onchain.is_some_and(|draft| draft.fee_sat > 2_000));
    let swept = purse.sweeper.now(&Ask { sat_per_vb: preview.sat_per_vb, ..ask }).await.unwrap();
    assert_eq!((swept.amount_sat, purse.sweeper.list().unwrap().len()), (GOES_SAT, 1));
    purse.wallet.stop().await.unwrap();
}
