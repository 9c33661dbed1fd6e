//! Continues a text with a model, through the engine's and the tokenizer's child processes.
//!
//! `cargo run -p satgrid-engine-llama --example generate -- MODEL TEXT`, after building the package's binaries.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use satgrid_engine::port::{Command, Engine, EngineEvent, Job, JobId, Profile, Tokenizer};
use satgrid_engine::sampling::Sampling;
use satgrid_engine::stop::TextStream;
use satgrid_engine_llama::{
    EngineConfig, EngineSettings, LlamaEngine, LlamaTokenizer, Offload, TokenizerConfig, WorkerProgram, default_threads,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = PathBuf::from(args.next().ok_or("which model?")?);
    let text = args.next().ok_or("which text?")?;
    let exe = std::env::current_exe()?;
    let folder = exe.parent().and_then(Path::parent).ok_or("no build folder")?;
    let program = WorkerProgram { exe: folder.join("satgrid-engine-worker"), leading_args: Vec::new() };

    let begin = Instant::now();
    let config = TokenizerConfig { program: program.clone(), artefact: model.clone(), idle: Duration::from_secs(600) };
    let tokenizer = LlamaTokenizer::spawn(config).await?;
    eprintln!("tokenizer of {} tokens after {:?}", tokenizer.vocab_size(), begin.elapsed());
    let begin = Instant::now();
    let settings = EngineSettings {
        model,
        profile: Profile::Exact,
        threads: default_threads(),
        slots: 1,
        context: 1024,
        offload: Offload::default(),
    };
    let engine = LlamaEngine::spawn(EngineConfig { program, settings }, |permille| {
        eprint!("\rloading {}.{} %", permille / 10, permille % 10);
    });
    let engine = engine.await?;
    eprintln!("\rengine after {:?}: {:?}", begin.elapsed(), engine.facts());

    let begin = Instant::now();
    let prompt = tokenizer.tokenize(&text, true, false).await?;
    eprintln!("{} tokens after {:?}", prompt.len(), begin.elapsed());
    let job = Job {
        id: JobId(1),
        session: [1; 32],
        prompt,
        sampling: Sampling { top_k: 40, ..Sampling::seeded(0.7, 1) },
        max_output: 60,
        stop: Vec::new(),
        ignore_eos: false,
        resumed: 0,
        extras: Default::default(),
    };
    engine.send(Command::Start(job))?;
    engine.send(Command::Grant { job: JobId(1), prompt_upto: u32::MAX, output_upto: u32::MAX })?;
    let mut stream = TextStream::new::<String>(&[]);
    print!("{text}");
    loop {
        match engine.next_event().await.ok_or("the engine is gone")? {
            EngineEvent::Tokens { ids, .. } => {
                for piece in tokenizer.pieces(&ids, false).await? {
                    print!("{}", stream.push(&piece));
                }
                std::io::stdout().flush()?;
            }
            EngineEvent::Finished { reason, evaluated, .. } => {
                println!("{}", stream.finish());
                eprintln!("{reason:?}, {evaluated} positions computed in {:?}", begin.elapsed());
                return Ok(());
            }
            EngineEvent::Failed { error, .. } => return Err(error.into()),
            EngineEvent::Down { reason } => return Err(reason.into()),
            EngineEvent::Prefilled { .. }
            | EngineEvent::Logprobs { .. }
            | EngineEvent::Embedded { .. }
            | EngineEvent::Up => {}
        }
    }
}
