//! The child's end of the socket to its node, read and written by the thread that computes.
//!
//! A thread of its own for reading would cost a wake-up for every word, which is as long as a few rows take to compute. What comes
//! meanwhile waits in the socket, and what has no room there holds up the node's writer, never its reader. A word that has no
//! room on the way out goes on while what comes is taken in: two ends that both speak never wait for each other.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use satgrid_engine::experts::ExpertRows;

use crate::wire::{self, FromWorker, ToWorker};

/// Bytes read at once where no longer frame is on its way.
const READ: usize = 64 * 1024;

/// An error of kind `UnexpectedEof` says that the node is gone, `InvalidData` that its words do not parse.
pub(crate) struct Socket {
    stream: UnixStream,
    /// What came; up to `taken` it was decoded.
    bytes: Vec<u8>,
    taken: usize,
    /// Words that came while a trunk waited for its rows.
    kept: VecDeque<ToWorker>,
}

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, bytes: Vec::new(), taken: 0, kept: VecDeque::new() }
    }

    pub(crate) fn send(&mut self, message: &FromWorker) -> io::Result<()> {
        let frame = wire::encode(message)?;
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            match send(&self.stream, rest, SendFlags::DONTWAIT) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self.until(PollFlags::IN | PollFlags::OUT, None)?.contains(PollFlags::IN) {
                        self.take_in(RecvFlags::DONTWAIT)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next word, however long that takes.
    pub(crate) fn wait(&mut self) -> io::Result<ToWorker> {
        match self.kept.pop_front() {
            Some(word) => Ok(word),
            None => self.read(),
        }
    }

    /// The next word; `None` if there is none within the time.
    pub(crate) fn next(&mut self, within: Duration) -> io::Result<Option<ToWorker>> {
        if let Some(word) = self.kept.pop_front() {
            return Ok(Some(word));
        }
        let until = Instant::now() + within;
        loop {
            if let Some(word) = self.decoded()? {
                return Ok(Some(word));
            }
            let left = until.saturating_duration_since(Instant::now());
            let more = self.take_in(RecvFlags::DONTWAIT)?;
            if !more && (left.is_zero() || self.until(PollFlags::IN, Some(left))?.is_empty()) {
                return Ok(None);
            }
        }
    }

    /// What a trunk asked for in the middle of a batch. Other words are kept for [`Socket::next`].
    pub(crate) fn outputs(&mut self) -> io::Result<Result<ExpertRows, String>> {
        loop {
            let word = self.read()?;
            if let ToWorker::ExpertOutputs(outputs) = word {
                return Ok(outputs);
            }
            self.kept.push_back(word);
        }
    }

    fn read(&mut self) -> io::Result<ToWorker> {
        loop {
            if let Some(word) = self.decoded()? {
                return Ok(word);
            }
            self.take_in(RecvFlags::empty())?;
        }
    }

    /// The first word of what came, if it is there whole.
    fn decoded(&mut self) -> io::Result<Option<ToWorker>> {
        let mut frames = self.bytes.get(self.taken..).unwrap_or_default();
        let word = wire::next_of(&mut frames)?;
        self.taken = self.bytes.len() - frames.len();
        Ok(word)
    }

    /// Reads what is there; false if nothing is.
    fn take_in(&mut self, flags: RecvFlags) -> io::Result<bool> {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.reserve(wire::missing(&self.bytes)?.max(READ));
        loop {
            return match recv(&self.stream, spare_capacity(&mut self.bytes), flags) {
                Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => Ok(true),
                Err(Errno::AGAIN) => Ok(false),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Waits until one of these may be done, or the time is over: then empty.
    fn until(&self, flags: PollFlags, wait: Option<Duration>) -> io::Result<PollFlags> {
        let wait = wait.map(|wait| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        });
        let mut ends = [PollFd::new(&self.stream, flags)];
        match poll(&mut ends, wait.as_ref()) {
            Ok(_) => Ok(ends[0].revents()),
            Err(Errno::INTR) => Ok(PollFlags::empty()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Socket::new(ours), theirs)
    }

    fn names(ids: impl IntoIterator<Item = u32>) -> ToWorker {
        ToWorker::Names { ids: ids.into_iter().collect() }
    }

    fn ids(word: ToWorker) -> Vec<u32> {
        let ToWorker::Names { ids } = word else { panic!("{word:?}") };
        ids
    }

    #[test]
    fn words_come_in_order_however_they_are_cut() {
        let (mut socket, mut node) = pair();
        let frames = [names([1]), names(0..100_000), names([])].map(|word| wire::encode(&word).unwrap()).concat();
        let writing = std::thread::spawn(move || {
            for (n, piece) in frames.chunks(30_011).enumerate() {
                if n < 2 {
                    std::thread::sleep(Duration::from_millis(20));
                }
                node.write_all(piece).unwrap();
            }
            node
        });
        assert!(socket.next(Duration::ZERO).unwrap().is_none());
        assert_eq!(ids(socket.wait().unwrap()), [1]);
        assert_eq!(ids(socket.next(Duration::from_secs(60)).unwrap().unwrap()).len(), 100_000);
        assert!(ids(socket.wait().unwrap()).is_empty());
        let node = writing.join().unwrap();
        let since = Instant::now();
        assert!(socket.next(Duration::from_millis(30)).unwrap().is_none());
        assert!(since.elapsed() >= Duration::from_millis(30));
        drop(node);
        assert_eq!(socket.wait().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn other_words_are_kept_while_a_trunk_waits() {
        let (mut socket, mut node) = pair();
        let rows = ExpertRows { step: 1, layer: 2, rows: vec![0.5; 3] };
        for word in [names([1]), ToWorker::ExpertOutputs(Ok(rows.clone())), names([2])] {
            node.write_all(&wire::encode(&word).unwrap()).unwrap();
        }
        assert_eq!(socket.outputs().unwrap(), Ok(rows));
        assert_eq!(ids(socket.wait().unwrap()), [1]);
        assert_eq!(ids(socket.wait().unwrap()), [2]);
        node.write_all(&[0, 0, 0, 1, 0xff]).unwrap();
        assert_eq!(socket.outputs().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_node_that_dies_in_the_middle_of_a_word_is_gone() {
        let (mut socket, mut node) = pair();
        let frame = wire::encode(&names(0..1_000)).unwrap();
        node.write_all(&frame[..frame.len() - 1]).unwrap();
        assert!(socket.next(Duration::ZERO).unwrap().is_none());
        drop(node);
        assert_eq!(socket.wait().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    /// More than the sockets hold, both ways at once, by a node that reads nothing until its own word is out.
    #[test]
    fn two_that_speak_at_once_do_not_wait_for_each_other() {
        let (mut socket, mut node) = pair();
        let said = wire::encode(&names(0..2_000_000)).unwrap();
        let reason = "x".repeat(8 << 20);
        let answer = wire::encode(&FromWorker::LoadFailed { reason: reason.clone() }).unwrap();
        let other = std::thread::spawn(move || {
            node.write_all(&said).unwrap();
            let mut heard = vec![0; answer.len()];
            node.read_exact(&mut heard).unwrap();
            assert!(heard == answer);
        });
        socket.send(&FromWorker::LoadFailed { reason }).unwrap();
        assert_eq!(ids(socket.wait().unwrap()).len(), 2_000_000);
        other.join().unwrap();
        assert!(socket.send(&FromWorker::Loading { permille: 1 }).is_err());
    }
}
