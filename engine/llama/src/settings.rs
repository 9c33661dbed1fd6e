//! How one engine is run: the settings that the node gives its child process, and their form on a command line.

use std::ffi::OsString;
use std::path::PathBuf;

use satgrid_engine::port::Profile;
use satgrid_engine::stage::ring::RingFacts;
use satgrid_types::{ExpertSet, LayerRange, WireType};

use crate::devices::Offload;

/// Most sequences that llama.cpp can hold in one context.
pub const MAX_SLOTS: u32 = 256;
/// Most positions in one batch: llama.cpp cannot stop inside one, so this bounds how long a cancellation waits.
pub const BATCH: u32 = 512;

/// A model to run and the shape of its context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineSettings {
    /// A GGUF file with weights.
    pub model: PathBuf,
    pub profile: Profile,
    /// Computing threads. See [`default_threads`].
    pub threads: u32,
    /// Jobs that run at once. 1 to [`MAX_SLOTS`].
    pub slots: u32,
    /// Positions of prompt and output that one job may hold; memory is taken for `slots` times this. 0 means the
    /// model's own context, but no more than [`DEFAULT_CONTEXT`].
    pub context: u32,
    /// The device that it runs on.
    pub offload: Offload,
}

/// A part of a model to run as a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageSettings {
    /// A part that does not end its model (`satgrid models split`).
    pub part: PathBuf,
    pub profile: Profile,
    pub threads: u32,
    /// KV sequences held at once. 1 to [`MAX_SLOTS`].
    pub sequences: u32,
    /// Positions of each; memory is taken for `sequences` times this. 0 means the model's own context, but no more than
    /// [`DEFAULT_CONTEXT`].
    pub context: u32,
    /// The device that the layers run on.
    pub offload: Offload,
    /// The most memory that layers, cache and buffers may take. Unset: what is free.
    pub memory_mib: Option<u32>,
}

/// The two ends of a model whose middle is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeadSettings {
    /// The part with the first layers.
    pub head: PathBuf,
    /// `model` is the part that ends the model; the rest is as for a whole one. The context is cut to the ring's.
    pub tail: EngineSettings,
    /// What the middle is; see `stage::ring`.
    pub ring: RingFacts,
    /// Guess tokens and verify them in one trip; only in the exact profile, where it changes no text.
    pub guess: bool,
    /// A small model of the same vocabulary that guesses where the text does not repeat itself.
    pub draft: Option<PathBuf>,
}

/// Positions for each job where the settings name none.
pub const DEFAULT_CONTEXT: u32 = 4096;

/// Experts to hold and evaluate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackSettings {
    /// A pack made by `satgrid models split --experts`.
    pub pack: PathBuf,
    /// Only these of the pack's experts, if not all.
    pub only: Option<ExpertSet>,
    pub profile: Profile,
    pub threads: u32,
    /// The device that the experts are evaluated on; unset: the card with the most free memory, if there is one.
    pub device: Option<String>,
}

/// What the child process is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerArgs {
    /// Run a model.
    Engine(EngineSettings),
    /// Run some layers.
    Stage(StageSettings),
    /// Run some layers whose experts the node finds.
    StageTrunk(StageSettings),
    /// Run a model whose middle is elsewhere.
    Lead(LeadSettings),
    /// Run a trunk, whose experts the node finds.
    Trunk(EngineSettings),
    /// Hold a pack and evaluate its experts.
    Pack(PackSettings),
    /// Tokenise with the vocabulary of this file; weights, if it has any, are not loaded.
    Tokenizer { artefact: PathBuf },
    /// Print the devices that this build finds, one on a line.
    Devices,
    /// Measure the bare engine, without a socket, and print a line of figures (see [`crate::bare`]).
    Bare(EngineSettings, crate::bare::Load),
}

/// A command line that is not the node's own.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    #[error("no value for {0}")]
    NoValue(String),
    #[error("{value:?} is no value for {name}")]
    BadValue { name: String, value: String },
    #[error("unknown argument {0:?}")]
    Unknown(String),
    #[error("one of --model, --pack, --stage and --tokenizer is needed")]
    NoFile,
}

impl WorkerArgs {
    /// The arguments that [`WorkerArgs::parse`] reads back.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
        let engine = match self {
            Self::Tokenizer { artefact } => {
                add("--tokenizer", artefact.into());
                return args;
            }
            Self::Devices => {
                add("--devices", "list".into());
                return args;
            }
            Self::Stage(stage) | Self::StageTrunk(stage) => {
                add("--stage", stage.part.clone().into());
                if matches!(self, Self::StageTrunk(_)) {
                    add("--trunk", "yes".into());
                }
                add("--profile", stage.profile.name().into());
                add("--threads", stage.threads.to_string().into());
                add("--slots", stage.sequences.to_string().into());
                add("--context", stage.context.to_string().into());
                for (name, value) in offload_args(&stage.offload) {
                    add(name, value);
                }
                if let Some(mib) = stage.memory_mib {
                    add("--memory-mib", mib.to_string().into());
                }
                return args;
            }
            Self::Lead(lead) => {
                add("--head", lead.head.clone().into());
                let ranges: Vec<String> = lead.ring.stages.iter().map(ToString::to_string).collect();
                add("--ring-stages", ranges.join(",").into());
                add("--ring-sequences", lead.ring.sequences.to_string().into());
                add("--ring-context", lead.ring.context.to_string().into());
                add("--ring-batch", lead.ring.batch.to_string().into());
                add("--ring-wire", lead.ring.wire.name().into());
                add("--guess", u32::from(lead.guess).to_string().into());
                if let Some(draft) = &lead.draft {
                    add("--draft", draft.clone().into());
                }
                &lead.tail
            }
            Self::Pack(pack) => {
                add("--pack", pack.pack.clone().into());
                add("--profile", pack.profile.name().into());
                add("--threads", pack.threads.to_string().into());
                if let Some(only) = &pack.only {
                    add("--only", pairs_to_text(only).into());
                }
                if let Some(device) = &pack.device {
                    add("--device", device.into());
                }
                return args;
            }
            Self::Engine(engine) => engine,
            Self::Trunk(engine) => {
                add("--trunk", "yes".into());
                engine
            }
            Self::Bare(engine, load) => {
                add("--bare-streams", load.streams.to_string().into());
                add("--bare-prompt", load.prompt.to_string().into());
                add("--bare-output", load.output.to_string().into());
                add("--bare-rounds", load.rounds.to_string().into());
                engine
            }
        };
        add("--model", engine.model.clone().into());
        add("--profile", engine.profile.name().into());
        add("--threads", engine.threads.to_string().into());
        add("--slots", engine.slots.to_string().into());
        add("--context", engine.context.to_string().into());
        for (name, value) in offload_args(&engine.offload) {
            add(name, value);
        }
        args
    }

    /// Reads what [`WorkerArgs::to_args`] wrote, without the program's and the subcommand's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut engine = EngineSettings {
            model: PathBuf::new(),
            profile: Profile::Exact,
            threads: default_threads(),
            slots: 1,
            context: 0,
            offload: Offload::default(),
        };
        let (mut artefact, mut stage, mut head) = (None, None, None);
        let (mut guess, mut draft, mut memory_mib) = (false, None, None);
        let mut ring = RingFacts { stages: Vec::new(), sequences: 0, context: 0, batch: 0, wire: WireType::F32 };
        let (mut pack, mut only, mut trunk) = (None, None, false);
        let mut load = crate::bare::Load { streams: 0, prompt: 0, output: 0, rounds: 1 };
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            let name = name.to_string_lossy().into_owned();
            let value = args.next().ok_or_else(|| ArgsError::NoValue(name.clone()))?;
            let bad = || ArgsError::BadValue { name: name.clone(), value: value.to_string_lossy().into_owned() };
            let number = || value.to_str().and_then(|text| text.parse::<u32>().ok()).ok_or_else(bad);
            match name.as_str() {
                "--tokenizer" => artefact = Some(PathBuf::from(&value)),
                "--stage" => stage = Some(PathBuf::from(&value)),
                "--head" => head = Some(PathBuf::from(&value)),
                "--ring-stages" => ring.stages = value.to_str().and_then(ranges).ok_or_else(bad)?,
                "--ring-sequences" => ring.sequences = number()?,
                "--ring-context" => ring.context = number()?,
                "--ring-batch" => ring.batch = number()?,
                "--ring-wire" => ring.wire = value.to_str().and_then(WireType::from_name).ok_or_else(bad)?,
                "--guess" => guess = number()? > 0,
                "--draft" => draft = Some(PathBuf::from(&value)),
                "--pack" => pack = Some(PathBuf::from(&value)),
                "--only" => only = Some(value.to_str().and_then(pairs_from_text).ok_or_else(bad)?),
                "--trunk" => trunk = true,
                "--model" => engine.model = PathBuf::from(&value),
                "--profile" => {
                    let named = |profile: &Profile| value.to_str() == Some(profile.name());
                    engine.profile = [Profile::Exact, Profile::Fast].into_iter().find(named).ok_or_else(bad)?;
                }
                "--threads" => engine.threads = number()?,
                "--slots" => engine.slots = number()?,
                "--context" => engine.context = number()?,
                "--device" => engine.offload.device = Some(value.to_string_lossy().into_owned()),
                "--gpu-layers" => engine.offload.layers = Some(number()?),
                "--memory-mib" => memory_mib = Some(number()?),
                "--devices" => return Ok(Self::Devices),
                "--bare-streams" => load.streams = number()?,
                "--bare-prompt" => load.prompt = number()?,
                "--bare-output" => load.output = number()?,
                "--bare-rounds" => load.rounds = number()?,
                _ => return Err(ArgsError::Unknown(name)),
            }
        }
        if let Some(part) = stage {
            let EngineSettings { profile, threads, slots: sequences, context, offload, .. } = engine;
            let stage = StageSettings { part, profile, threads, sequences, context, offload, memory_mib };
            return Ok(if trunk { Self::StageTrunk(stage) } else { Self::Stage(stage) });
        }
        if let Some(pack) = pack {
            let EngineSettings { profile, threads, offload, .. } = engine;
            return Ok(Self::Pack(PackSettings { pack, only, profile, threads, device: offload.device }));
        }
        match artefact {
            Some(artefact) => Ok(Self::Tokenizer { artefact }),
            None if engine.model.as_os_str().is_empty() => Err(ArgsError::NoFile),
            None if head.is_some() => {
                Ok(Self::Lead(LeadSettings { head: head.unwrap_or_default(), tail: engine, ring, guess, draft }))
            }
            None if load.streams > 0 => Ok(Self::Bare(engine, load)),
            None if trunk => Ok(Self::Trunk(engine)),
            None => Ok(Self::Engine(engine)),
        }
    }
}

fn offload_args(offload: &Offload) -> impl Iterator<Item = (&'static str, OsString)> {
    let device = offload.device.as_ref().map(|device| ("--device", device.into()));
    let layers = offload.layers.map(|layers| ("--gpu-layers", layers.to_string().into()));
    device.into_iter().chain(layers)
}

/// `2-5,5-9`; nothing where there are no stages.
fn ranges(text: &str) -> Option<Vec<LayerRange>> {
    let range = |text: &str| {
        let (start, end) = text.split_once('-')?;
        LayerRange::new(start.parse().ok()?, end.parse().ok()?)
    };
    if text.is_empty() { Some(Vec::new()) } else { text.split(',').map(range).collect() }
}

/// `layer.expert` pairs with commas between them.
fn pairs_to_text(set: &ExpertSet) -> String {
    let pairs: Vec<String> = set.pairs().iter().map(|(layer, expert)| format!("{layer}.{expert}")).collect();
    pairs.join(",")
}

fn pairs_from_text(text: &str) -> Option<ExpertSet> {
    let pair = |text: &str| {
        let (layer, expert) = text.split_once('.')?;
        Some((layer.parse().ok()?, expert.parse().ok()?))
    };
    Some(ExpertSet::new(text.split(',').map(pair).collect::<Option<Vec<_>>>()?))
}

/// Environment that ggml and the C library read once, early, and so only from the process's start.
pub(crate) fn environment(args: &WorkerArgs) -> Vec<(&'static str, &'static str)> {
    let profile = match args {
        WorkerArgs::Engine(engine) | WorkerArgs::Trunk(engine) | WorkerArgs::Bare(engine, _) => engine.profile,
        WorkerArgs::Pack(pack) => pack.profile,
        WorkerArgs::Stage(stage) | WorkerArgs::StageTrunk(stage) => stage.profile,
        WorkerArgs::Lead(lead) => lead.tail.profile,
        WorkerArgs::Tokenizer { .. } | WorkerArgs::Devices => return Vec::new(),
    };
    match profile {
        // The tiled product rounds differently from the row by row one, and is chosen by the number of rows.
        Profile::Exact => vec![LARGE_PAGES, (TILED_PRODUCT, "0")],
        Profile::Fast => vec![LARGE_PAGES],
    }
}

/// The C library asks for large pages under large buffers: weights that are no file's pages are read from end to end for every
/// token, a third to a half more slowly where a page is 4 KB. Other C libraries ignore it.
const LARGE_PAGES: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");

/// ggml's switch for its tiled matrix product.
pub(crate) const TILED_PRODUCT: &str = "GGML_CPU_TILED_MM";

/// Threads where the settings name none: one for each physical core that this process may use. More only contend, since
/// llama.cpp's threads wait for each other at every matrix product.
pub fn default_threads() -> u32 {
    let available = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    physical_cores().map_or(available, |cores| cores.min(available)).max(1)
}

/// Physical cores of this machine, where the system tells.
fn physical_cores() -> Option<u32> {
    let mut cores = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()?.flatten() {
        let siblings = entry.path().join("topology/thread_siblings_list");
        cores.extend(std::fs::read_to_string(siblings).ok());
    }
    u32::try_from(cores.len()).ok().filter(|&cores| cores > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_reads_back() {
        let engine = EngineSettings {
            model: "/models/a b.gguf".into(),
            profile: Profile::Fast,
            threads: 3,
            slots: 16,
            context: 2048,
            offload: Offload { device: Some("CUDA0".into()), layers: Some(20) },
        };
        let load = crate::bare::Load { streams: 16, prompt: 64, output: 128, rounds: 2 };
        let range = |start, end| LayerRange::new(start, end).unwrap();
        let stages = vec![range(2, 5), range(5, 9)];
        let ring = RingFacts { stages, sequences: 8, context: 1024, batch: 512, wire: WireType::Bf16 };
        let stage = StageSettings {
            part: "part.gguf".into(),
            profile: Profile::Exact,
            threads: 2,
            sequences: 8,
            context: 1024,
            offload: Offload { device: Some("CUDA1".into()), layers: None },
            memory_mib: Some(512),
        };
        let alone = RingFacts { stages: Vec::new(), ..ring.clone() };
        let only = Some(ExpertSet::new([(0, 3), (1, 0)]));
        let pack = PackSettings { pack: "p.gguf".into(), only, profile: Profile::Exact, threads: 2, device: None };
        for args in [
            WorkerArgs::Stage(StageSettings { memory_mib: None, ..stage.clone() }),
            WorkerArgs::StageTrunk(stage.clone()),
            WorkerArgs::Stage(stage),
            WorkerArgs::Lead(LeadSettings {
                head: "head.gguf".into(),
                tail: engine.clone(),
                ring,
                guess: true,
                draft: Some("small.gguf".into()),
            }),
            WorkerArgs::Lead(LeadSettings {
                head: "head.gguf".into(),
                tail: engine.clone(),
                ring: alone,
                guess: false,
                draft: None,
            }),
            WorkerArgs::Engine(engine.clone()),
            WorkerArgs::Trunk(engine.clone()),
            WorkerArgs::Pack(pack.clone()),
            WorkerArgs::Pack(PackSettings { only: None, device: Some("CUDA0".into()), ..pack }),
            WorkerArgs::Tokenizer { artefact: "t.gguf".into() },
            WorkerArgs::Bare(engine, load),
            WorkerArgs::Devices,
        ] {
            assert_eq!(WorkerArgs::parse(args.to_args()), Ok(args));
        }
    }

    #[test]
    fn bad_command_lines_name_the_fault() {
        let rows = [
            ("", "needed"),
            ("--model", "no value"),
            ("--model x --slots many", "many"),
            ("--model x --profile quick", "quick"),
            ("--pack x --only 1", "--only"),
            ("--socket x", "--socket"),
        ];
        for (line, expect) in rows {
            let error = WorkerArgs::parse(line.split_whitespace().map(OsString::from)).unwrap_err().to_string();
            assert!(error.contains(expect), "{line}: {error}");
        }
    }
}
