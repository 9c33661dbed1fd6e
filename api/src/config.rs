//! Limits and settings of the edge. Every wait, queue and list has its bound here.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use satgrid_types::UnixMs;
use sha2::{Digest, Sha256};

use crate::{accounts::Accounts, door::Door};

/// Bounds that no configuration raises.
pub mod limits {
    use std::time::Duration;

    /// OpenAI's own limit.
    pub const MAX_STOPS: usize = 4;
    pub const MAX_STOP_BYTES: usize = 256;
    pub const MAX_MESSAGES: usize = 4_096;
    /// Texts of one request for embeddings: OpenAI's own limit.
    pub const MAX_TEXTS: usize = 2_048;
    pub const MAX_MODEL_NAME_BYTES: usize = 256;
    pub const MAX_FALLBACK_MODELS: usize = 8;
    /// Replies to one request: `n`, times the prompts of a legacy request.
    pub const MAX_CHOICES: u32 = 32;
    /// `n` times the body: each reply holds prompt and tools for itself, and of the room for bodies they took one share.
    pub const MAX_REPEATED_BYTES: usize = 16 << 20;
    pub const MAX_TOP_LOGPROBS: u32 = 20;
    pub const MAX_TOOLS: usize = 128;
    pub const MAX_TOOL_NAME_BYTES: usize = 64;
    /// Names in one list of `provider`.
    pub const MAX_PROVIDERS: usize = 64;
    pub const MAX_PROVIDER_NAME_BYTES: usize = 128;
    /// Far above any context on the market; keeps counts inside 32 bits.
    pub const MAX_TOKENS: u32 = 1 << 24;
    /// `/v1/completions` without `max_tokens`, as OpenAI documents it.
    pub const TEXT_COMPLETION_MAX_TOKENS: u32 = 16;
    /// A reply that grows over this is our error, not the client's memory problem.
    pub const MAX_REPLY_BYTES: usize = 4 << 20;
    /// Frames that wait for a slow reader; then the work waits.
    pub const STREAM_FRAMES: usize = 16;
    /// How long an HTTP status may still be decided; after this the stream opens and errors travel in it.
    pub const FIRST_EVENT_WAIT: Duration = Duration::from_secs(10);
    /// Silence after which a comment shows that the stream lives.
    pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
    pub const MAX_TRACE_ID_BYTES: usize = 64;
    pub const MAX_IDEMPOTENCY_KEY_BYTES: usize = 255;
    /// Request head: all headers together.
    pub const MAX_HEAD_BYTES: usize = 64 << 10;
    pub const HEAD_WAIT: Duration = Duration::from_secs(30);

    const _: () = assert!(FIRST_EVENT_WAIT.as_secs() < KEEP_ALIVE.as_secs());
    const _: () = assert!(MAX_STOPS <= 4, "OpenAI clients assume four");
}

/// A key that opens `/v1`. Only its hash is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Shown in logs and handed to the service; not secret.
    pub name: String,
    pub sha256: [u8; 32],
}

impl ApiKey {
    pub fn new(name: impl Into<String>, secret: &str) -> ApiKey {
        ApiKey { name: name.into(), sha256: Sha256::digest(secret.as_bytes()).into() }
    }
}

/// The wall clock, as a value: tests hand in a fixed one.
pub type Clock = Arc<dyn Fn() -> UnixMs + Send + Sync>;
/// Source of request ids and of seeds that the client did not choose.
pub type Entropy = Arc<dyn Fn() -> [u8; 32] + Send + Sync>;

#[derive(Clone)]
pub struct ApiConfig {
    /// Empty: only keyless callers on this machine, if those are allowed.
    pub keys: Vec<ApiKey>,
    /// Keys that are stored, with budgets; none where the node keeps no accounts.
    pub accounts: Option<Arc<dyn Accounts>>,
    /// This endpoint is for strangers who pay invoices; callers without a key are asked for money.
    pub door: Option<Arc<dyn Door>>,
    /// Lets callers from a loopback address in without a key. A request that shows a key is still held to it.
    pub keyless_loopback: bool,
    /// Web origins that may call, beside pages served from this machine: `https://chat.example`. Never `*`: a page that
    /// anyone can open in a browser on this machine could spend the wallet.
    pub allowed_origins: Vec<String>,
    /// Host names that keyless callers may use beside `localhost` and IP addresses (guards against DNS rebinding).
    pub allowed_hosts: Vec<String>,
    pub max_body_bytes: usize,
    pub body_wait: Duration,
    /// Completions at one time, most of them waiting for their next token; more get 503.
    pub max_in_flight: usize,
    /// Bytes of all bodies that are read and parsed at one time: what a flood would fill the memory with. More get 503.
    pub max_reading_bytes: usize,
    pub max_connections: usize,
    /// A completion that takes longer is given up.
    pub max_request: Duration,
    /// A reader that takes no byte for so long has left.
    pub stalled_reader: Duration,
    /// How long open streams may go on after shutdown was asked for.
    pub drain: Duration,
    /// How long a reply is kept for its `Idempotency-Key`.
    pub idempotency_window: Duration,
    /// How long keyed work goes on while nobody listens.
    pub idempotency_grace: Duration,
    pub idempotency_runs: usize,
    pub clock: Clock,
    pub entropy: Entropy,
}

impl Default for ApiConfig {
    fn default() -> Self {
        ApiConfig {
            keys: Vec::new(),
            accounts: None,
            door: None,
            keyless_loopback: true,
            allowed_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            max_body_bytes: 4 << 20,
            body_wait: Duration::from_secs(30),
            max_in_flight: 1_024,
            max_reading_bytes: 256 << 20,
            max_connections: 2_048,
            max_request: Duration::from_secs(3_600),
            stalled_reader: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            idempotency_window: Duration::from_secs(600),
            idempotency_grace: Duration::from_secs(60),
            idempotency_runs: 256,
            clock: Arc::new(wall_clock),
            entropy: Arc::new(rand::random),
        }
    }
}

fn wall_clock() -> UnixMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
