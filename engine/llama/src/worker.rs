//! The child process: it loads one file, says what it is, and serves until its parent goes.
//!
//! Its standard input is one end of a socket pair that the node made, so it has no address that anything else could connect
//! to. Its standard error is the node's log. The end of the socket is the sign to exit, whatever the process is doing: an
//! engine never outlives its node. It opens no file but the one it was told, and no network connection.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use satgrid_engine::embedder::Embedder;
use satgrid_engine::port::{Command, EngineEvent, EngineFacts, SpecialTokens, Speed, TokenizerError};
use satgrid_types::LayerRange;

use crate::backend::LlamaBackend;
use crate::bare;
use crate::devices;
use crate::facts;
use crate::ffi::{self, ExpertHook, Model, ModelConfig};
use crate::lead;
use crate::model_file::{self, ModelFile};
use crate::node_experts::NodeExperts;
use crate::pack::{PackBackend, Waiting};
use crate::render::Renderer;
use crate::scheduler::Scheduler;
use crate::settings::{BATCH, EngineSettings, PackSettings, WorkerArgs};
use crate::socket::Socket;
use crate::stage;
use crate::texts::LlamaTexts;
use crate::watchdog::Watchdog;
use crate::wire::{CallFailure, FromWorker, PieceBytes, PieceTable, ToWorker, VERSION, VocabFacts};

/// Exit codes: the parent went, or all is well; the file did not load; the process was not started by a node.
const GONE: u8 = 0;
const NOT_LOADED: u8 = 2;
const MISUSED: u8 = 64;

/// An idle engine waits this long for more jobs before it begins with the first: those that come together share batches.
const GATHER: Duration = Duration::from_millis(2);
/// Most tokens and most bytes of pieces in a vocabulary; a file that claims more is refused.
const MAX_VOCAB: u32 = 2_000_000;
const MAX_PIECES: usize = 32 * 1024 * 1024;
/// Address space of a tokenizer's process, which maps no weights: far more than the largest vocabulary takes.
const MAX_TOKENIZER_MEMORY: u64 = 4 << 30;

/// Runs the process; returns its exit code. The binary that holds the node calls it for its worker subcommand.
pub fn worker_main(args: WorkerArgs) -> u8 {
    match args {
        WorkerArgs::Bare(settings, load) => match bare::run(&settings, load, |report| println!("{}", report.to_line()))
        {
            Ok(()) => GONE,
            Err(error) => {
                tracing::error!("{error}");
                NOT_LOADED
            }
        },
        WorkerArgs::Devices => {
            for (_, device) in ffi::devices() {
                println!("{}", devices::to_line(&device));
            }
            GONE
        }
        WorkerArgs::Engine(settings) => {
            limit(None);
            serve(|link| run_engine(&settings, false, link))
        }
        WorkerArgs::Trunk(settings) => {
            limit(None);
            serve(|link| run_engine(&settings, true, link))
        }
        WorkerArgs::Pack(settings) => {
            limit(None);
            serve(|link| run_pack(&settings, link))
        }
        WorkerArgs::Stage(settings) => {
            limit(None);
            serve(|link| stage::worker::run(&settings, false, link))
        }
        WorkerArgs::StageTrunk(settings) => {
            limit(None);
            serve(|link| stage::worker::run(&settings, true, link))
        }
        WorkerArgs::Lead(settings) => {
            limit(None);
            serve(|link| lead::worker::run(&settings, link))
        }
        WorkerArgs::Tokenizer { artefact } => {
            limit(Some(MAX_TOKENIZER_MEMORY));
            serve(|link| run_tokenizer(&artefact, link))
        }
    }
}

/// The socket, which a trunk's hook uses in the middle of a batch. One thread computes and speaks: nobody waits for the lock.
#[derive(Clone)]
pub(crate) struct SharedSocket(Arc<Mutex<Socket>>);

impl SharedSocket {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Socket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the node.
pub(crate) struct Link(SharedSocket);

impl Link {
    pub(crate) fn send(&mut self, message: &FromWorker) -> io::Result<()> {
        self.0.lock().send(message)
    }

    /// What the node says next; `None` if it says nothing within the time.
    pub(crate) fn next(&mut self, wait: Duration) -> Result<Option<ToWorker>, Stop> {
        Ok(self.0.lock().next(wait)?)
    }

    /// What the node says next, however long that takes.
    pub(crate) fn wait(&mut self) -> Result<ToWorker, Stop> {
        Ok(self.0.lock().wait()?)
    }

    /// The way to the experts of these layers of a model.
    pub(crate) fn experts(&mut self, layers: LayerRange) -> Box<dyn ExpertHook> {
        Box::new(NodeExperts::new(self.0.clone(), layers))
    }

    /// That the parent may be gone is another thread's to notice.
    pub(crate) fn tell_load(&mut self, permille: u32) {
        let _ = self.send(&FromWorker::Loading { permille });
    }
}

/// Why a worker stops. A parent that went is the ordinary end.
pub(crate) enum Stop {
    ParentGone,
    /// The node's words do not parse.
    Misused(io::Error),
    LoadFailed(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        // A node that died with our words unread shows as a reset connection.
        if error.kind() == io::ErrorKind::InvalidData { Self::Misused(error) } else { Self::ParentGone }
    }
}

/// No core dumps: they would hold prompts. Where memory runs out this process is the one to go, never the node with its
/// wallet. For strangers' files also a bound on memory.
fn limit(memory: Option<u64>) {
    let set = |resource, most: u64| {
        // A system that refuses leaves the process as it was; the other walls stand.
        if let Err(error) = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }) {
            tracing::debug!(%error, "a resource limit was not set");
        }
    };
    set(Resource::Core, 0);
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "1000") {
        tracing::debug!(%error, "the system was not told whom to end first");
    }
    if let Some(memory) = memory {
        set(Resource::As, memory);
    }
}

fn serve(run: impl FnOnce(&mut Link) -> Result<(), Stop>) -> u8 {
    let mut link = match link() {
        Ok(link) => link,
        Err(error) => {
            tracing::error!("an engine worker is started by the node, with a socket as its standard input: {error}");
            return MISUSED;
        }
    };
    match run(&mut link) {
        Ok(()) | Err(Stop::ParentGone) => GONE,
        Err(Stop::Misused(error)) => {
            tracing::error!("the node's words do not parse: {error}");
            MISUSED
        }
        Err(Stop::LoadFailed(reason)) => {
            // If that cannot be written the parent is gone and nobody is left to tell.
            let _ = link.send(&FromWorker::LoadFailed { reason });
            NOT_LOADED
        }
    }
}

fn link() -> io::Result<Link> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Tells a socket from a terminal or a pipe.
    socket.local_addr()?;
    let other_end = socket.try_clone()?;
    std::thread::Builder::new().name("engine-parent".into()).spawn(move || end_with(&other_end))?;
    Ok(Link(SharedSocket(Arc::new(Mutex::new(Socket::new(socket))))))
}

/// Ends the process when the parent is gone: the main thread may be in the middle of a load or a batch. Words do not wake it:
/// that the other end is closed is told even where nothing is asked for.
fn end_with(socket: &UnixStream) {
    while poll(&mut [PollFd::new(socket, PollFlags::empty())], None) == Err(Errno::INTR) {}
    std::process::exit(GONE.into());
}

fn run_engine(settings: &EngineSettings, is_trunk: bool, link: &mut Link) -> Result<(), Stop> {
    link.send(&FromWorker::Loading { permille: 0 })?;
    let failed = |reason: &dyn std::fmt::Display| Stop::LoadFailed(reason.to_string());
    // The file's own table first: a bad file is told in words before llama.cpp sees it.
    let read = model_file::read(&settings.model, is_trunk, |permille| link.tell_load(permille / 2));
    let file = read.map_err(|reason| failed(&reason))?;
    let known_answer = facts::known_answer().map_err(|error| failed(&error))?;
    let layers = LayerRange::new(0, file.facts.layers).filter(|_| is_trunk);
    let hook = layers.map(|layers| link.experts(layers));
    let told = |instruction_set, (slots, context, batch), speed: Option<Speed>, file: ModelFile| {
        Box::new(EngineFacts {
            model: file.facts,
            model_root: file.root,
            tokenizer_hash: file.tokenizer_hash,
            profile: settings.profile,
            build_id: facts::build_id(&known_answer),
            instruction_set,
            slots,
            context,
            batch,
            speed,
        })
    };
    if file.facts.pooling.is_some() {
        if is_trunk {
            return Err(failed(&"a model that embeds is run whole, without experts elsewhere"));
        }
        let opened = LlamaTexts::open(settings, &file.facts, |permille| link.tell_load(500 + permille / 2));
        let (mut texts, shape) = opened.map_err(|error| failed(&error))?;
        let speed = texts.measure(&shape);
        let facts = told(facts::instruction_set(None), (shape.slots, shape.context, shape.batch), speed, file);
        link.send(&FromWorker::EngineReady(facts))?;
        return drive(&mut Reads { embedder: Embedder::new(shape), texts }, link);
    }
    let opened = LlamaBackend::open_with(settings, hook, 0, |permille| link.tell_load(500 + permille / 2));
    let (mut backend, shape) = opened.map_err(|error| failed(&error))?;
    let speed = facts::measure(&mut backend, &shape);
    let facts = told(facts::instruction_set(backend.card()), (shape.slots, shape.context, BATCH), speed, file);
    link.send(&FromWorker::EngineReady(facts))?;
    drive(&mut Writes { scheduler: Scheduler::new(shape), backend }, link)
}

/// What the engine's one thread drives.
trait Machine {
    fn handle(&mut self, command: Command);
    /// One batch; false if there was nothing to compute.
    fn step(&mut self) -> bool;
    fn take_events(&mut self) -> Vec<EngineEvent>;
}

/// A model that writes.
struct Writes {
    scheduler: Scheduler,
    backend: LlamaBackend,
}

impl Machine for Writes {
    fn handle(&mut self, command: Command) {
        self.scheduler.handle(command, &mut self.backend);
    }

    fn step(&mut self) -> bool {
        let busy = self.scheduler.step(&mut self.backend);
        if let Some(positions) = self.backend.piece_beside_streams() {
            self.scheduler.set_prefill_beside_streams(positions);
        }
        busy
    }

    fn take_events(&mut self) -> Vec<EngineEvent> {
        self.scheduler.take_events()
    }
}

/// A model that embeds.
struct Reads {
    embedder: Embedder,
    texts: LlamaTexts,
}

impl Machine for Reads {
    fn handle(&mut self, command: Command) {
        self.embedder.handle(command, &mut self.texts);
    }

    fn step(&mut self) -> bool {
        self.embedder.step(&mut self.texts)
    }

    fn take_events(&mut self) -> Vec<EngineEvent> {
        self.embedder.take_events()
    }
}

/// The engine's one thread: commands between batches, then a batch, then its events.
fn drive(machine: &mut dyn Machine, link: &mut Link) -> Result<(), Stop> {
    let mut idle = false;
    let mut gather_until = Instant::now();
    let watchdog = Watchdog::start()?;
    loop {
        let request = match idle {
            true => Some(link.wait()?),
            false => link.next(gather_until.saturating_duration_since(Instant::now()))?,
        };
        match request {
            Some(ToWorker::Command(command)) => {
                if idle && matches!(command, Command::Start(_)) {
                    gather_until = Instant::now() + GATHER;
                }
                machine.handle(command);
                idle = false;
                // More commands may wait; a batch is long, so all are heard before it.
                continue;
            }
            Some(other) => {
                tracing::error!(?other, "an engine was asked what it does not do");
                continue;
            }
            None => {
                watchdog.begin();
                idle = !machine.step();
                watchdog.end();
            }
        }
        let events = machine.take_events();
        if !events.is_empty() {
            link.send(&FromWorker::Events(events))?;
        }
    }
}

fn run_tokenizer(artefact: &Path, link: &mut Link) -> Result<(), Stop> {
    link.send(&FromWorker::Loading { permille: 0 })?;
    let config = ModelConfig { path: artefact, vocab_only: true, repack: false, offload: None };
    let model = Model::load(&config, |_| {}).map_err(|error| Stop::LoadFailed(error.to_string()))?;
    let facts = vocab_facts(&model).map_err(Stop::LoadFailed)?;
    let special = facts.special.clone();
    link.send(&FromWorker::TokenizerReady(Box::new(facts)))?;
    // Compiled when it is first asked for: a template that breaks the process leaves the vocabulary of use.
    let mut renderer = None;
    loop {
        match link.wait()? {
            ToWorker::Tokenize { text, add_special, parse_special } => {
                let ids = model.tokenize(&text, add_special, parse_special);
                let reason = || TokenizerError::Backend { reason: "the text cannot be tokenised".into() };
                link.send(&FromWorker::Tokenized(ids.ok_or_else(reason)))?;
            }
            ToWorker::Names { ids } => {
                let vocab = model.vocab_size();
                let name = |token| match model.piece(token, true) {
                    Some(bytes) => Ok(PieceBytes(bytes)),
                    None => Err(TokenizerError::UnknownToken { token, vocab }),
                };
                link.send(&FromWorker::Named(ids.into_iter().map(name).collect()))?;
            }
            ToWorker::Render(order) => {
                let renderer = renderer.get_or_insert_with(|| Renderer::new(&model, &special));
                link.send(&FromWorker::Rendered(renderer.render(&order)))?;
            }
            other @ (ToWorker::Command(_)
            | ToWorker::Stage(_)
            | ToWorker::Ring(_)
            | ToWorker::ExpertOutputs(_)
            | ToWorker::ExpertCall { .. }) => {
                tracing::error!(?other, "a tokenizer was asked what it does not do");
            }
        }
    }
}

fn run_pack(settings: &PackSettings, link: &mut Link) -> Result<(), Stop> {
    link.send(&FromWorker::Loading { permille: 0 })?;
    let opened = PackBackend::open(settings, |permille| link.tell_load(permille));
    let (mut backend, facts) = opened.map_err(|error| Stop::LoadFailed(error.to_string()))?;
    link.send(&FromWorker::PackReady(Box::new(facts)))?;
    let (mut waiting, watchdog) = (Waiting::default(), Watchdog::start()?);
    loop {
        // All that is there is heard before the next graph, so that calls on one layer share it.
        let request = match waiting.is_empty() {
            true => Some(link.wait()?),
            false => link.next(Duration::ZERO)?,
        };
        match request {
            Some(ToWorker::ExpertCall { id, call }) => {
                if let Err(error) = waiting.push(id, call, &backend) {
                    link.send(&FromWorker::ExpertAnswer { id, answer: Err(CallFailure::Refused(error)) })?;
                }
            }
            Some(other) => tracing::error!(?other, "the keeper of a pack was asked what it does not do"),
            None => {
                watchdog.begin();
                let answers = waiting.evaluate(&mut backend);
                watchdog.end();
                for (id, answer) in answers {
                    link.send(&FromWorker::ExpertAnswer { id, answer })?;
                }
            }
        }
    }
}

fn vocab_facts(model: &Model) -> Result<VocabFacts, String> {
    let vocab = model.vocab_size();
    if !model.has_tokenizer() {
        return Err("the file brings no tokenizer".into());
    }
    if vocab > MAX_VOCAB {
        return Err(format!("a vocabulary of {vocab} tokens is over the limit of {MAX_VOCAB}"));
    }
    let (mut pieces, mut bytes) = (PieceTable::default(), 0);
    for token in 0..vocab {
        let piece = model.piece(token, false).unwrap_or_default();
        bytes += piece.len();
        if bytes > MAX_PIECES {
            return Err(format!("the vocabulary's text is over the limit of {MAX_PIECES} bytes"));
        }
        pieces.push(&piece);
    }
    let eog = (0..vocab).filter(|&token| model.is_eog(token)).collect();
    let special = SpecialTokens { bos: model.bos(), eos: model.eos(), eog, add_bos: model.adds_bos() };
    Ok(VocabFacts { version: VERSION, special, chat_template: model.chat_template(), pieces })
}
