//! The rows that the last layer of a stage computes, taken out by llama.cpp's evaluation callback, which also ends the graph
//! there; and rows of an embedding table as numbers.

use std::ffi::{CStr, CString};

use llama_cpp_sys_2 as sys;

use super::Handle;
use super::host::HostNumbers;

/// Where the callback puts the rows.
pub(super) struct Capture {
    /// The last tensor of the last layer, as every architecture of the allow-list calls it.
    name: CString,
    numbers: HostNumbers,
}

impl Capture {
    /// Of a layer that `card` computes, if one does; `most` numbers come out of one batch.
    pub(super) fn of_layer(layer: u32, card: Option<Handle>, most: usize) -> Self {
        // A number holds no NUL.
        let name = CString::new(format!("l_out-{layer}")).unwrap_or_default();
        Self { name, numbers: HostNumbers::new(card, most) }
    }

    pub(super) fn clear(&mut self) {
        self.numbers.clear();
    }

    pub(super) fn numbers(&self) -> &[f32] {
        self.numbers.as_slice()
    }

    /// Whether a tensor of this name is the one.
    pub(super) fn wants(&self, name: &CStr) -> bool {
        name == self.name.as_c_str()
    }

    /// Takes the rows once they are computed. A batch over several streams of the cache is computed in several graphs, each of
    /// which ends here: their rows follow each other.
    pub(super) fn take(&mut self, tensor: *mut sys::ggml_tensor) {
        // SAFETY: the callback passes a tensor that is computed and lives for the call; as many bytes are copied as it has, into
        // room made for them. Of any other layout nothing is taken, which the caller notices by the count.
        unsafe {
            if (*tensor).type_ == sys::GGML_TYPE_F32 && sys::ggml_is_contiguous(tensor) {
                let bytes = sys::ggml_nbytes(tensor);
                let to = self.numbers.more(bytes / size_of::<f32>());
                sys::ggml_backend_tensor_get(tensor, to.as_mut_ptr().cast(), 0, bytes);
            }
        }
    }
}

/// A row of a tensor as numbers, by the very function with which llama.cpp looks tokens up. `None` for a type that it does not
/// know, or bytes that are not a row of `width`.
pub(crate) fn to_floats(kind: u32, row: &[u8], width: usize) -> Option<Vec<f32>> {
    if kind == sys::GGML_TYPE_F32 {
        let numbers = row.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<_>>();
        return (numbers.len() == width).then_some(numbers);
    }
    let length = i64::try_from(width).ok()?;
    // Types that ggml does not know end the process: our own table goes first.
    let known = satgrid_engine::gguf::TensorType::from_id(kind)?;
    if known.size(&[width as u64]) != Some(row.len() as u64) {
        return None;
    }
    let mut numbers = vec![0.0; width];
    // SAFETY: the type is one of ggml's; the row has the bytes that `width` numbers of this type take, which were just
    // checked, and the buffer has room for as many numbers.
    unsafe {
        let traits = sys::ggml_get_type_traits(kind as sys::ggml_type);
        let to_float = (*traits).to_float?;
        to_float(row.as_ptr().cast(), numbers.as_mut_ptr(), length);
    }
    Some(numbers)
}
