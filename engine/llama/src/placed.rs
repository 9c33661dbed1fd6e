//! Where the layers of a file go on this very machine: what the file's table needs, held against what the devices have free.

use satgrid_engine::gguf::Gguf;
use satgrid_engine::memory::{ContextShape, Needs};

use crate::devices::{Device, Offload, PlaceError, Placement, host_memory, place};
use crate::ffi::{self, Handle};

/// A decision, with the device's handle for the loader.
pub(crate) struct Placed {
    pub(crate) placement: Placement,
    /// The device that holds the last layers, and how many.
    pub(crate) offload: Option<(Handle, u32)>,
    /// Bytes that may be taken for it, on the device and beside it.
    pub(crate) may_use: u64,
}

impl Placed {
    pub(crate) fn on_processor() -> Self {
        Self { placement: Placement::Processor, offload: None, may_use: host_memory().unwrap_or(0) }
    }

    /// Decides for a file with this table and a context of this shape, of which no more than `most` bytes are to be used.
    pub(crate) fn of(
        gguf: &Gguf,
        offload: &Offload,
        shape: &ContextShape,
        most: Option<u64>,
    ) -> Result<Self, PlaceError> {
        let (all, known) = candidates(offload);
        let (needs, host) = (Needs::of(gguf, shape), host_memory());
        let placement = place(offload, &known, &needs, host)?;
        if let Some(most) = most.filter(|most| needs.total() > *most) {
            return Err(PlaceError::over_cap(&needs, most));
        }
        let on_card = match &placement {
            Placement::Processor => 0,
            Placement::Device { device, .. } => device.free,
        };
        // A machine that does not tell has at least what it is about to give.
        let free = host.map_or(needs.total(), |host| host.saturating_add(on_card));
        let may_use = most.map_or(free, |most| free.min(most));
        let offload = match &placement {
            Placement::Processor => None,
            Placement::Device { device, layers, .. } => {
                all.iter().find(|(_, one)| one.name == device.name).map(|(handle, _)| (*handle, *layers))
            }
        };
        Ok(Self { placement, offload, may_use })
    }

    /// The card that takes part, if one does.
    pub(crate) fn card(&self) -> Option<&Device> {
        match &self.placement {
            Placement::Processor => None,
            Placement::Device { device, .. } => Some(device),
        }
    }

    /// Says in the log what went to a card.
    pub(crate) fn tell(&self, what: &str) {
        if let Placement::Device { device, layers, whole } = &self.placement {
            tracing::info!(device = %device.name, card = %device.description, layers, whole, "{what} on the device");
        }
    }
}

/// The devices to choose among. Who wants none asks none: a card that is only asked how much it has free gives the process a
/// context of its own, some hundred megabytes.
fn candidates(offload: &Offload) -> (Vec<(Handle, Device)>, Vec<Device>) {
    let all = if offload.wants_processor() { Vec::new() } else { ffi::devices() };
    let known = all.iter().map(|(_, device)| device.clone()).collect();
    (all, known)
}

/// The card that a pack of experts goes to: the one that is named, else the one with the most free memory; `None` for the
/// processor, also where no card has room for `bytes`.
pub(crate) fn card_for(offload: &Offload, bytes: u64) -> Result<Option<(Handle, Device)>, PlaceError> {
    let (all, known) = candidates(offload);
    // Experts have no layers of their own to divide: all of them, or none.
    let needs = Needs { layers: vec![bytes], embedding: 0, head: 0, kv_layer: 0, compute: 0 };
    match place(offload, &known, &needs, host_memory())? {
        Placement::Processor => Ok(None),
        Placement::Device { device, .. } => {
            Ok(all.into_iter().find(|(_, one)| one.name == device.name).map(|(handle, _)| (handle, device)))
        }
    }
}
