//! The node's own log file. ldk-node talks a lot, and its file logger panics when the disk is full: this one drops the
//! line instead, and starts over when the file is long.

use crate::{config::LogLevel, store::private_file};
use ldk_node::logger::{LogLevel as LdkLevel, LogRecord, LogWriter};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

/// At this length the log moves to `<name>.old`, over the one before it.
const MAX_LOG_BYTES: u64 = 16 * 1024 * 1024;

pub(crate) struct Log {
    path: PathBuf,
    level: LdkLevel,
    open: Mutex<Open>,
}

struct Open {
    file: File,
    len: u64,
}

impl Log {
    pub(crate) fn open(path: PathBuf, level: LogLevel) -> io::Result<Log> {
        let file = private_file(&path)?;
        let len = file.metadata()?.len();
        let level = match level {
            LogLevel::Trace => LdkLevel::Trace,
            LogLevel::Debug => LdkLevel::Debug,
            LogLevel::Info => LdkLevel::Info,
            LogLevel::Warn => LdkLevel::Warn,
            LogLevel::Error => LdkLevel::Error,
        };
        Ok(Log { path, level, open: Mutex::new(Open { file, len }) })
    }

    fn write(&self, line: &str) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len > MAX_LOG_BYTES {
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            fs::rename(&self.path, old)?;
            *open = Open { file: private_file(&self.path)?, len: 0 };
        }
        open.file.write_all(line.as_bytes())?;
        open.len += line.len() as u64;
        Ok(())
    }
}

impl LogWriter for Log {
    fn log(&self, record: LogRecord<'_>) {
        if record.level < self.level {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (level, module, line) = (record.level, record.module_path, record.line);
        let text = format!("{}.{:03} {level:<5} {module}:{line} {}\n", now.as_secs(), now.subsec_millis(), record.args);
        // A log that cannot be written must not stop a payment; the daemon watches the disk.
        let _ = self.write(&text);
    }
}
