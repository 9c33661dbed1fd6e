//! A PostgreSQL server for tests, started as a plain process in a folder of its own. Where no server binary can be found it says
//! so, loudly; `SATGRID_REQUIRE_POSTGRES=1` makes that a failure.

use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// PostgreSQL refuses to run as root; then it runs as nobody.
const NOBODY: u32 = 65_534;
/// How long it may take to come up.
pub(crate) const START: Duration = Duration::from_secs(60);

/// A server of its own folder and socket, gone with this value.
pub(crate) struct Server {
    folder: tempfile::TempDir,
    process: Child,
}

/// The folder with `initdb` and `postgres`.
fn binaries() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.filter_map(|version| Some(version.ok()?.path().join("bin"))));
    }
    folders.into_iter().find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

impl Server {
    /// Starts one; `None`, with a loud line, where this machine has none.
    pub(crate) fn start() -> Option<Server> {
        let Some(bin) = binaries() else {
            let line = "SKIPPED: no PostgreSQL server on this machine (apt-get install postgresql): nothing was tested";
            assert!(std::env::var_os("SATGRID_REQUIRE_POSTGRES").is_none(), "{line}");
            eprintln!("{line}");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let data = folder.path().join("data");
        let made = command(&bin.join("initdb"))
            .args(["-U", "satgrid", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(&data)
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(made.success(), "initdb: {made}");
        // Durability is the server's business and not under test: without fsync the suite is quick.
        let process = command(&bin.join("postgres"))
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(folder.path())
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"])
            .current_dir(folder.path())
            .spawn()
            .unwrap();
        Some(Server { folder, process })
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://satgrid@localhost/{database}?host={}", self.folder.path().display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is a fast, clean stop; killing it would leave its children to find out.
        if let Some(pid) = Pid::from_raw(i32::try_from(self.process.id()).unwrap_or(0)) {
            let _ = kill_process(pid, Signal::INT);
        }
        for _ in 0..200 {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(25));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
