//! A trunk's way to its experts: the node, over the socket that the child has anyway, in the middle of a batch.
//!
//! Whether the trunk is a whole model's or a stage's, the node hears the layers' numbers in the model, and whose each row is.

use satgrid_engine::experts::ExpertStep;
use satgrid_engine::port::JobId;
use satgrid_types::LayerRange;

use crate::ffi::{BatchRow, ExpertHook};
use crate::owners::Owners;
use crate::wire::FromWorker;
use crate::worker::SharedSocket;

pub(crate) struct NodeExperts {
    socket: SharedSocket,
    /// The layer of the model that is the file's first.
    first: u32,
    step: u64,
    /// In the model.
    layer: u32,
    owners: Owners,
}

impl NodeExperts {
    /// Of a file that holds these layers of the model.
    pub(crate) fn new(socket: SharedSocket, layers: LayerRange) -> NodeExperts {
        let (first, owners) = (layers.start(), Owners::new(layers.layers()));
        NodeExperts { socket, first, step: 0, layer: first, owners }
    }
}

impl ExpertHook for NodeExperts {
    fn begin(&mut self, rows: &[BatchRow]) {
        self.owners.begin(rows);
    }

    fn seated(&mut self, slot: u32, job: JobId) {
        self.owners.seated(slot, job);
    }

    fn chosen(&mut self, layer: u32, used: u32, ids: Vec<u32>, rows: Vec<f32>) -> Result<(), String> {
        let count = ids.len() / used.max(1) as usize;
        let jobs = self.owners.of(layer, count)?;
        let layer = self.first.saturating_add(layer);
        // A batch goes up through the layers.
        self.step += u64::from(layer <= self.layer);
        self.layer = layer;
        let step = ExpertStep { step: self.step, layer, used, ids, rows, jobs };
        self.socket.lock().send(&FromWorker::ExpertStep(step)).map_err(|error| error.to_string())
    }

    fn outputs(&mut self) -> Result<Vec<f32>, String> {
        // The socket ends with the node, so this wait has an end.
        let rows = self.socket.lock().outputs().map_err(|error| error.to_string())??;
        if (rows.step, rows.layer) != (self.step, self.layer) {
            return Err("the node answered another step".to_owned());
        }
        Ok(rows.rows)
    }
}
