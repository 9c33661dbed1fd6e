//! Cutting a mixture-of-experts model into the files of a lead and of those who hold experts.
//!
//! The model is read as a stream, once for its hashes and once for each file; no tensor is ever whole in memory. A file
//! appears under its name only when it is complete.

use satgrid_engine::experts::heat::{self, Heat};
use satgrid_engine::experts::{Manifest, MoeShape, map, pack, trunk};
use satgrid_engine::gguf::Gguf;
use satgrid_engine::root::ModelRoot;
use satgrid_types::ExpertSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::ShowProgress;
use crate::failure::HintExt;

/// Bytes read and written at once.
const BUFFER: usize = 1 << 20;
/// Most packs of one split.
const MAX_PACKS: u32 = 512;

/// Which packs to make.
pub(crate) enum Sets<'a> {
    /// All experts, evenly over so many.
    Dealt(u32),
    /// All experts over so many, equally busy by what was counted; the hottest of each layer in two.
    ByHeat { packs: u32, copies: u32 },
    /// Each as the user wrote it.
    Named(&'a [String]),
}

/// What a split wrote.
pub(crate) struct SplitFiles {
    pub(crate) root: [u8; 32],
    pub(crate) files: Vec<SplitFile>,
    /// Expert rows by which their load is reckoned; 0 where all experts count alike.
    pub(crate) counted: u64,
    /// Of the busiest layer's rows, the thousandths that fall on its busiest pack.
    pub(crate) worst_permille: u64,
}

pub(crate) struct SplitFile {
    pub(crate) path: PathBuf,
    pub(crate) holds: String,
    pub(crate) bytes: u64,
    /// Of all expert rows, the thousandths that fall on it.
    pub(crate) permille: Option<u64>,
}

/// Writes `NAME.trunk.gguf` and `NAME.experts-K.gguf` into a folder. `counted` says how often the router chose each expert of a
/// model: packs are dealt by it where that is asked, and their load is reckoned by it.
pub(crate) fn split_experts(
    model: &Path,
    sets: &Sets<'_>,
    counted: &dyn Fn([u8; 32]) -> Heat,
    out: &Path,
    show: ShowProgress,
) -> anyhow::Result<SplitFiles> {
    let mut reader = BufReader::with_capacity(BUFFER, File::open(model)?);
    let gguf = Gguf::read(&mut reader)?;
    let shape =
        MoeShape::admit(&gguf).hint("sell it whole, or by layers where its architecture is admitted for that")?;
    if let Sets::Dealt(packs) | Sets::ByHeat { packs, .. } = sets
        && (*packs == 0 || *packs > MAX_PACKS.min(shape.experts))
    {
        anyhow::bail!("{packs} packs: 1 to {} are possible", MAX_PACKS.min(shape.experts))
    }
    let bytes = gguf.tensors.iter().map(|tensor| tensor.bytes).sum();
    let progress = show("hashing the model", bytes);
    let root = ModelRoot::compute(&gguf, &mut reader, &mut |bytes| progress.add(bytes))?;
    progress.finish();
    let manifest = Manifest::of_model(&gguf, &root)?;
    let heat = counted(root.root);
    let sets = wanted(&shape, sets, &heat)?;
    let (load, worst_permille) = heat::load(&sets, &heat);
    std::fs::create_dir_all(out)?;
    let stem = model.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = |part: &str| out.join(format!("{stem}.{part}.gguf"));

    let mut files = Vec::new();
    let progress = show("writing the trunk", bytes);
    let path = name("trunk");
    let bytes = write(&path, |file| trunk::write(&gguf, &mut reader, &manifest, file, &mut |n| progress.add(n)))?;
    progress.finish();
    files.push(SplitFile { path, holds: "everything but the experts".to_owned(), bytes, permille: None });
    for (number, (set, permille)) in sets.iter().zip(load).enumerate() {
        let path = name(&format!("experts-{}", number + 1));
        let expected = set.pairs().iter().filter_map(|(layer, _)| manifest.expert_bytes(*layer)).sum();
        let progress = show(&format!("writing pack {}", number + 1), expected);
        let bytes =
            write(&path, |file| pack::write(&gguf, &mut reader, &manifest, set, file, &mut |n| progress.add(n)))?;
        progress.finish();
        files.push(SplitFile { path, holds: format!("experts {}", map::list(set)), bytes, permille: Some(permille) });
    }
    Ok(SplitFiles { root: root.root, files, counted: heat.values().sum(), worst_permille })
}

fn wanted(shape: &MoeShape, sets: &Sets<'_>, heat: &Heat) -> anyhow::Result<Vec<ExpertSet>> {
    match sets {
        Sets::Dealt(packs) => Ok(map::deal(shape.layers, shape.experts, *packs)),
        Sets::ByHeat { .. } if heat.is_empty() => {
            Err(anyhow::anyhow!("nothing was counted of this model in this node's ledger"))
                .hint("lead it for a while, or leave --by-heat out for an even deal")
        }
        Sets::ByHeat { packs, copies } => Ok(heat::place(shape.layers, shape.experts, *packs, *copies, heat)),
        Sets::Named(texts) => texts
            .iter()
            .map(|text| map::parse(text, shape.layers, shape.experts).map_err(anyhow::Error::msg))
            .collect::<anyhow::Result<_>>()
            .hint("write LAYERS:EXPERTS, for example *:0-15 or 0:1,3;2:*"),
    }
}

/// Writes beside the name and renames, so that no half-written file ever bears it.
fn write<E: std::error::Error + Send + Sync + 'static>(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> anyhow::Result<u64> {
    let temporary = path.with_extension("part");
    let written = (|| -> anyhow::Result<u64> {
        let mut file = BufWriter::with_capacity(BUFFER, File::create(&temporary)?);
        content(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        Ok(file.get_ref().metadata()?.len())
    })();
    let bytes = match written {
        Ok(bytes) => bytes,
        Err(error) => {
            // What is left of it is of no use; that it cannot be removed is the lesser news.
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
    };
    std::fs::rename(&temporary, path)?;
    Ok(bytes)
}
