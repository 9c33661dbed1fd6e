//! Writing a part of a model file as a file of its own.
//!
//! The whole file is read once for its hashes, and the part's tensors once more; neither is held in memory. The part is written
//! beside its final name and renamed when it is whole.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use satgrid_engine::gguf::{Gguf, GgufError};
use satgrid_engine::part::{Cut, CutError};
use satgrid_engine::root::ModelRoot;
use satgrid_types::LayerRange;

/// Why there is no part.
#[derive(Debug, thiserror::Error)]
pub enum SplitError {
    #[error("{path}: {source}", path = path.display())]
    Gguf { path: PathBuf, source: GgufError },
    #[error("{path}: {source}", path = path.display())]
    Cut { path: PathBuf, source: CutError },
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitReport {
    /// The whole model's root, which the part proves.
    pub model_root: [u8; 32],
    pub range: LayerRange,
    /// Layers of the whole model.
    pub layers: u32,
    pub file_bytes: u64,
}

/// Writes layers `range` of `model` to `out`. `progress` hears thousandths.
pub fn split_model(
    model: &Path,
    range: LayerRange,
    out: &Path,
    progress: &mut dyn FnMut(u32),
) -> Result<SplitReport, SplitError> {
    cut(|gguf, root, range| Cut::new(gguf, root, range), model, range, out, progress)
}

/// As [`split_model`], of a mixture of experts, without these: whoever runs the layers finds the experts elsewhere.
pub fn split_stage_trunk(
    model: &Path,
    range: LayerRange,
    out: &Path,
    progress: &mut dyn FnMut(u32),
) -> Result<SplitReport, SplitError> {
    cut(|gguf, root, range| Cut::trunk(gguf, root, range), model, range, out, progress)
}

fn cut(
    plan: for<'a> fn(&'a Gguf, &ModelRoot, LayerRange) -> Result<Cut<'a>, CutError>,
    model: &Path,
    range: LayerRange,
    out: &Path,
    progress: &mut dyn FnMut(u32),
) -> Result<SplitReport, SplitError> {
    let of = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SplitError::Io { path, source }
    };
    let gguf_error = |source| SplitError::Gguf { path: model.to_path_buf(), source };
    let cut_error = |source| SplitError::Cut { path: model.to_path_buf(), source };
    let mut reader = BufReader::with_capacity(1 << 20, File::open(model).map_err(of(model))?);
    let gguf = Gguf::read(&mut reader).map_err(gguf_error)?;
    // Before a long read: is it worth while?
    let layers = satgrid_engine::part::admit(&gguf).map_err(|refused| cut_error(refused.into()))?;
    if range.end() > layers {
        return Err(cut_error(CutError::OutOfRange { range, layers }));
    }
    let all = gguf.tensors.iter().fold(0_u64, |sum, tensor| sum.saturating_add(tensor.bytes)).max(1);
    let (mut done, mut total, mut told) = (0_u64, all, 0);
    let mut step = |bytes: u64, total: u64| {
        done += bytes;
        let permille = u32::try_from(done.saturating_mul(1000) / total.max(1)).unwrap_or(1000);
        if permille >= told + 10 {
            told = permille;
            progress(permille.min(1000));
        }
    };
    let root = ModelRoot::compute(&gguf, &mut reader, &mut |bytes| step(bytes, all * 2)).map_err(gguf_error)?;
    let cut = plan(&gguf, &root, range).map_err(cut_error)?;
    total = total.saturating_add(cut.tensor_bytes());

    let mut unfinished = out.as_os_str().to_owned();
    unfinished.push(".part");
    let unfinished = PathBuf::from(unfinished);
    let written = write(&cut, &mut reader, &unfinished, &mut |bytes| step(bytes, total));
    let renamed = written.map_err(cut_error).and_then(|()| std::fs::rename(&unfinished, out).map_err(of(out)));
    if renamed.is_err() {
        // A half-written file is of no use; that it cannot be removed is the lesser news.
        let _ = std::fs::remove_file(&unfinished);
    }
    renamed?;
    let file_bytes = std::fs::metadata(out).map_err(of(out))?.len();
    Ok(SplitReport { model_root: root.root, range, layers, file_bytes })
}

fn write(
    cut: &Cut<'_>,
    reader: &mut BufReader<File>,
    path: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), CutError> {
    let io = |error: io::Error| CutError::Write(error.into());
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    cut.write(reader, &mut out, progress)?;
    out.flush().map_err(io)?;
    out.get_ref().sync_all().map_err(io)
}
