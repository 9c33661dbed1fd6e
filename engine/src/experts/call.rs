//! A layer's question and its answer, with their limits, and whose fault each error is.
//!
//! | word            | from, to            | holds                                                                   |
//! |-----------------|---------------------|-------------------------------------------------------------------------|
//! | [`ExpertStep`]  | trunk to its lead   | all rows of a batch at one layer, and the experts that the router chose  |
//! | [`ExpertCall`]  | lead to one host    | each row of that host once, and which expert evaluates which row          |
//! | [`ExpertRows`]  | host to lead        | one output row for each such pair, in the call's order                    |

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

use crate::port::JobId;

/// Most rows in one step or call: the most positions that an engine evaluates at once.
pub const MAX_ROWS: usize = 512;
/// Most bytes of rows in a call or in its answer. A step that needs more is asked in several calls.
pub const MAX_CALL_BYTES: usize = 8 << 20;
/// Most (row, expert) pairs in one call.
pub const MAX_WORK: usize = 8_192;

/// What a trunk asks at one layer.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ExpertStep {
    /// Counts the trunk's batches.
    #[n(0)]
    pub step: u64,
    #[n(1)]
    pub layer: u32,
    /// Experts for each row.
    #[n(2)]
    pub used: u32,
    /// `used` experts for each row.
    #[n(3)]
    pub ids: Vec<u32>,
    #[cbor(n(4), with = "floats")]
    pub rows: Vec<f32>,
    /// Whose each row is; empty where no job asks: an engine that measures itself.
    #[n(5)]
    pub jobs: Vec<JobId>,
}

/// What a lead asks one host.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
pub struct ExpertCall {
    #[n(0)]
    pub step: u64,
    #[n(1)]
    pub layer: u32,
    #[cbor(n(2), with = "floats")]
    pub rows: Vec<f32>,
    #[n(3)]
    pub work: Vec<Work>,
    /// Whose each row is; empty where no job asks. Who is paid for rows charges them to these.
    #[n(4)]
    pub jobs: Vec<JobId>,
}

/// One row through one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct Work {
    /// Index of the row in its call.
    #[n(0)]
    pub row: u32,
    #[n(1)]
    pub expert: u32,
}

/// A host's answer: an output row for each pair of the call's work.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ExpertRows {
    #[n(0)]
    pub step: u64,
    #[n(1)]
    pub layer: u32,
    #[cbor(n(2), with = "floats")]
    pub rows: Vec<f32>,
}

/// What is wrong with a step or a call: the asker's fault, and nothing was evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum CallError {
    #[error("the call asks for nothing")]
    #[n(0)]
    Empty,
    #[error("{given} {what}, at most {limit} are allowed in one call")]
    #[n(1)]
    OverLimit {
        #[n(0)]
        what: String,
        #[n(1)]
        given: u64,
        #[n(2)]
        limit: u64,
    },
    #[error("{given} numbers are not whole rows of {width}")]
    #[n(2)]
    Width {
        #[n(0)]
        given: u64,
        #[n(1)]
        width: u32,
    },
    #[error("row {row} holds a number that is not finite")]
    #[n(3)]
    NotFinite {
        #[n(0)]
        row: u32,
    },
    #[error("work on row {row}, but there are only {rows}")]
    #[n(4)]
    NoSuchRow {
        #[n(0)]
        row: u32,
        #[n(1)]
        rows: u32,
    },
    #[error("expert {expert} of layer {layer} is not held here")]
    #[n(5)]
    NotHeld {
        #[n(0)]
        layer: u32,
        #[n(1)]
        expert: u32,
    },
    #[error("{given} experts for {rows} rows of {used} each")]
    #[n(6)]
    Ids {
        #[n(0)]
        given: u64,
        #[n(1)]
        rows: u64,
        #[n(2)]
        used: u32,
    },
    #[error("{given} jobs for {rows} rows")]
    #[n(7)]
    Jobs {
        #[n(0)]
        given: u64,
        #[n(1)]
        rows: u64,
    },
}

/// What is wrong with an answer: the host's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    #[error("it answered step {step}, layer {layer} when it was asked step {asked_step}, layer {asked_layer}")]
    OtherCall { step: u64, layer: u32, asked_step: u64, asked_layer: u32 },
    #[error("it gave {given} numbers where {expected} were asked")]
    Length { given: u64, expected: u64 },
    #[error("its row for expert {expert} of layer {layer} holds a number that is not finite")]
    NotFinite { layer: u32, expert: u32 },
}

/// Why a host gave no rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Ours: the host was asked for what it never offered.
    #[error("the call was refused: {0}")]
    Refused(CallError),
    /// The host's.
    #[error("{0}")]
    Answer(#[from] AnswerError),
    /// The host's or the network's.
    #[error("it is gone: {reason}")]
    Gone { reason: String },
    #[error("it gave no answer within {ms} ms")]
    Late { ms: u64 },
    /// Ours: no job asks, so nobody would pay it.
    #[error("it is paid for its work, and no job asks for this")]
    Unpaid,
}

/// Why a step came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    #[error("the trunk asked wrongly: {0}")]
    BadStep(CallError),
    #[error("nobody is left who holds experts {experts:?} of layer {layer}{}", because(.reason))]
    NoHost { layer: u32, experts: Vec<u32>, reason: Option<String> },
    #[error("{host} refused a call that it should serve: {error}")]
    Refused { host: String, error: CallError },
    #[error("{host} is paid for its work, and no job asks for this")]
    Unpaid { host: String },
}

fn because(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}

fn over(what: &str, given: usize, limit: usize) -> Result<(), CallError> {
    if given <= limit {
        return Ok(());
    }
    Err(CallError::OverLimit { what: what.to_owned(), given: given as u64, limit: limit as u64 })
}

/// A job for each row, or none at all.
fn check_jobs(jobs: &[JobId], rows: usize) -> Result<(), CallError> {
    if jobs.is_empty() || jobs.len() == rows {
        return Ok(());
    }
    Err(CallError::Jobs { given: jobs.len() as u64, rows: rows as u64 })
}

/// Rows of this width in these numbers, all of them finite.
fn count_rows(numbers: &[f32], width: u32) -> Result<usize, CallError> {
    let wide = width.max(1) as usize;
    if !numbers.len().is_multiple_of(wide) {
        return Err(CallError::Width { given: numbers.len() as u64, width });
    }
    if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
        return Err(CallError::NotFinite { row: u32::try_from(at / wide).unwrap_or(u32::MAX) });
    }
    Ok(numbers.len() / wide)
}

impl ExpertStep {
    /// The number of rows, if the step is one of a model with this width and so many experts.
    pub fn check(&self, width: u32, experts: u32) -> Result<usize, CallError> {
        let rows = count_rows(&self.rows, width)?;
        if rows == 0 {
            return Err(CallError::Empty);
        }
        over("rows", rows, MAX_ROWS)?;
        if self.used == 0 || self.ids.len() != rows * self.used as usize {
            return Err(CallError::Ids { given: self.ids.len() as u64, rows: rows as u64, used: self.used });
        }
        check_jobs(&self.jobs, rows)?;
        match self.ids.iter().find(|expert| **expert >= experts) {
            Some(&expert) => Err(CallError::NotHeld { layer: self.layer, expert }),
            None => Ok(rows),
        }
    }
}

impl ExpertCall {
    /// What a host checks before it computes: the number of rows.
    pub fn check(&self, width: u32, held: &BTreeMap<u32, Vec<u32>>) -> Result<usize, CallError> {
        over("bytes of rows", self.rows.len().saturating_mul(4), MAX_CALL_BYTES)?;
        over("pairs of row and expert", self.work.len(), MAX_WORK)?;
        over("bytes of answer", self.work.len().saturating_mul(width as usize * 4), MAX_CALL_BYTES)?;
        let rows = count_rows(&self.rows, width)?;
        over("rows", rows, MAX_ROWS)?;
        check_jobs(&self.jobs, rows)?;
        if rows == 0 || self.work.is_empty() {
            return Err(CallError::Empty);
        }
        let held = held.get(&self.layer).map(Vec::as_slice).unwrap_or_default();
        for work in &self.work {
            if work.row as usize >= rows {
                return Err(CallError::NoSuchRow { row: work.row, rows: u32::try_from(rows).unwrap_or(u32::MAX) });
            }
            if held.binary_search(&work.expert).is_err() {
                return Err(CallError::NotHeld { layer: self.layer, expert: work.expert });
            }
        }
        Ok(rows)
    }
}

impl ExpertRows {
    /// What a lead checks before it uses an answer.
    pub fn check(&self, call: &ExpertCall, width: u32) -> Result<(), AnswerError> {
        let (step, layer, asked_step, asked_layer) = (self.step, self.layer, call.step, call.layer);
        if (step, layer) != (asked_step, asked_layer) {
            return Err(AnswerError::OtherCall { step, layer, asked_step, asked_layer });
        }
        let (given, expected) = (self.rows.len() as u64, call.work.len() as u64 * u64::from(width));
        if given != expected {
            return Err(AnswerError::Length { given, expected });
        }
        for (row, work) in self.rows.chunks(width.max(1) as usize).zip(&call.work) {
            if row.iter().any(|number| !number.is_finite()) {
                return Err(AnswerError::NotFinite { layer, expert: work.expert });
            }
        }
        Ok(())
    }
}

/// Numbers as bytes, four each, little-endian.
mod floats {
    use minicbor::decode::Error as DecodeError;
    use minicbor::encode::{Error as EncodeError, Write};
    use minicbor::{Decoder, Encoder};

    pub(super) fn encode<C, W: Write>(
        numbers: &[f32],
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), EncodeError<W::Error>> {
        let mut bytes = Vec::with_capacity(numbers.len() * 4);
        for number in numbers {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        e.bytes(&bytes)?.ok()
    }

    pub(super) fn decode<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<Vec<f32>, DecodeError> {
        let (chunks, rest) = d.bytes()?.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(DecodeError::message("bytes that are no whole numbers"));
        }
        Ok(chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(rows: usize, work: &[(u32, u32)]) -> ExpertCall {
        let work = work.iter().map(|&(row, expert)| Work { row, expert }).collect();
        ExpertCall { step: 7, layer: 1, rows: vec![0.5; rows * 4], work, jobs: Vec::new() }
    }

    #[test]
    fn a_host_refuses_what_it_cannot_serve() {
        let held = BTreeMap::from([(1, vec![2, 5])]);
        let check = |call: &ExpertCall| call.check(4, &held).map_err(|error| error.to_string());
        assert_eq!(check(&call(2, &[(0, 2), (1, 5), (1, 2)])), Ok(2));
        let mut torn = call(1, &[(0, 2)]);
        torn.rows.pop();
        let mut nan = call(2, &[(0, 2)]);
        nan.rows[5] = f32::NAN;
        let rows = [
            (call(0, &[]), "nothing"),
            (call(1, &[]), "nothing"),
            (call(1, &[(1, 2)]), "row 1, but there are only 1"),
            (call(1, &[(0, 3)]), "expert 3 of layer 1 is not held"),
            (ExpertCall { layer: 0, ..call(1, &[(0, 2)]) }, "expert 2 of layer 0 is not held"),
            (torn, "3 numbers are not whole rows of 4"),
            (nan, "row 1 holds a number that is not finite"),
            (call(MAX_ROWS + 1, &[(0, 2)]), "513 rows, at most 512"),
            (ExpertCall { jobs: vec![JobId(1)], ..call(2, &[(0, 2)]) }, "1 jobs for 2 rows"),
            (call(1, &vec![(0, 2); MAX_WORK + 1]), "pairs of row and expert"),
            (ExpertCall { rows: vec![0.0; MAX_CALL_BYTES / 4 + 4], ..call(1, &[(0, 2)]) }, "bytes of rows"),
        ];
        for (call, expect) in rows {
            let error = check(&call).unwrap_err();
            assert!(error.contains(expect), "{error:?} has no {expect:?}");
        }
    }

    #[test]
    fn a_lead_refuses_what_it_did_not_ask() {
        let call = call(1, &[(0, 2), (0, 5)]);
        let answer = ExpertRows { step: 7, layer: 1, rows: vec![1.0; 8] };
        assert_eq!(answer.check(&call, 4), Ok(()));
        let mut infinite = answer.clone();
        infinite.rows[6] = f32::INFINITY;
        let rows = [
            (ExpertRows { step: 8, ..answer.clone() }, "step 8"),
            (ExpertRows { layer: 0, ..answer.clone() }, "layer 0"),
            (ExpertRows { rows: vec![1.0; 7], ..answer.clone() }, "7 numbers where 8"),
            (infinite, "expert 5 of layer 1"),
        ];
        for (answer, expect) in rows {
            let error = answer.check(&call, 4).unwrap_err().to_string();
            assert!(error.contains(expect), "{error:?} has no {expect:?}");
        }
    }

    #[test]
    fn a_trunk_asks_for_whole_rows_of_real_experts() {
        let step =
            ExpertStep { step: 0, layer: 0, used: 2, ids: vec![0, 3, 1, 2], rows: vec![0.0; 8], jobs: Vec::new() };
        assert_eq!(step.check(4, 4), Ok(2));
        assert_eq!(step.check(4, 3), Err(CallError::NotHeld { layer: 0, expert: 3 }));
        assert!(matches!(step.check(2, 4), Err(CallError::Ids { .. })));
        assert!(matches!(step.check(3, 4), Err(CallError::Width { .. })));
    }

    #[test]
    fn words_read_back() {
        let call = call(2, &[(0, 2), (1, 5)]);
        let bytes = minicbor::to_vec(&call).unwrap();
        assert_eq!(minicbor::decode::<ExpertCall>(&bytes).unwrap(), call);
        // 2 rows of 16 bytes and little else.
        assert!(bytes.len() < 64, "{}", bytes.len());
    }
}
