//! An expert pack: the weights of any set of (layer, expert), and the proof of which model they are of.
//!
//! It is a GGUF of the architecture `satgrid-experts`. Of each layer that it serves it has the three tensors under their
//! names in the model, with only the held experts in them, in rising order, and an array that says which these are.

use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::ops::Range;

use satgrid_types::ExpertSet;
use sha2::{Digest, Sha256};

use super::family::MoeShape;
use super::manifest::{MANIFEST_KEY, Manifest, Part, PartError};
use crate::gguf::{Array, Gguf, GgufWriter, Value, read_range};

/// `general.architecture` of a pack.
pub const ARCHITECTURE: &str = "satgrid-experts";

fn held_key(layer: u32) -> String {
    format!("satgrid.experts.layer.{layer}")
}

/// Writes a pack from a whole model. Reads only these experts, a piece at a time.
pub fn write<R: Read + Seek, W: Write>(
    gguf: &Gguf,
    reader: &mut R,
    manifest: &Manifest,
    set: &ExpertSet,
    out: &mut W,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PartError> {
    MoeShape::admit(gguf)?;
    let held = by_layer(set);
    check_set(&held, manifest)?;
    let name = gguf.str("general.name").unwrap_or("model");
    let mut writer = GgufWriter::new()
        .set("general.architecture", Value::string(ARCHITECTURE))
        .set("general.name", Value::string(format!("{name}: {} experts", set.pairs().len())))
        .set(MANIFEST_KEY, manifest.to_value());
    for (layer, experts) in &held {
        writer = writer.set(held_key(*layer), Value::Array(Array::U32(experts.clone())));
    }
    let mut sources = BTreeMap::new();
    for (layer, experts) in &held {
        for part in Part::ALL {
            let name = part.tensor(*layer);
            let foreign = || PartError::ForeignTensor { name: name.clone(), root: manifest.root };
            let source = gguf.tensor(&name).ok_or_else(foreign)?;
            let shape = [source.shape[0], source.shape[1], experts.len() as u64];
            writer = writer.tensor(&name, source.kind, &shape)?;
            sources.insert(name, (source, experts));
        }
    }
    writer.write_pieces(out, |tensor, out| {
        let Some((source, experts)) = sources.get(&tensor.name) else { return Ok(()) };
        let bytes = tensor.bytes / (experts.len() as u64).max(1);
        for &expert in *experts {
            let mut take = |chunk: &[u8]| {
                progress(chunk.len() as u64);
                out.write_all(chunk)
            };
            read_range(reader, gguf, source, slice(u64::from(expert), bytes), &mut take)?;
        }
        Ok(())
    })
}

/// Bytes of the `index`th slice.
fn slice(index: u64, bytes: u64) -> Range<u64> {
    index * bytes..(index + 1) * bytes
}

fn by_layer(set: &ExpertSet) -> BTreeMap<u32, Vec<u32>> {
    let mut held: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for &(layer, expert) in set.pairs() {
        held.entry(layer).or_default().push(expert);
    }
    held
}

fn check_set(held: &BTreeMap<u32, Vec<u32>>, manifest: &Manifest) -> Result<(), PartError> {
    let (layers, experts) = (manifest.layers, manifest.experts);
    if held.is_empty() {
        return Err(PartError::Empty);
    }
    for (&layer, list) in held {
        if let Some(&expert) = list.iter().find(|expert| layer >= layers || **expert >= experts) {
            return Err(PartError::NoSuchExpert { layer, expert, layers, experts });
        }
        if list.is_empty() || !list.is_sorted_by(|a, b| a < b) {
            return Err(PartError::BadManifest(format!("the experts of layer {layer} are not in rising order")));
        }
    }
    Ok(())
}

/// A pack whose manifest is verified; each expert is verified when it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Pack {
    pub manifest: Manifest,
    /// Of each layer the held experts, rising.
    pub held: BTreeMap<u32, Vec<u32>>,
    gguf: Gguf,
}

impl Pack {
    pub fn open(gguf: Gguf) -> Result<Self, PartError> {
        let manifest = Manifest::of_part(&gguf)?;
        let shape = manifest.shape()?;
        let mut held = BTreeMap::new();
        for layer in 0..manifest.layers {
            match gguf.get(&held_key(layer)).and_then(Value::as_array) {
                Some(Array::U32(experts)) => held.insert(layer, experts.clone()),
                Some(_) => return Err(PartError::BadManifest(format!("the experts of layer {layer} are no numbers"))),
                None => None,
            };
        }
        check_set(&held, &manifest)?;
        let pack = Self { manifest, held, gguf };
        for (&layer, experts) in &pack.held {
            for part in Part::ALL {
                let name = part.tensor(layer);
                let [inner, outer, _] = part.shape(&shape);
                let fits = pack.gguf.tensor(&name).is_some_and(|tensor| {
                    tensor.shape == [inner, outer, experts.len() as u64]
                        && Some(tensor.kind) == pack.manifest.kind(layer, part)
                });
                if !fits {
                    return Err(PartError::ForeignTensor { name, root: pack.manifest.root });
                }
            }
        }
        Ok(pack)
    }

    /// Leaves only these experts in what is read and served.
    pub fn restrict(&mut self, set: &ExpertSet) -> Result<(), PartError> {
        let all = self.set();
        if let Some(&(layer, expert)) = set.pairs().iter().find(|(layer, expert)| !all.contains(*layer, *expert)) {
            return Err(PartError::NotHeld { layer, expert });
        }
        if set.pairs().is_empty() {
            return Err(PartError::Empty);
        }
        self.held = by_layer(set);
        Ok(())
    }

    pub fn set(&self) -> ExpertSet {
        ExpertSet::new(self.held.iter().flat_map(|(layer, experts)| experts.iter().map(|expert| (*layer, *expert))))
    }

    /// Bytes of all held weights.
    pub fn bytes(&self) -> u64 {
        let layers = self.held.iter();
        layers.map(|(&layer, experts)| self.manifest.expert_bytes(layer).unwrap_or(0) * experts.len() as u64).sum()
    }

    /// Reads one expert's part in chunks and checks it against the model root.
    pub fn read<R: Read + Seek>(
        &self,
        reader: &mut R,
        (layer, expert): (u32, u32),
        part: Part,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PartError> {
        let not_held = || PartError::NotHeld { layer, expert };
        let Some(Array::U32(stored)) = self.gguf.get(&held_key(layer)).and_then(Value::as_array) else {
            return Err(not_held());
        };
        let index = stored.iter().position(|stored| *stored == expert).ok_or_else(not_held)?;
        let tensor = self.gguf.tensor(&part.tensor(layer)).ok_or_else(not_held)?;
        let bytes = tensor.bytes / (stored.len() as u64).max(1);
        let mut hash = Sha256::new();
        let mut tee = |chunk: &[u8]| {
            hash.update(chunk);
            take(chunk);
            Ok(())
        };
        read_range(reader, &self.gguf, tensor, slice(index as u64, bytes), &mut tee)?;
        let found: [u8; 32] = hash.finalize().into();
        if self.manifest.part_hash(layer, expert, part) != Some(found) {
            return Err(PartError::ForeignExpert { layer, expert, root: self.manifest.root });
        }
        Ok(())
    }
}
