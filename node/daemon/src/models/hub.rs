//! A model from a Hugging Face style hub, resumed where it stopped, checked against the hub's own hash or the user's.

use hf_hub::api::tokio::{Api, ApiBuilder, ApiError, Progress};
use hf_hub::{Repo, RepoType};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;

use super::error::PullError;
use super::file::{check_space, sha256_of, size_of};
use super::inspect::inspect;
use super::reference::HubFile;
use super::store::{Record, Store};
use super::{Pulled, ShowProgress};
use crate::progress::Bytes;

/// A broken download loses at most this much by default.
pub(crate) const CHUNK_BYTES: usize = 8 << 20;

#[derive(Clone, Debug)]
pub(crate) struct HubOptions {
    pub chunk_bytes: usize,
    pub endpoint: Option<String>,
    pub token: Option<String>,
}

pub(super) fn pull(
    store: &Store,
    file: &HubFile,
    name: Option<&str>,
    options: &HubOptions,
    show: ShowProgress,
) -> Result<Pulled, PullError> {
    let stem = Path::new(&file.file).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = name.map(str::to_owned).or(stem).unwrap_or_else(|| "model".to_owned());
    // A file that is kept under a hash that the user gave needs no network.
    if let (Some(record), Some(sha256)) = (store.find(&name), &file.sha256)
        && record.sha256 == *sha256
        && sha256_of(&store.path(&record), &Bytes::silent())? == *sha256
    {
        let path = store.path(&record);
        return Ok(Pulled { record, path, cached: true });
    }
    let scratch = store.scratch("hub")?;
    let blob = download(file, options, &scratch, &show(&format!("fetching {name}"), 0))?;
    finish(store, file, &name, &blob, show)
}

fn download(file: &HubFile, options: &HubOptions, cache: &Path, progress: &Bytes) -> Result<PathBuf, PullError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| PullError::io("start a runtime for", cache, e))?;
    let (no_room, mut refused) = mpsc::unbounded_channel();
    let fetched = runtime.block_on(async {
        let repo = Repo::with_revision(file.repo.clone(), RepoType::Model, file.revision.clone());
        let repo = api(options, cache).map_err(|error| explain(file, error))?.repo(repo);
        let watch = Watch { bytes: progress.clone(), cache: cache.to_owned(), no_room };
        tokio::select! {
            fetched = repo.download_with_progress(&file.file, watch) => fetched.map_err(|error| explain(file, error)),
            Some(error) = refused.recv() => Err(error),
        }
    });
    progress.finish();
    let pointer = fetched?;
    pointer.canonicalize().map_err(|e| PullError::io("read", &pointer, e))
}

fn api(options: &HubOptions, cache: &Path) -> Result<Api, ApiError> {
    let builder = ApiBuilder::from_cache(hf_hub::Cache::new(cache.to_owned()))
        .with_progress(false)
        .with_chunk_size(Some(options.chunk_bytes))
        .with_token(options.token.clone());
    match &options.endpoint {
        Some(endpoint) => builder.with_endpoint(endpoint.trim_end_matches('/').to_owned()),
        None => builder,
    }
    .build()
}

/// Checks what arrived and moves it into the store.
fn finish(store: &Store, file: &HubFile, name: &str, blob: &Path, show: ShowProgress) -> Result<Pulled, PullError> {
    let bytes = size_of(blob)?;
    let progress = show(&format!("checking {name}"), bytes);
    let found = sha256_of(blob, &progress)?;
    progress.finish();
    // Hubs name the blob of a large file by its SHA-256.
    let hub_says = blob.file_name().map(|name| name.to_string_lossy().into_owned()).filter(|name| is_sha256(name));
    for expected in [file.sha256.clone(), hub_says].into_iter().flatten() {
        if expected != found {
            let _ = std::fs::remove_file(blob);
            return Err(PullError::WrongHash { what: file.text(), expected, found });
        }
    }
    inspect(blob).map_err(|source| PullError::BadFile { path: blob.to_owned(), source })?;
    store.check_name(name, &found)?;
    let record =
        Record { name: name.to_owned(), file: format!("{name}.gguf"), bytes, sha256: found, source: file.text() };
    let path = store.admit(blob, &record)?;
    let _ = std::fs::remove_dir_all(store.scratch("hub")?);
    Ok(Pulled { record, path, cached: false })
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && hex::decode(text).is_ok()
}

fn explain(file: &HubFile, error: ApiError) -> PullError {
    let what = "the hub".to_owned();
    match error {
        ApiError::IoError(source) => PullError::io("write", Path::new(&file.file), source),
        ApiError::TooManyRetries(inner) => explain(file, *inner),
        ApiError::RequestError(error) if error.status().is_some() => {
            let detail = error.status().map(|status| status.to_string()).unwrap_or_default();
            PullError::Refused { what, file: file.text(), detail }
        }
        ApiError::RequestError(error) => PullError::Offline { what, detail: root_cause(&error) },
        other @ (ApiError::MissingHeader(_)
        | ApiError::InvalidHeader(_)
        | ApiError::InvalidHeaderValue(_)
        | ApiError::ToStr(_)
        | ApiError::ParseIntError(_)
        | ApiError::TryAcquireError(_)
        | ApiError::AcquireError(_)
        | ApiError::Join(_)
        | ApiError::LockAcquisition(_)) => PullError::Refused { what, file: file.text(), detail: other.to_string() },
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

/// Bytes that a folder takes on the disk: a file that is not whole is as long as it will be, and takes what came of it.
fn on_disk(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let taken = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => on_disk(&entry.path()),
        Ok(metadata) => metadata.blocks().saturating_mul(512),
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(taken).sum()
}

#[derive(Clone)]
struct Watch {
    bytes: Bytes,
    cache: PathBuf,
    /// Hears of a file for which there is no room.
    no_room: mpsc::UnboundedSender<PullError>,
}

impl Progress for Watch {
    async fn init(&mut self, size: usize, _filename: &str) {
        self.bytes.set_total(size as u64);
        let left = (size as u64).saturating_sub(on_disk(&self.cache));
        if let Err(error) = check_space(&self.cache, left) {
            let _ = self.no_room.send(error);
            // Nothing is written before this returns; who hears of it ends the download.
            std::future::pending::<()>().await;
        }
    }

    async fn update(&mut self, size: usize) {
        self.bytes.add(size as u64);
    }

    async fn finish(&mut self) {}
}

#[cfg(test)]
mod tests;
