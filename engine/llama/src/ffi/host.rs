//! Numbers in the host's memory that a card writes to directly, without a copy through the driver's own: pinned memory.

use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::Handle;

/// A growing row of numbers. Without a card, or where its driver has no such memory left, an ordinary `Vec`.
pub(super) struct HostNumbers {
    pinned: Option<Pinned>,
    plain: Vec<f32>,
}

/// A fixed room of the driver's, of which the first `filled` numbers were written.
struct Pinned {
    buffer: NonNull<sys::ggml_backend_buffer>,
    base: NonNull<f32>,
    room: usize,
    filled: usize,
}

impl HostNumbers {
    /// For at most `room` numbers at once; more are taken, more slowly.
    pub(super) fn new(card: Option<Handle>, room: usize) -> Self {
        Self { pinned: card.and_then(|card| Pinned::new(card, room)), plain: Vec::new() }
    }

    pub(super) fn clear(&mut self) {
        if let Some(pinned) = &mut self.pinned {
            pinned.filled = 0;
        }
        self.plain.clear();
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        match &self.pinned {
            // SAFETY: the memory is ours until drop, and the first `filled` numbers of it were written.
            Some(pinned) if self.plain.is_empty() => unsafe {
                std::slice::from_raw_parts(pinned.base.as_ptr(), pinned.filled)
            },
            Some(_) | None => &self.plain,
        }
    }

    /// Room for `count` numbers more, to be written at once.
    pub(super) fn more(&mut self, count: usize) -> &mut [f32] {
        if let Some(pinned) = &mut self.pinned {
            let end = pinned.filled.saturating_add(count);
            if self.plain.is_empty() && end <= pinned.room {
                let from = pinned.filled;
                pinned.filled = end;
                // SAFETY: `from + count` lies within the room, which is ours until drop and was zeroed when it was taken, so
                // that it holds numbers; nothing else refers to it while `self` is borrowed.
                return unsafe { std::slice::from_raw_parts_mut(pinned.base.as_ptr().add(from), count) };
            }
            if self.plain.is_empty() {
                // Too much for the room: all of it moves.
                // SAFETY: as in `as_slice`.
                let written = unsafe { std::slice::from_raw_parts(pinned.base.as_ptr(), pinned.filled) };
                self.plain.extend_from_slice(written);
            }
        }
        let from = self.plain.len();
        self.plain.resize(from + count, 0.0);
        &mut self.plain[from..]
    }
}

impl Pinned {
    fn new(card: Handle, room: usize) -> Option<Self> {
        let bytes = room.checked_mul(size_of::<f32>()).filter(|bytes| *bytes > 0)?;
        // SAFETY: the handle is a device's, which live as long as the process; null answers are looked for; the base of a host
        // buffer is memory of at least `bytes` bytes, aligned for tensors and so for numbers.
        unsafe {
            let kind = sys::ggml_backend_dev_host_buffer_type(card.0);
            if kind.is_null() {
                return None;
            }
            let buffer = NonNull::new(sys::ggml_backend_buft_alloc_buffer(kind, bytes))?;
            let base = sys::ggml_backend_buffer_get_base(buffer.as_ptr()).cast::<f32>();
            let Some(base) = NonNull::new(base).filter(|base| base.is_aligned()) else {
                sys::ggml_backend_buffer_free(buffer.as_ptr());
                return None;
            };
            base.as_ptr().write_bytes(0, room);
            Some(Self { buffer, base, room, filled: 0 })
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `self` owns the buffer and is gone after this.
        unsafe { sys::ggml_backend_buffer_free(self.buffer.as_ptr()) }
    }
}
