//! Calls that embed texts: rows taken in, and what their provider may count for them.
//!
//! A row comes before the statement that charges for its text, so what is signed is what is there. A request that broke off
//! ends at its last acknowledgement; its call goes on, here or elsewhere, with the texts whose rows it has not.

use super::{Consumer, ConsumerAction, Emission, SessionIndex, Submit, streams::Live};
use satgrid_protocol::frame::{MAX_ROW, ProviderFrame};
use satgrid_types::{RequestId, UnixMs, cbor};

const NUMBER: usize = 4;

impl Submit {
    /// Token ids of all texts before this one.
    pub(super) fn text_begins(&self, text: usize) -> usize {
        let before = self.embed.iter().flatten().take(text);
        before.fold(0, |sum, length| sum.saturating_add(usize::try_from(*length).unwrap_or(usize::MAX)))
    }
}

impl Live {
    /// Prompt tokens at which the first text ends whose row has not come; `None` where none is missing, or nothing is embedded.
    pub(super) fn missing_row(&self) -> Option<u32> {
        let texts = self.private.embed.as_ref()?;
        let end = texts.iter().take(self.rows.saturating_add(1)).fold(0_u32, |sum, length| sum.saturating_add(*length));
        (self.rows < texts.len()).then_some(end)
    }
}

impl Consumer {
    pub(super) fn embedded(&mut self, now: UnixMs, index: SessionIndex, request: RequestId, text: u32, row: Vec<u8>) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let listed = session.listing.as_ref().and_then(|listing| listing.embeds);
        let Some(live) = session.requests.get_mut(&request) else { return };
        let width = listed.and_then(|numbers| usize::try_from(numbers).ok()?.checked_mul(NUMBER));
        let in_turn = usize::try_from(text).is_ok_and(|text| text == live.rows) && live.missing_row().is_some();
        let sound = row.chunks_exact(NUMBER).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite());
        if !in_turn || !sound || row.len() > MAX_ROW || Some(row.len()) != width {
            let why = "a row out of order, of another width than listed, or without numbers";
            return self.misbehaved(now, index, "row", why, cbor::encode(&ProviderFrame::Embedded(text, row.into())));
        }
        live.rows = live.rows.saturating_add(1);
        let call = live.call;
        if let Some(call) = self.calls.get_mut(&call) {
            call.rows = call.rows.saturating_add(1);
        }
        self.actions.push_back(ConsumerAction::Emit { call, emission: Emission::Embedded { row } });
    }
}
