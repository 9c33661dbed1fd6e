//! One layer's rows on their way through the hosts.
//!
//! | a call is | leaves with                                                                              |
//! |-----------|------------------------------------------------------------------------------------------|
//! | out       | `answer`: its rows are in their slots; `lost`: its work is asked again, of other hosts     |
//!
//! A *witness* is a second call for one row that another host evaluates already. Its answer fills no slot: it is compared
//! to the bit with the first. Who is right, the caller finds out.

use std::collections::BTreeMap;

use super::call::{AnswerError, CallError, ExpertCall, ExpertRows, ExpertStep, MAX_CALL_BYTES, MAX_WORK, Work};
use super::map::{ExpertMap, HostId};
use crate::port::JobId;

/// A call to make; `id` is what its answer is booked under.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    pub id: u64,
    pub host: HostId,
    pub call: ExpertCall,
}

/// Two hosts gave different rows for the same question.
#[derive(Debug, Clone, PartialEq)]
pub struct Disagreement {
    pub hosts: [HostId; 2],
    pub rows: [Vec<f32>; 2],
    /// The question, of one row and one expert.
    pub question: ExpertCall,
    slot: usize,
}

/// A step in flight.
#[derive(Debug)]
pub struct InFlight {
    step: ExpertStep,
    width: usize,
    out: Vec<f32>,
    /// Who filled each slot.
    filled: Vec<Option<HostId>>,
    calls: BTreeMap<u64, Sent>,
    next_id: u64,
    call_bytes: usize,
    /// Answers of witnesses whose slot was not filled yet.
    witnessed: Vec<(HostId, usize, Vec<f32>)>,
}

#[derive(Debug)]
struct Sent {
    host: HostId,
    call: ExpertCall,
    /// The slot of each pair of the call's work.
    slots: Vec<usize>,
    witness: bool,
}

impl InFlight {
    /// Takes a step of a model with this width and so many experts.
    pub fn new(step: ExpertStep, width: u32, experts: u32) -> Result<Self, CallError> {
        step.check(width, experts)?;
        let slots = step.ids.len();
        let width = width as usize;
        let (out, filled) = (vec![0.0; slots * width], vec![None; slots]);
        Ok(Self {
            step,
            width,
            out,
            filled,
            calls: BTreeMap::new(),
            next_id: 0,
            call_bytes: MAX_CALL_BYTES,
            witnessed: Vec::new(),
        })
    }

    /// No call and no answer holds more bytes of rows than this.
    pub fn with_calls_of(mut self, bytes: usize) -> Self {
        self.call_bytes = bytes.min(MAX_CALL_BYTES);
        self
    }

    pub fn layer(&self) -> u32 {
        self.step.layer
    }

    /// The slots of the step: one for each (row, chosen expert).
    pub fn slots(&self) -> usize {
        self.filled.len()
    }

    /// Calls for all that nobody was asked yet; the error lists the experts that nobody holds.
    pub fn begin(&mut self, map: &ExpertMap) -> Result<Vec<Outgoing>, Vec<u32>> {
        let open = self.open_slots();
        self.ask(map, open)
    }

    /// The slots that are neither filled nor asked for.
    fn open_slots(&self) -> Vec<usize> {
        let mut open: Vec<bool> = self.filled.iter().map(Option::is_none).collect();
        for &slot in self.calls.values().filter(|sent| !sent.witness).flat_map(|sent| &sent.slots) {
            open[slot] = false;
        }
        (0..open.len()).filter(|slot| open[*slot]).collect()
    }

    /// Books an answer. The caller puts an error down to the host, and calls [`InFlight::lost`].
    pub fn answer(&mut self, id: u64, answer: ExpertRows) -> Result<Option<Disagreement>, AnswerError> {
        let Some(sent) = self.calls.get(&id) else { return Ok(None) };
        answer.check(&sent.call, u32::try_from(self.width).unwrap_or(u32::MAX))?;
        let Some(sent) = self.calls.remove(&id) else { return Ok(None) };
        if sent.witness {
            let Some(&slot) = sent.slots.first() else { return Ok(None) };
            self.witnessed.push((sent.host, slot, answer.rows));
        } else {
            for (row, &slot) in answer.rows.chunks_exact(self.width).zip(&sent.slots) {
                self.out[slot * self.width..(slot + 1) * self.width].copy_from_slice(row);
                self.filled[slot] = Some(sent.host);
            }
        }
        Ok(self.compare())
    }

    /// The first witness whose slot is filled with other bits.
    fn compare(&mut self) -> Option<Disagreement> {
        let mut found = None;
        let mut waiting = Vec::new();
        for (witness, slot, rows) in std::mem::take(&mut self.witnessed) {
            let first = &self.out[slot * self.width..(slot + 1) * self.width];
            match self.filled[slot] {
                None => waiting.push((witness, slot, rows)),
                Some(host) if found.is_none() && !same_bits(first, &rows) => {
                    let rows = [first.to_vec(), rows];
                    found = Some(Disagreement { hosts: [host, witness], rows, question: self.question(slot), slot });
                }
                Some(_) => {}
            }
        }
        self.witnessed = waiting;
        found
    }

    /// The call came to nothing: its work goes to whom the map now names. The error lists the experts that nobody holds;
    /// the work is then open, and [`InFlight::begin`] asks for it again.
    pub fn lost(&mut self, id: u64, map: &ExpertMap) -> Result<Vec<Outgoing>, Vec<u32>> {
        match self.calls.remove(&id) {
            Some(sent) if !sent.witness => self.ask(map, sent.slots),
            Some(_) | None => Ok(Vec::new()),
        }
    }

    /// A host lied: whatever it gave or was asked is asked again of others. Its answers that still come are ignored.
    pub fn distrust(&mut self, host: HostId, map: &ExpertMap) -> Result<Vec<Outgoing>, Vec<u32>> {
        self.calls.retain(|_, sent| sent.host != host);
        self.witnessed.retain(|(witness, ..)| *witness != host);
        for filled in self.filled.iter_mut().filter(|filled| **filled == Some(host)) {
            *filled = None;
        }
        let open = self.open_slots();
        self.ask(map, open)
    }

    /// A second call for a slot, to a holder who was not asked for it. `None` where there is no other.
    pub fn witness(&mut self, slot: usize, map: &ExpertMap) -> Option<Outgoing> {
        let expert = *self.step.ids.get(slot)?;
        let first = self.calls.values().find(|sent| !sent.witness && sent.slots.contains(&slot))?.host;
        let host = *map.holders(self.step.layer, expert).iter().find(|host| **host != first)?;
        let call = self.question(slot);
        let id = self.book(Sent { host, call: call.clone(), slots: vec![slot], witness: true });
        Some(Outgoing { id, host, call })
    }

    /// True when every slot is filled and every witness heard or lost.
    pub fn is_done(&self) -> bool {
        self.calls.is_empty() && self.filled.iter().all(Option::is_some)
    }

    /// Who gave each slot's row.
    pub fn filled(&self) -> &[Option<HostId>] {
        &self.filled
    }

    /// The rows in slot order, and who gave each.
    pub fn finish(self) -> (Vec<f32>, Vec<Option<HostId>>) {
        (self.out, self.filled)
    }

    pub fn ids(&self) -> &[u32] {
        &self.step.ids
    }

    /// The jobs of the step's rows, one each, or none.
    pub fn jobs(&self) -> &[JobId] {
        &self.step.jobs
    }

    fn question(&self, slot: usize) -> ExpertCall {
        let row = slot / self.step.used.max(1) as usize;
        let rows = self.step.rows[row * self.width..(row + 1) * self.width].to_vec();
        let work = vec![Work { row: 0, expert: self.step.ids[slot] }];
        let jobs = self.step.jobs.get(row).copied().into_iter().collect();
        ExpertCall { step: self.step.step, layer: self.step.layer, rows, work, jobs }
    }

    fn book(&mut self, sent: Sent) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.calls.insert(id, sent);
        id
    }

    /// Calls for these slots, each host's together, each row once, within the limits of a call.
    fn ask(&mut self, map: &ExpertMap, mut slots: Vec<usize>) -> Result<Vec<Outgoing>, Vec<u32>> {
        slots.sort_unstable();
        let mut rows: BTreeMap<u32, u64> = BTreeMap::new();
        for &slot in &slots {
            *rows.entry(self.step.ids[slot]).or_default() += 1;
        }
        let chosen = map.assign(self.step.layer, &rows)?;
        let mut by_host: BTreeMap<HostId, Vec<usize>> = BTreeMap::new();
        for slot in slots {
            if let Some(host) = chosen.get(&self.step.ids[slot]) {
                by_host.entry(*host).or_default().push(slot);
            }
        }
        let most = (self.call_bytes / (4 * self.width.max(1))).clamp(1, MAX_WORK);
        let mut outgoing = Vec::new();
        for (host, slots) in by_host {
            for slots in slots.chunks(most) {
                let call = self.call(slots);
                let id = self.book(Sent { host, call: call.clone(), slots: slots.to_vec(), witness: false });
                outgoing.push(Outgoing { id, host, call });
            }
        }
        Ok(outgoing)
    }

    fn call(&self, slots: &[usize]) -> ExpertCall {
        let used = self.step.used.max(1) as usize;
        let (mut rows, mut work, mut index, mut last) = (Vec::new(), Vec::with_capacity(slots.len()), 0, None);
        let mut jobs = Vec::new();
        for &slot in slots {
            let row = slot / used;
            // Slots rise, so equal rows are neighbours.
            if last != Some(row) {
                index += u32::from(last.is_some());
                rows.extend_from_slice(&self.step.rows[row * self.width..(row + 1) * self.width]);
                jobs.extend(self.step.jobs.get(row));
                last = Some(row);
            }
            work.push(Work { row: index, expert: self.step.ids[slot] });
        }
        ExpertCall { step: self.step.step, layer: self.step.layer, rows, work, jobs }
    }
}

impl Disagreement {
    /// Of the two, those who did not say what `truth` says.
    pub fn wrong(&self, truth: &[f32]) -> Vec<HostId> {
        let pairs = self.hosts.iter().zip(&self.rows);
        pairs.filter(|(_, rows)| !same_bits(rows, truth)).map(|(host, _)| *host).collect()
    }

    /// What shows that a host lied, for who keeps it: canonical CBOR of the model's root, layer, expert, the question's row, the
    /// row that the host gave and the row that the others compute, as bytes of 32-bit numbers. Whoever holds the model
    /// can compute the question again; that the host gave this row is the lead's word.
    pub fn statement(&self, root: &[u8; 32], liar: HostId) -> Vec<u8> {
        let [a, b] = &self.rows;
        let (given, other) = if self.hosts.first() == Some(&liar) { (a, b) } else { (b, a) };
        let bytes = |rows: &[f32]| -> Vec<u8> { rows.iter().flat_map(|number| number.to_le_bytes()).collect() };
        let (question, given, other) = (bytes(&self.question.rows), bytes(given), bytes(other));
        let mut out = Vec::new();
        let mut encoder = minicbor::Encoder::new(&mut out);
        // Writing to memory does not fail.
        let _ = (|| {
            encoder.array(6)?.bytes(root)?.u32(self.question.layer)?.u32(self.expert())?;
            encoder.bytes(&question)?.bytes(&given)?.bytes(&other)?.ok()
        })();
        out
    }

    pub fn expert(&self) -> u32 {
        self.question.work.first().map_or(0, |work| work.expert)
    }

    pub fn slot(&self) -> usize {
        self.slot
    }
}

/// Equal to the bit: zero and minus zero are not.
pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
