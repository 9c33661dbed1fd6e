//! `satgrid models pull|list|show|split|verify`.

use anyhow::Context as _;
use satgrid_engine::experts::heat::Heat;
use satgrid_engine::random_model::{RandomModel, SHAPES};
use satgrid_engine_llama::{split_model, split_stage_trunk};
use satgrid_ledger_sqlite::read_figures;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use super::print;
use crate::cli::{Format, Globals, ModelsCommand, SplitArgs};
use crate::config::{Config, Models};
use crate::failure::{Findings, HintExt};
use crate::models::{
    CATALOGUE, CHUNK_BYTES, HubOptions, PullError, Record, Reference, Sets, SplitFile, SplitFiles, Store, identify,
    pull, sha256_of, split_experts,
};
use crate::progress::{Bytes, megabytes};

/// More layers than any published model has.
const MAX_RANDOM_LAYERS: u32 = 512;

pub(super) fn run(globals: &Globals, command: &ModelsCommand) -> anyhow::Result<()> {
    let all = globals.load()?.config;
    let config = &all.models;
    let store = Store::new(&config.dir);
    match command {
        ModelsCommand::Pull { reference, name } => fetch(globals, config, &store, reference, name.as_deref()),
        ModelsCommand::List => list(globals, &store),
        ModelsCommand::Show { model } => show(globals, &store, model),
        ModelsCommand::Random { shape, out, layers } => random(globals, shape, out, *layers),
        ModelsCommand::Split(args) => split(globals, &all, &store, args),
        ModelsCommand::Verify { models } => verify(globals, &store, models),
    }
}

fn hinted<T>(result: Result<T, PullError>) -> anyhow::Result<T> {
    result.or_else(|error| match error.hint() {
        Some(hint) => Err(error).hint(hint),
        None => Err(error.into()),
    })
}

fn fetch(globals: &Globals, config: &Models, store: &Store, reference: &str, name: Option<&str>) -> anyhow::Result<()> {
    let reference = match Reference::parse(reference) {
        Ok(reference) => reference,
        Err(error) => {
            let hint = error.hint();
            return Err(error).hint(hint);
        }
    };
    let token = config.hub_token.as_ref().map(|secret| secret.read()).transpose()?;
    let hub = HubOptions { chunk_bytes: CHUNK_BYTES, endpoint: config.hub_endpoint.clone(), token };
    let pulled = hinted(pull(store, &reference, name, &hub, Bytes::new))?;
    match globals.format {
        Format::Text => {
            eprintln!("{} {}", pulled.record.name, if pulled.cached { "is there and right" } else { "is ready" });
            print::out(&pulled.path.to_string_lossy())
        }
        Format::Json => print::json(&json!({
            "name": pulled.record.name, "path": pulled.path, "bytes": pulled.record.bytes,
            "sha256": pulled.record.sha256, "source": pulled.record.source, "cached": pulled.cached,
        })),
    }
}

/// The seed of every benchmark's model: the same file everywhere.
const RANDOM_SEED: u64 = 1;

fn random(globals: &Globals, shape: &str, out: &Path, layers: Option<u32>) -> anyhow::Result<()> {
    let known = SHAPES.map(|shape| shape.name).join(", ");
    let Some(model) = RandomModel::named(shape) else {
        return Err(anyhow::anyhow!("no shape {shape:?}")).hint(format!("shapes: {known}"));
    };
    let model = RandomModel { layers: layers.unwrap_or(model.layers).clamp(1, MAX_RANDOM_LAYERS), ..model };
    let bytes = model.tensor_bytes()?;
    let written = || -> anyhow::Result<()> {
        let mut file = BufWriter::new(File::create_new(out)?);
        let bar = Bytes::new("writing", bytes);
        model.write(&mut file, RANDOM_SEED, |more| bar.add(more))?;
        file.flush()?;
        bar.finish();
        Ok(())
    };
    written().with_context(|| format!("{}", out.display()))?;
    match globals.format {
        Format::Text => print::out(&format!("{}: {} of random weights", out.display(), megabytes(bytes))),
        Format::Json => print::json(&json!({ "path": out, "shape": model.name, "tensor_bytes": bytes })),
    }
}

fn list(globals: &Globals, store: &Store) -> anyhow::Result<()> {
    let records = store.list();
    let absent: Vec<_> = CATALOGUE.iter().filter(|entry| store.find(entry.name).is_none()).collect();
    if globals.format == Format::Json {
        let absent: Vec<_> = absent
            .iter()
            .map(|entry| json!({ "name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256 }))
            .collect();
        return print::json(&json!({ "dir": store.dir(), "models": records, "catalogue": absent }));
    }
    let row = |name: &str, bytes: u64, sha256: &str, source: &str| {
        vec![name.to_owned(), megabytes(bytes), sha256.chars().take(16).collect(), source.to_owned()]
    };
    let mut rows: Vec<_> = records.iter().map(|r| row(&r.name, r.bytes, &r.sha256, &r.source)).collect();
    rows.extend(absent.iter().map(|e| row(e.name, e.bytes, e.sha256, "not here: `satgrid models pull` fetches it")));
    print::out(&print::table(&["name", "size", "sha256", "from"], rows))
}

fn show(globals: &Globals, store: &Store, model: &str) -> anyhow::Result<()> {
    let path = find(store, model)?;
    let identified = match identify(store, &path, Bytes::new) {
        Ok(identified) => identified,
        Err(fault) => {
            let hint = fault.hint();
            return Err(anyhow::Error::new(fault).context(format!("{} cannot be used", path.display()))).hint(hint);
        }
    };
    let facts = &identified.inspected.facts;
    let (root, tokenizer) = (hex::encode(identified.root), hex::encode(identified.inspected.tokenizer.hash));
    let template = identified.inspected.has_template;
    if globals.format == Format::Json {
        return print::json(&json!({
            "path": path, "root": root, "tokenizer": tokenizer, "architecture": facts.architecture,
            "name": facts.name, "quantisation": facts.quantisation, "parameters": facts.parameters,
            "layers": facts.layers, "n_embd": facts.n_embd, "context": facts.context, "vocab": facts.vocab,
            "experts": facts.experts, "experts_used": facts.experts_used, "tensor_bytes": facts.tensor_bytes,
            "chat_template": template,
        }));
    }
    let experts = match facts.experts {
        0 => "none (dense)".to_owned(),
        all => format!("{all}, {} used per token", facts.experts_used),
    };
    let rows = [
        ("path", path.display().to_string()),
        ("claims to be", facts.name.clone().unwrap_or_else(|| "nothing".to_owned())),
        ("root", root),
        ("tokenizer", tokenizer),
        ("architecture", format!("{}, {} layers, width {}", facts.architecture, facts.layers, facts.n_embd)),
        (
            "parameters",
            format!(
                "{} million, {}, {}",
                facts.parameters / 1_000_000,
                facts.quantisation,
                megabytes(facts.tensor_bytes)
            ),
        ),
        ("context", format!("{} tokens, vocabulary of {}", facts.context, facts.vocab)),
        ("experts", experts),
        ("chat template", if template { "yes" } else { "none: a base model, it continues text" }.to_owned()),
    ];
    print::out(&print::table(&["", ""], rows.into_iter().map(|(what, is)| vec![what.to_owned(), is]).collect()))
}

/// A name in the store, else a path.
fn find(store: &Store, model: &str) -> anyhow::Result<PathBuf> {
    match store.find(model) {
        Some(record) => Ok(store.path(&record)),
        None if Path::new(model).exists() => Ok(model.into()),
        None => Err(anyhow::anyhow!("no model {model:?} in {}", store.dir().display())).hint("satgrid models list"),
    }
}

/// Expert rows that this node counted while it led the model; none where it never did.
fn counted(config: &Config, root: [u8; 32]) -> Heat {
    let path = crate::up::beside_journal(config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let found = runtime.ok().and_then(|runtime| runtime.block_on(read_figures(&path, root)).ok());
    found.unwrap_or_default().0
}

fn split(globals: &Globals, config: &Config, store: &Store, args: &SplitArgs) -> anyhow::Result<()> {
    let path = find(store, &args.model)?;
    let Some(layers) = args.layers else {
        let counted = |root| counted(config, root);
        let packs = args.packs.unwrap_or(1);
        let sets = match (args.pack.as_slice(), args.by_heat) {
            ([], true) => Sets::ByHeat { packs, copies: args.copies },
            ([], false) => Sets::Dealt(packs),
            (named, _) => Sets::Named(named),
        };
        let written = split_experts(&path, &sets, &counted, &args.out, Bytes::new);
        let written = written.map_err(|error| error.context(format!("{} cannot be split", path.display())))?;
        return tell_split(globals, &written);
    };
    let bytes = std::fs::metadata(&path)?.len();
    let progress = Bytes::new(&format!("cutting layers {layers}"), bytes);
    let mut show = |permille| progress.set(bytes / 1000 * u64::from(permille));
    let cut = if args.trunk { split_stage_trunk } else { split_model };
    let report = cut(&path, layers, &args.out, &mut show);
    progress.finish();
    let report = report.map_err(anyhow::Error::new).hint("satgrid models show MODEL says how many layers there are")?;
    let root = hex::encode(report.model_root);
    match globals.format {
        Format::Text => {
            let (layers, all, size) = (report.range, report.layers, megabytes(report.file_bytes));
            eprintln!("layers {layers} of {all}, {size}, of the model with root {root}");
            print::out(&args.out.to_string_lossy())
        }
        Format::Json => print::json(&json!({
            "path": args.out, "start": report.range.start(), "end": report.range.end(), "layers": report.layers,
            "model_root": root, "bytes": report.file_bytes,
        })),
    }
}

fn tell_split(globals: &Globals, written: &SplitFiles) -> anyhow::Result<()> {
    if globals.format == Format::Json {
        let files: Vec<_> = written
            .files
            .iter()
            .map(|file| {
                json!({ "path": file.path, "holds": file.holds, "bytes": file.bytes, "share_permille": file.permille })
            })
            .collect();
        return print::json(&json!({
            "root": hex::encode(written.root), "files": files, "counted_rows": written.counted,
            "busiest_permille": written.worst_permille,
        }));
    }
    let row = |file: &SplitFile| {
        let share = file.permille.map_or_else(String::new, |share| format!("{}.{}%", share / 10, share % 10));
        vec![file.path.display().to_string(), megabytes(file.bytes), share, file.holds.clone()]
    };
    let (counted, worst) = (written.counted, written.worst_permille);
    let by = if counted > 0 { format!("{counted} counted expert rows") } else { "experts counted alike".to_owned() };
    eprintln!("by {by}, the busiest pack of any layer has {}.{}% of its rows", worst / 10, worst % 10);
    eprintln!("all parts prove that they are of the model with root {}", hex::encode(written.root));
    print::out(&print::table(&["file", "size", "rows", "holds"], written.files.iter().map(row).collect()))
}

fn verify(globals: &Globals, store: &Store, names: &[String]) -> anyhow::Result<()> {
    let records = if names.is_empty() { store.list() } else { named(store, names)? };
    let mut verdicts = Vec::new();
    for record in &records {
        verdicts.push((record, verdict(store, record)));
    }
    match globals.format {
        Format::Text => {
            let rows = verdicts.iter().map(|(record, verdict)| {
                vec![record.name.clone(), verdict.clone().err().unwrap_or_else(|| "right".to_owned())]
            });
            print::out(&print::table(&["name", "verdict"], rows.collect()))?;
        }
        Format::Json => {
            let rows: Vec<_> = verdicts
                .iter()
                .map(|(record, verdict)| json!({ "name": record.name, "right": verdict.is_ok(), "fault": verdict.as_ref().err() }))
                .collect();
            print::json(&rows)?;
        }
    }
    if verdicts.iter().all(|(_, verdict)| verdict.is_ok()) { Ok(()) } else { Err(Findings.into()) }
}

fn named(store: &Store, names: &[String]) -> anyhow::Result<Vec<Record>> {
    let find = |name: &String| store.find(name).ok_or_else(|| anyhow::anyhow!("no model {name:?} in the store"));
    names.iter().map(find).collect::<anyhow::Result<_>>().hint("satgrid models list")
}

fn verdict(store: &Store, record: &Record) -> Result<(), String> {
    let path = store.path(record);
    let progress = Bytes::new(&format!("checking {}", record.name), record.bytes);
    let found = sha256_of(&path, &progress).map_err(|error| error.to_string())?;
    progress.finish();
    if found == record.sha256 { Ok(()) } else { Err(format!("wrong: SHA-256 {found} instead of {}", record.sha256)) }
}
