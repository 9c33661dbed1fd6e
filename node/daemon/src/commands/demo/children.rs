//! Processes of this same binary that end when this one does: asked by SIGTERM, then made to.
//!
//! Three things see to it: [`Child::stop`] on the ordinary ways out, `kill_on_drop` on a panic, and the kernel
//! (`--with-parent`) where this process is killed outright.

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// How long a child may take to end before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// How long a child may take to say where it listens.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// Of a log that is shown.
const TAIL_BYTES: u64 = 4_096;
const TAIL_LINES: usize = 12;

#[derive(Debug)]
pub(super) struct Child {
    name: String,
    process: tokio::process::Child,
    log: PathBuf,
    /// Ended by us: its end is no surprise.
    expected: bool,
}

/// This program with these arguments, to end when this process does.
#[cfg(not(test))]
fn command(args: &[&str]) -> std::io::Result<std::process::Command> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(args).args(["--with-parent", &std::process::id().to_string()]);
    Ok(command)
}
#[cfg(test)]
use super::on_toy::command;

impl Child {
    /// Starts `satgrid ARGS...`; what it says goes into `log`.
    pub(super) fn start(name: &str, args: &[&str], log: &Path) -> anyhow::Result<Child> {
        Ok(Child::spawn(name, args, log, Stdio::null())?.0)
    }

    /// As `start`; waits for the first line that it prints, which says where it listens.
    pub(super) async fn start_and_hear(name: &str, args: &[&str], log: &Path) -> anyhow::Result<(Child, String)> {
        let (mut child, stdout) = Child::spawn(name, args, log, Stdio::piped())?;
        let stdout = stdout.context("its output is not read")?;
        let mut lines = BufReader::new(stdout).lines();
        match tokio::time::timeout(READY_WITHIN, lines.next_line()).await {
            Ok(Ok(Some(line))) => Ok((child, line.trim().to_owned())),
            Ok(_) => {
                child.expected = true;
                bail!("{name} ended before it was ready:\n{}", child.tail())
            }
            Err(_) => bail!("{name} was not ready within {} s:\n{}", READY_WITHIN.as_secs(), child.tail()),
        }
    }

    fn spawn(
        name: &str,
        args: &[&str],
        log: &Path,
        stdout: Stdio,
    ) -> anyhow::Result<(Child, Option<tokio::process::ChildStdout>)> {
        let command = command(args).context("this program does not find itself")?;
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let mut process = Command::from(command)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(file)
            // Ctrl-C is for the demo, which then stops its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let stdout = process.stdout.take();
        Ok((Child { name: name.to_owned(), process, log: log.to_owned(), expected: false }, stdout))
    }

    pub(super) fn id(&self) -> Option<u32> {
        self.process.id()
    }

    /// An error where it ended although nobody told it to.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        match self.process.try_wait()? {
            Some(status) if !self.expected => {
                self.expected = true;
                bail!("{} ended by itself ({status}):\n{}", self.name, self.tail())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// SIGKILL: no clean-up of any kind.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        self.expected = true;
        Ok(self.process.kill().await?)
    }

    /// SIGTERM, and SIGKILL where that does not help in time.
    pub(super) async fn stop(&mut self) -> Option<ExitStatus> {
        self.expected = true;
        if let Some(pid) = self.process.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
        match tokio::time::timeout(STOP_WITHIN, self.process.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                eprintln!("warning: {} did not stop within {} s and is killed", self.name, STOP_WITHIN.as_secs());
                let _ = self.process.kill().await;
                None
            }
        }
    }

    /// The end of its log.
    pub(super) fn tail(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.log)?;
            let from = file.metadata()?.len().saturating_sub(TAIL_BYTES);
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        format!("  {} (the end of {})", last.join("\n  "), self.log.display())
    }
}
