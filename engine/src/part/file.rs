//! Reading a part, and holding it to the root of the model that it says it is of.
//!
//! [`PartFile::read`] needs the header alone. It puts the whole model's metadata together again (values of the part, with the
//! replaced ones put back and the added ones left out), takes the table of tensors, and computes the model root. It then
//! cuts *that* model on paper and refuses the part unless metadata and tensor table are exactly what the cut gives: so a part
//! with a changed rotary base, a missing tensor or another layer's number is refused. [`PartFile::verify`] reads the
//! tensors' data and holds each to its hash.
//!
//! Whether the root is that of the model that was sold is the caller's to compare.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use satgrid_types::LayerRange;

use super::admit::{Refused, admit};
use super::cut::{Content, contents, metadata};
use super::{
    KEY_ADDED, KEY_END, KEY_HASHES, KEY_KINDS, KEY_LAYERS, KEY_NAMES, KEY_RANKS, KEY_SHAPES, KEY_START, KEY_VERSION,
    PREFIX, VERSION, WHOLE,
};
use crate::experts::manifest::{MANIFEST_KEY, Manifest};
use crate::gguf::{Array, DEFAULT_ALIGNMENT, Gguf, GgufError, MAX_TENSORS, Tensor, TensorType, Value, align_up};
use crate::root::{ModelRoot, data_hash};

/// Why a file is not a part of the model that it says it is of.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    #[error("the file is not a part of a model; make one with `satgrid models split`")]
    NotAPart,
    #[error("a part of version {version}; this program reads version {VERSION}")]
    Version { version: u64 },
    #[error("the part's table is broken at {key:?}")]
    BadTable { key: String },
    #[error("the whole model may not be cut: {0}")]
    Refused(#[from] Refused),
    #[error("metadata {key:?} is not what the model has for these layers")]
    Metadata { key: String },
    #[error("tensor {name:?} is missing, superfluous or of another shape than the model's")]
    Tensor { name: String },
    #[error("the manifest of its experts: {0}")]
    Experts(#[from] crate::experts::PartError),
    #[error("the manifest of its experts is of another model")]
    OtherExperts,
    #[error("the data of tensor {name:?} is not the model's: its hash differs")]
    Data { name: String },
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// A part whose header agrees with the model root that it carries.
#[derive(Debug, Clone, PartialEq)]
pub struct PartFile {
    pub range: LayerRange,
    /// Layers of the whole model.
    pub layers: u32,
    /// The whole model's root, computed from the part's table.
    pub root: [u8; 32],
    /// The whole model's header as far as the part knows it: metadata (a tail also has the tokenizer's) and all tensors.
    /// Offsets are not those of any file.
    pub whole: Gguf,
    /// Of a trunk, whose experts are elsewhere: which they are.
    pub experts: Option<Manifest>,
    contents: Vec<Content>,
    hashes: Vec<(String, [u8; 32])>,
}

impl PartFile {
    pub fn is_part(gguf: &Gguf) -> bool {
        gguf.get(KEY_VERSION).is_some()
    }

    /// Reads and checks the header of a part.
    pub fn read(gguf: &Gguf) -> Result<Self, PartError> {
        let version = gguf.uint(KEY_VERSION).ok_or(PartError::NotAPart)?;
        if version != u64::from(VERSION) {
            return Err(PartError::Version { version });
        }
        let bad = |key: &str| PartError::BadTable { key: key.to_owned() };
        let number = |key: &str| gguf.uint(key).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| bad(key));
        let (start, end, layers) = (number(KEY_START)?, number(KEY_END)?, number(KEY_LAYERS)?);
        let range = LayerRange::new(start, end).filter(|range| range.end() <= layers).ok_or_else(|| bad(KEY_END))?;

        let (tensors, hashes) = table(gguf)?;
        let whole = Gguf {
            version: gguf.version,
            metadata: whole_metadata(gguf)?,
            tensors,
            alignment: DEFAULT_ALIGNMENT,
            data_offset: 0,
            file_bytes: 0,
        };
        if admit(&whole)? != layers {
            return Err(bad(KEY_LAYERS));
        }
        let root = ModelRoot::from_hashes(&whole, hashes.clone()).ok_or_else(|| bad(KEY_NAMES))?.root;

        let experts = gguf.get(MANIFEST_KEY).map(|_| Manifest::of_part(gguf)).transpose()?;
        if experts.as_ref().is_some_and(|experts| experts.root != root) {
            return Err(PartError::OtherExperts);
        }
        let elsewhere = experts.as_ref().map(Manifest::shape).transpose().map_err(crate::experts::PartError::from)?;

        // What a cut of that model gives, this file must be.
        let metadata = metadata(&whole, range, layers, elsewhere.as_ref()).metadata;
        let expected: BTreeMap<String, Value> = metadata.into_iter().collect();
        let given = gguf.metadata.iter().filter(|(key, _)| !key.starts_with(PREFIX) && key != "general.alignment");
        let given: BTreeMap<&String, &Value> = given.map(|(key, value)| (key, value)).collect();
        let key = expected.iter().find(|(key, value)| given.get(key) != Some(value)).map(|(key, _)| key.clone());
        let key = key.or_else(|| given.keys().find(|key| !expected.contains_key(**key)).map(|key| (*key).clone()));
        if let Some(key) = key {
            return Err(PartError::Metadata { key });
        }
        let contents = contents(&whole, range, layers, elsewhere.as_ref());
        let same = |content: &Content| {
            gguf.tensor(&content.name).is_some_and(|t| t.kind == content.kind && t.shape == content.shape)
        };
        if let Some(content) = contents.iter().find(|content| !same(content)) {
            return Err(PartError::Tensor { name: content.name.clone() });
        }
        if let Some(extra) = gguf.tensors.iter().find(|t| !contents.iter().any(|content| content.name == t.name)) {
            return Err(PartError::Tensor { name: extra.name.clone() });
        }
        Ok(Self { range, layers, root, whole, experts, contents, hashes })
    }

    /// It ends the model: it has the head, and the embedding for tokens.
    pub fn is_tail(&self) -> bool {
        self.range.end() == self.layers
    }

    /// Reads every tensor of the file and holds it to its hash. `progress` hears of every chunk's bytes.
    pub fn verify<R: Read + Seek>(
        &self,
        gguf: &Gguf,
        reader: &mut R,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), PartError> {
        for content in &self.contents {
            // Zeros stand where nothing is looked up; what else stood there would change nothing.
            let Some(original) = content.from.and_then(|at| self.whole.tensors.get(at)) else { continue };
            let differs = || PartError::Data { name: content.name.clone() };
            let tensor = gguf.tensor(&content.name).ok_or_else(differs)?;
            let at = self.hashes.binary_search_by(|(name, _)| name.as_bytes().cmp(original.name.as_bytes()));
            let expected = at.ok().and_then(|at| self.hashes.get(at)).ok_or_else(differs)?;
            if data_hash(reader, gguf, tensor, progress)? != expected.1 {
                return Err(differs());
            }
        }
        Ok(())
    }
}

/// The whole model's metadata, as far as the part carries it.
fn whole_metadata(gguf: &Gguf) -> Result<Vec<(String, Value)>, PartError> {
    let bad = || PartError::BadTable { key: KEY_ADDED.to_owned() };
    let Some(Array::Str(added)) = gguf.get(KEY_ADDED).and_then(Value::as_array) else { return Err(bad()) };
    let mut metadata = Vec::new();
    for (key, value) in &gguf.metadata {
        if key.starts_with(PREFIX) || added.iter().any(|added| added == key.as_bytes()) {
            continue;
        }
        let value = gguf.get(&format!("{WHOLE}{key}")).unwrap_or(value);
        metadata.push((key.clone(), value.clone()));
    }
    // What was left out.
    let gone = gguf.metadata.iter().filter_map(|(key, value)| Some((key.strip_prefix(WHOLE)?, value)));
    for (key, value) in gone.filter(|(key, _)| gguf.get(key).is_none()) {
        metadata.push((key.to_owned(), value.clone()));
    }
    Ok(metadata)
}

type Table = (Vec<Tensor>, Vec<(String, [u8; 32])>);

/// The whole model's tensors and their hashes, in the order of their leaves.
fn table(gguf: &Gguf) -> Result<Table, PartError> {
    let bad = |key: &str| PartError::BadTable { key: key.to_owned() };
    let array = |key: &str| gguf.get(key).and_then(Value::as_array);
    let Some(Array::Str(names)) = array(KEY_NAMES) else { return Err(bad(KEY_NAMES)) };
    let Some(Array::U32(kinds)) = array(KEY_KINDS) else { return Err(bad(KEY_KINDS)) };
    let Some(Array::U8(ranks)) = array(KEY_RANKS) else { return Err(bad(KEY_RANKS)) };
    let Some(Array::U64(shapes)) = array(KEY_SHAPES) else { return Err(bad(KEY_SHAPES)) };
    let Some(Array::U8(hashes)) = array(KEY_HASHES) else { return Err(bad(KEY_HASHES)) };
    let (hashes, rest) = hashes.as_chunks::<32>();
    if names.len() as u64 > MAX_TENSORS || !rest.is_empty() || hashes.len() != names.len() {
        return Err(bad(KEY_HASHES));
    }
    if kinds.len() != names.len() || ranks.len() != names.len() {
        return Err(bad(KEY_KINDS));
    }
    let (mut tensors, mut table, mut shapes, mut offset) = (Vec::new(), Vec::new(), shapes.as_slice(), 0_u64);
    for (at, name) in names.iter().enumerate() {
        let name = String::from_utf8(name.clone()).map_err(|_| bad(KEY_NAMES))?;
        let kind = TensorType::from_id(kinds[at]).ok_or_else(|| bad(KEY_KINDS))?;
        let (shape, others) = shapes.split_at_checked(usize::from(ranks[at])).ok_or_else(|| bad(KEY_SHAPES))?;
        shapes = others;
        let bytes = kind.size(shape).filter(|bytes| *bytes > 0).ok_or_else(|| bad(KEY_SHAPES))?;
        tensors.push(Tensor { name: name.clone(), shape: shape.to_vec(), kind, offset, bytes });
        let next = offset.checked_add(bytes).and_then(|end| align_up(end, DEFAULT_ALIGNMENT));
        offset = next.ok_or_else(|| bad(KEY_SHAPES))?;
        table.push((name, hashes[at]));
    }
    if !shapes.is_empty() || !table.is_sorted_by(|(a, _), (b, _)| a.as_bytes() < b.as_bytes()) {
        return Err(bad(KEY_NAMES));
    }
    Ok((tensors, table))
}
