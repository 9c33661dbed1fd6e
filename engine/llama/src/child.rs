//! Starting, hearing and ending one child process.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use satgrid_engine::experts::{ExpertRows, ExpertStep, Experts};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child as Process, Command};
use tokio::time::timeout;

use crate::settings::{WorkerArgs, environment};
use crate::wire::{self, FromWorker, ToWorker};

/// The wait before the first restart; each further one doubles it up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A child that served this long was well: the next wait is the first again.
const WELL_AFTER: Duration = Duration::from_secs(60);
/// Longest silence of a process that loads.
const LOAD_SILENCE: Duration = Duration::from_secs(300);
/// How long a process that closed its socket, or whose socket we closed, may take to end.
const EXIT_WITHIN: Duration = Duration::from_secs(5);
/// What a child may see of our environment. Secrets of the configuration live in variables too, so nothing else passes.
const ENVIRONMENT: [&str; 12] = [
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
];

/// The program that a child process runs: the node's own, with the arguments that lead to `worker_main`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerProgram {
    pub exe: PathBuf,
    /// For example `["engine-worker"]`.
    pub leading_args: Vec<OsString>,
}

/// Why there is no process that serves.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Ours: the program cannot be started.
    #[error("starting {exe}: {source}", exe = exe.display())]
    Start { exe: PathBuf, source: std::io::Error },
    /// The user's: the file or the settings do not serve.
    #[error("{reason}")]
    LoadFailed { reason: String },
    /// The process died: llama.cpp aborted, or the system took its memory.
    #[error("the engine process {how} while it loaded")]
    Died { how: String },
    #[error("the engine process said nothing for {} s while it loaded", LOAD_SILENCE.as_secs())]
    Silent,
    #[error("the engine process does not speak our protocol: {0}")]
    Protocol(String),
}

/// A process that runs, and both halves of its socket. Dropping it kills the process.
pub(crate) struct Child {
    process: Process,
    pub(crate) reader: OwnedReadHalf,
    pub(crate) writer: OwnedWriteHalf,
}

/// The waits before restarts of one child.
pub(crate) struct Waits(Duration);

impl Waits {
    pub(crate) const fn new() -> Self {
        Self(FIRST_WAIT)
    }

    /// A child served for so long.
    pub(crate) fn served(&mut self, time: Duration) {
        if time >= WELL_AFTER {
            self.0 = FIRST_WAIT;
        }
    }

    /// How long to wait now.
    pub(crate) fn take(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(LONGEST_WAIT);
        wait
    }

    /// How long the next wait would be.
    pub(crate) const fn next(&self) -> Duration {
        self.0
    }
}

impl Child {
    /// Starts a process and waits until it is ready; gives its first word after the load. `progress` hears thousandths.
    /// A trunk that measures itself asks for its experts already then.
    pub(crate) async fn start(
        program: &WorkerProgram,
        args: &WorkerArgs,
        experts: Option<&Arc<dyn Experts>>,
        mut progress: impl FnMut(u32),
    ) -> Result<(Self, FromWorker), SpawnError> {
        let mut child =
            Self::launch(program, args).map_err(|source| SpawnError::Start { exe: program.exe.clone(), source })?;
        loop {
            let message = match timeout(LOAD_SILENCE, wire::read_async::<FromWorker>(&mut child.reader)).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Err(SpawnError::Died { how: child.end().await }),
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(SpawnError::Protocol(error.to_string()));
                }
                Ok(Err(_)) => return Err(SpawnError::Died { how: child.end().await }),
                Err(_) => return Err(SpawnError::Silent),
            };
            match message {
                FromWorker::Loading { permille } => progress(permille.min(1000)),
                FromWorker::LoadFailed { reason } => {
                    child.end().await;
                    return Err(SpawnError::LoadFailed { reason });
                }
                FromWorker::ExpertStep(step) => {
                    let outputs = find_outputs(experts, step).await;
                    let frame = wire::encode(&ToWorker::ExpertOutputs(outputs));
                    let frame = frame.map_err(|error| SpawnError::Protocol(error.to_string()))?;
                    // A process that died meanwhile shows as the end of its stream.
                    let _ = child.writer.write_all(&frame).await;
                }
                ready @ (FromWorker::EngineReady(_)
                | FromWorker::TokenizerReady(_)
                | FromWorker::StageReady(_)
                | FromWorker::PackReady(_)) => {
                    return Ok((child, ready));
                }
                FromWorker::Events(_)
                | FromWorker::Tokenized(_)
                | FromWorker::Named(_)
                | FromWorker::Rendered(_)
                | FromWorker::StageEvents(_)
                | FromWorker::Ring(_)
                | FromWorker::ExpertAnswer { .. } => {
                    return Err(SpawnError::Protocol("an answer before it was ready".into()));
                }
            }
        }
    }

    fn launch(program: &WorkerProgram, args: &WorkerArgs) -> std::io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(&program.exe);
        command.args(&program.leading_args).args(args.to_args()).env_clear();
        command.envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(environment(args));
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::inherit());
        // A group of its own: a terminal's interrupt is the node's to handle, which then ends its children in order.
        command.process_group(0).kill_on_drop(true);
        let process = command.spawn()?;
        // The command still holds the child's end; while it is open here, the child's death would not close the socket.
        drop(command);
        let (reader, writer) = UnixStream::from_std(ours)?.into_split();
        Ok(Self { process, reader, writer })
    }

    pub(crate) fn id(&self) -> Option<u32> {
        self.process.id()
    }

    /// False once the process has ended, as far as the system tells.
    pub(crate) fn lives(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(Some(_)))
    }

    /// Closes the socket, which ends the process; kills it if that takes too long. Says how it ended.
    pub(crate) async fn end(self) -> String {
        let Self { process, reader, writer } = self;
        drop((reader, writer));
        end_process(process).await
    }

    /// Parts the process from its socket's halves, which are then dropped elsewhere.
    pub(crate) fn split(self) -> (Process, OwnedReadHalf, OwnedWriteHalf) {
        (self.process, self.reader, self.writer)
    }
}

/// The rows for a trunk's step, or why there are none.
pub(crate) async fn find_outputs(experts: Option<&Arc<dyn Experts>>, step: ExpertStep) -> Result<ExpertRows, String> {
    let (number, layer) = (step.step, step.layer);
    let experts = experts.ok_or("this engine has no experts elsewhere")?;
    let rows = experts.evaluate(step).await.map_err(|error| error.to_string())?;
    Ok(ExpertRows { step: number, layer, rows })
}

/// Waits for a process whose socket is closed; kills it if that takes too long. Says how it ended.
pub(crate) async fn end_process(mut process: Process) -> String {
    match timeout(EXIT_WITHIN, process.wait()).await {
        Ok(Ok(status)) => how_it_ended(status),
        Ok(Err(error)) => format!("cannot be waited for ({error})"),
        Err(_) => match process.kill().await {
            Ok(()) => "hung and was killed".into(),
            Err(error) => format!("cannot be killed ({error})"),
        },
    }
}

fn how_it_ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(6)) => "aborted (signal 6)".into(),
        (None, Some(9)) => "was killed (signal 9)".into(),
        (None, Some(signal)) => format!("died of signal {signal}"),
        (None, None) => "ended".into(),
    }
}
