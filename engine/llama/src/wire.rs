//! What the node and its engine process say to each other over a local socket.
//!
//! A frame is a length (4 bytes, big endian, at most [`MAX_FRAME`]) and one CBOR value. The process connects, tells how its
//! load goes, and then either `Ready` or `LoadFailed`; after `Ready` both sides speak when they like. End of file from
//! either side is the other's sign to go.

use std::io;

use minicbor::{Decode, Encode};
use satgrid_engine::experts::{CallError, ExpertCall, ExpertRows, ExpertStep};
use satgrid_engine::port::{Command, EngineEvent, EngineFacts, Profile, SpecialTokens, TokenizerError};
use satgrid_engine::stage::port::{StageCommand, StageEvent, StageFacts};
use satgrid_engine::stage::ring::{RingCommand, RingEvent};
use satgrid_engine::template::{ChatOrder, Prompt, TemplateError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes in one frame. The longest is a vocabulary's table of pieces, or a prompt of a very long context.
pub(crate) const MAX_FRAME: u32 = 64 * 1024 * 1024;
/// Both ends come from one binary; this catches a worker of another version.
pub(crate) const VERSION: u32 = 4;

/// From the node to the process.
#[derive(Debug, Encode, Decode)]
pub(crate) enum ToWorker {
    #[n(0)]
    Command(#[n(0)] Command),
    #[n(1)]
    Tokenize {
        #[n(0)]
        text: String,
        #[n(1)]
        add_special: bool,
        #[n(2)]
        parse_special: bool,
    },
    /// The names of tokens, control tokens too. Plain pieces are in the table that came with `Ready`.
    #[n(2)]
    Names {
        #[n(0)]
        ids: Vec<u32>,
    },
    /// To a process that holds some layers.
    #[n(3)]
    Stage(#[n(0)] StageCommand),
    /// To a lead's process, from the ring.
    #[n(4)]
    Ring(#[n(0)] RingEvent),
    /// To a trunk: what it asked for by `ExpertStep`, or why there is nothing.
    #[n(5)]
    ExpertOutputs(#[n(0)] Result<ExpertRows, String>),
    /// To the keeper of a pack; answered in any order.
    #[n(6)]
    ExpertCall {
        #[n(0)]
        id: u64,
        #[n(1)]
        call: ExpertCall,
    },
    /// To a tokenizer: its chat template over a conversation.
    #[n(7)]
    Render(#[n(0)] ChatOrder),
}

/// From the process to the node.
#[derive(Debug, Encode, Decode)]
pub(crate) enum FromWorker {
    /// The load has come this far, in thousandths.
    #[n(0)]
    Loading {
        #[n(0)]
        permille: u32,
    },
    #[n(1)]
    LoadFailed {
        #[n(0)]
        reason: String,
    },
    #[n(2)]
    EngineReady(#[n(0)] Box<EngineFacts>),
    #[n(3)]
    TokenizerReady(#[n(0)] Box<VocabFacts>),
    /// Events of one batch, in order.
    #[n(4)]
    Events(#[n(0)] Vec<EngineEvent>),
    #[n(5)]
    Tokenized(#[n(0)] Result<Vec<u32>, TokenizerError>),
    #[n(6)]
    Named(#[n(0)] Result<Vec<PieceBytes>, TokenizerError>),
    #[n(7)]
    StageReady(#[n(0)] Box<StageFacts>),
    #[n(8)]
    StageEvents(#[n(0)] Vec<StageEvent>),
    /// From a lead's process, to the ring.
    #[n(9)]
    Ring(#[n(0)] RingCommand),
    /// A trunk waits for these rows in the middle of a batch; one step at a time.
    #[n(10)]
    ExpertStep(#[n(0)] ExpertStep),
    #[n(11)]
    ExpertAnswer {
        #[n(0)]
        id: u64,
        #[n(1)]
        answer: Result<ExpertRows, CallFailure>,
    },
    #[n(12)]
    PackReady(#[n(0)] Box<PackFacts>),
    #[n(13)]
    Rendered(#[n(0)] Result<Prompt, TemplateError>),
}

/// Why a pack's process gave no rows.
#[derive(Debug, Encode, Decode)]
pub(crate) enum CallFailure {
    #[n(0)]
    Refused(#[n(0)] CallError),
    #[n(1)]
    Failed(#[n(0)] String),
}

/// What a pack holds, and the build that evaluates it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PackFacts {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub model_root: [u8; 32],
    /// Each held (layer, expert), with the hash of its weights.
    #[n(1)]
    pub experts: Vec<HeldExpert>,
    /// Width of a row.
    #[n(2)]
    pub n_embd: u32,
    /// Layers of the whole model.
    #[n(3)]
    pub layers: u32,
    /// Experts of each of its layers.
    #[n(4)]
    pub experts_per_layer: u32,
    /// Experts for each row.
    #[n(5)]
    pub used: u32,
    /// Bytes of the held weights.
    #[n(6)]
    pub bytes: u64,
    #[n(7)]
    pub profile: Profile,
    #[cbor(n(8), with = "minicbor::bytes")]
    pub build_id: [u8; 32],
    #[n(9)]
    pub instruction_set: String,
    /// Measured at start: thousandths of a row per second, one at a time.
    #[n(10)]
    pub millirows_per_s: u64,
}

/// One expert of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct HeldExpert {
    #[n(0)]
    pub layer: u32,
    #[n(1)]
    pub expert: u32,
    #[cbor(n(2), with = "minicbor::bytes")]
    pub hash: [u8; 32],
}

/// What a tokenizer process reads from its file once.
#[derive(Debug, Encode, Decode)]
pub(crate) struct VocabFacts {
    #[n(0)]
    pub(crate) version: u32,
    #[n(1)]
    pub(crate) special: SpecialTokens,
    #[n(2)]
    pub(crate) chat_template: Option<String>,
    #[n(3)]
    pub(crate) pieces: PieceTable,
}

/// The bytes of one token.
#[derive(Debug, Encode, Decode)]
#[cbor(transparent)]
pub(crate) struct PieceBytes(#[cbor(n(0), with = "minicbor::bytes")] pub(crate) Vec<u8>);

/// The plain pieces of a whole vocabulary: all bytes in a row, and where each piece ends. For 262,144 tokens about 3 MB.
#[derive(Debug, Default, Encode, Decode)]
pub(crate) struct PieceTable {
    #[cbor(n(0), with = "minicbor::bytes")]
    bytes: Vec<u8>,
    /// Ends, as 4 bytes each in little endian.
    #[cbor(n(1), with = "minicbor::bytes")]
    ends: Vec<u8>,
}

impl PieceTable {
    pub(crate) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        let end = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.ends.extend_from_slice(&end.to_le_bytes());
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.ends.len() / 4).unwrap_or(u32::MAX)
    }

    /// The bytes of a token; `None` outside the vocabulary (and in a table that contradicts itself).
    pub(crate) fn get(&self, token: u32) -> Option<&[u8]> {
        let end = |index: usize| -> Option<usize> {
            let bytes = self.ends.get(index * 4..index * 4 + 4)?;
            usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
        };
        let index = usize::try_from(token).ok()?;
        let from = if index == 0 { 0 } else { end(index - 1)? };
        self.bytes.get(from..end(index)?)
    }
}

/// A message as the bytes of a frame.
pub(crate) fn encode<T: Encode<()>>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0_u8; 4];
    minicbor::encode(message, &mut frame).map_err(|error| io::Error::other(error.to_string()))?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|&length| length <= MAX_FRAME);
    let length = length.ok_or_else(|| io::Error::other(format!("a message of {} bytes is too long", frame.len())))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// The next of these frames, which is taken off them; `None` if it is not all there.
pub(crate) fn next_of<T: for<'b> Decode<'b, ()>>(frames: &mut &[u8]) -> io::Result<Option<T>> {
    let Some((length, rest)) = frames.split_first_chunk::<4>() else { return Ok(None) };
    let Some((body, rest)) = rest.split_at_checked(check_length(*length)?) else { return Ok(None) };
    let message = decode(body)?;
    *frames = rest;
    Ok(Some(message))
}

/// How many bytes the first of these frames lacks, as far as its beginning tells.
pub(crate) fn missing(frames: &[u8]) -> io::Result<usize> {
    match frames.split_first_chunk::<4>() {
        Some((length, rest)) => Ok(check_length(*length)?.saturating_sub(rest.len())),
        None => Ok(4 - frames.len()),
    }
}

/// Reads a message, on the node's side; `None` at the end of the stream. Not safe to cancel in the middle of a frame.
pub(crate) async fn read_async<T: for<'b> Decode<'b, ()>>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut length = [0_u8; 4];
    match from.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut body = vec![0_u8; check_length(length)?];
    from.read_exact(&mut body).await?;
    decode(&body).map(Some)
}

fn check_length(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(length);
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is over {MAX_FRAME}"),
        ));
    }
    usize::try_from(length).map_err(io::Error::other)
}

fn decode<T: for<'b> Decode<'b, ()>>(body: &[u8]) -> io::Result<T> {
    minicbor::decode(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

#[cfg(test)]
mod tests {
    use satgrid_engine::port::JobId;

    use super::*;

    #[test]
    fn a_frame_reads_back() {
        let first = encode(&ToWorker::Command(Command::Cancel { job: JobId(7) })).unwrap();
        let second = encode(&ToWorker::Names { ids: vec![1, 2, 300] }).unwrap();
        let bytes = [first.as_slice(), &second].concat();
        for whole in 0..bytes.len() {
            let mut frames = &bytes[..whole];
            let heard = std::iter::from_fn(|| next_of::<ToWorker>(&mut frames).unwrap()).count();
            assert_eq!(heard, usize::from(whole >= first.len()));
            let left = if whole < 4 { 4 } else { first.len() };
            assert_eq!(missing(&bytes[..whole]).unwrap(), left.saturating_sub(whole));
        }
        let mut frames = bytes.as_slice();
        let first: ToWorker = next_of(&mut frames).unwrap().unwrap();
        assert!(matches!(first, ToWorker::Command(Command::Cancel { job: JobId(7) })));
        let second: ToWorker = next_of(&mut frames).unwrap().unwrap();
        assert!(matches!(second, ToWorker::Names { ids } if ids == [1, 2, 300]));
        assert!(frames.is_empty() && next_of::<ToWorker>(&mut frames).unwrap().is_none());
    }

    #[test]
    fn bad_frames_are_errors() {
        let long = (MAX_FRAME + 1).to_be_bytes();
        let rows: [(&[u8], &str); 3] = [(&long, "over"), (&[0, 0, 0, 1, 0xff], ""), (&[0, 0, 0, 0], "")];
        for (bytes, expect) in rows {
            let error = next_of::<ToWorker>(&mut { bytes }).unwrap_err().to_string();
            assert!(error.contains(expect), "{bytes:?}: {error}");
        }
    }

    #[test]
    fn a_piece_table_gives_back_what_was_pushed() {
        let mut table = PieceTable::default();
        let pieces: [&[u8]; 4] = [b"", b"one", b"\xe2\x82", b""];
        pieces.iter().for_each(|piece| table.push(piece));
        assert_eq!(table.len(), 4);
        for (token, piece) in (0..).zip(pieces) {
            assert_eq!(table.get(token), Some(piece));
        }
        assert_eq!(table.get(4), None);
        let torn = PieceTable { bytes: vec![1, 2], ends: vec![9, 0, 0, 0, 1, 0, 0, 0] };
        assert_eq!((torn.get(0), torn.get(1)), (None, None));
    }
}
