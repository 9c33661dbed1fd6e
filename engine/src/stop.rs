//! Stop strings: the text ends before the first one, and no byte of it ever leaks.
//!
//! Matching is on bytes, so a stop string may straddle any number of tokens. Bytes that could still be the beginning
//! of a stop string are held back until that is decided. The match that completes first wins; of two that complete on
//! the same byte, the longer.

use std::collections::VecDeque;

use crate::utf8::Utf8Stream;

/// One stop string and how much of it the latest bytes match (Knuth, Morris, Pratt).
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `fallback[n]`: the longest proper border of the first `n + 1` bytes.
    fallback: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes[at] != bytes[border] {
                border = fallback[border - 1];
            }
            if bytes[at] == bytes[border] {
                border += 1;
            }
            fallback[at] = border;
        }
        Self { bytes, fallback, matched: 0 }
    }

    /// True once the whole string is matched.
    fn feed(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

/// Watches a stream of bytes for stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: Vec<u8>,
    stopped: bool,
}

impl StopMatcher {
    /// Empty strings are left out: they would match before anything was said.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let patterns = stops.iter().map(AsRef::as_ref).filter(|stop| !stop.is_empty()).map(Pattern::new).collect();
        Self { patterns, ..Self::default() }
    }

    /// Takes the next bytes; returns those that may be emitted. After a match nothing comes any more.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.stopped {
            return Vec::new();
        }
        for &byte in bytes {
            self.held.push(byte);
            let mut longest = 0;
            for pattern in &mut self.patterns {
                if pattern.feed(byte) {
                    longest = longest.max(pattern.matched);
                }
            }
            if longest > 0 {
                self.stopped = true;
                let keep = self.held.len().saturating_sub(longest);
                self.held.truncate(keep);
                return std::mem::take(&mut self.held);
            }
        }
        let open = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let sure = self.held.len().saturating_sub(open);
        self.held.drain(..sure).collect()
    }

    /// The end of the stream: what was held back is no stop string after all.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// A stop string has been completed.
    pub fn stopped(&self) -> bool {
        self.stopped
    }
}

/// Token pieces to text: stop strings cut, every part valid UTF-8.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    stop: StopMatcher,
    utf8: Utf8Stream,
    /// Bytes taken in, and those of them that no stop string can cut any more.
    taken: usize,
    sure: usize,
}

impl TextStream {
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        Self { stop: StopMatcher::new(stops), ..Self::default() }
    }

    /// Takes one token's piece; returns the text that may be shown now.
    pub fn push(&mut self, piece: &[u8]) -> String {
        let sure = self.stop.push(piece);
        self.taken += piece.len();
        self.sure += sure.len();
        self.utf8.push(&sure)
    }

    /// The text that was still held back, when no more tokens come.
    pub fn finish(&mut self) -> String {
        let sure = self.stop.finish();
        self.sure += sure.len();
        let mut text = self.utf8.push(&sure);
        text += &self.utf8.finish();
        text
    }

    pub fn stopped(&self) -> bool {
        self.stop.stopped()
    }
}

/// What is told of tokens beside their text, held back as long as the text is: a token's is told once a byte of its own
/// goes out, and never where a stop string cuts all of it away.
#[derive(Debug, Clone)]
pub struct Beside<T> {
    /// Each with the place where its token's text begins.
    held: VecDeque<(usize, T)>,
}

impl<T> Default for Beside<T> {
    fn default() -> Self {
        Self { held: VecDeque::new() }
    }
}

impl<T> Beside<T> {
    /// Of the token whose piece the stream takes next.
    pub fn hold(&mut self, stream: &TextStream, of_token: T) {
        if !stream.stopped() {
            self.held.push_back((stream.taken, of_token));
        }
    }

    /// Of tokens whose text goes out, at least partly, with what the stream has given by now.
    pub fn told(&mut self, stream: &TextStream) -> Vec<T> {
        let sure = self.held.partition_point(|(begins, _)| *begins < stream.sure);
        let told = self.held.drain(..sure).map(|(_, of_token)| of_token).collect();
        if stream.stopped() {
            self.held.clear();
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(stops: &[&str], pieces: &[&str], given: &[&str], end: &str, stopped: bool) {
        let mut stream = TextStream::new(stops);
        let out: Vec<String> = pieces.iter().map(|piece| stream.push(piece.as_bytes())).collect();
        assert_eq!(out, given, "{stops:?} on {pieces:?}");
        assert_eq!(stream.finish(), end);
        assert_eq!(stream.stopped(), stopped);
    }

    #[test]
    fn what_may_be_emitted_and_when() {
        check(&[], &["ab", "c"], &["ab", "c"], "", false);
        check(&["STOP"], &["aS", "T", "OP", "b"], &["a", "", "", ""], "", true);
        check(&["STOP"], &["aS", "T", "x"], &["a", "", "STx"], "", false);
        check(&["STOP"], &["aST"], &["a"], "ST", false);
        check(&["aab"], &["aaa", "b"], &["a", ""], "", true);
        check(&["abab", "ba"], &["ab", "a"], &["", "a"], "", true);
        check(&["xab", "b"], &["xab"], &[""], "", true);
        check(&[""], &["a"], &["a"], "", false);
        check(&["\n\n"], &["one\n", "two\n", "\nthree"], &["one", "\ntwo", ""], "", true);
        check(&["\u{e9}"], &["caf\u{e9}!"], &["caf"], "", true);
    }

    /// What is told of tokens after each piece, and at the end; each is told by its number.
    #[track_caller]
    fn check_beside(stops: &[&str], pieces: &[&str], told: &[&[usize]], end: &[usize]) {
        let (mut stream, mut beside) = (TextStream::new(stops), Beside::default());
        for (number, (piece, told)) in pieces.iter().zip(told).enumerate() {
            beside.hold(&stream, number);
            stream.push(piece.as_bytes());
            assert_eq!(beside.told(&stream), *told, "{stops:?} on {pieces:?}, after {number}");
        }
        stream.finish();
        assert_eq!(beside.told(&stream), end, "{stops:?} on {pieces:?}");
    }

    #[test]
    fn what_is_told_of_tokens_goes_with_their_text() {
        check_beside(&[], &["ab", "c"], &[&[0], &[1]], &[]);
        // One whole token is the stop string; nothing is told of it, nor of what comes after.
        check_beside(&["STOP"], &["a", "STOP", "b"], &[&[0], &[], &[]], &[]);
        // A stop string over several tokens: the first is kept in part.
        check_beside(&["STOP"], &["aS", "T", "OP", "b"], &[&[0], &[], &[], &[]], &[]);
        check_beside(&["STOP"], &["a", "S", "T", "OPb"], &[&[0], &[], &[], &[]], &[]);
        // What only began like one is told with its text, also at the end.
        check_beside(&["STOP"], &["S", "T", "x"], &[&[], &[], &[0, 1, 2]], &[]);
        check_beside(&["STOP"], &["S", "T"], &[&[], &[]], &[0, 1]);
        check_beside(&["\n\n"], &["one\n", "two\n", "\nthree"], &[&[0], &[1], &[]], &[]);
    }

    /// The dumb reference: the end of the first match over the whole, and the longest that ends there.
    fn reference(stops: &[String], text: &[u8]) -> (Vec<u8>, bool) {
        for end in 1..=text.len() {
            let longest = stops.iter().filter(|s| text[..end].ends_with(s.as_bytes())).map(|s| s.len()).max();
            if let Some(longest) = longest {
                return (text[..end - longest].to_vec(), true);
            }
        }
        (text.to_vec(), false)
    }

    proptest! {
        #[test]
        fn any_cut_gives_what_the_whole_gives(
            stops in prop::collection::vec("[ab]{1,5}", 0..4),
            text in "[abc]{0,40}",
            cuts in prop::collection::vec(0usize..40, 0..10),
        ) {
            let bytes = text.as_bytes();
            let (expect, stopped) = reference(&stops, bytes);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut matcher = StopMatcher::new(&stops);
            let mut out = Vec::new();
            for pair in cuts.windows(2) {
                out.extend(matcher.push(&bytes[pair[0]..pair[1]]));
                prop_assert!(expect.starts_with(&out), "leaked {:?} of {:?}", out, expect);
            }
            out.extend(matcher.finish());
            prop_assert_eq!(&out, &expect);
            prop_assert_eq!(matcher.stopped(), stopped);
            // Told as it streams or only once at the end, it is of the tokens whose text is returned at least partly.
            let (mut stream, mut streamed, mut whole) = (TextStream::new(&stops), Beside::default(), Beside::default());
            let mut told = Vec::new();
            for pair in cuts.windows(2).filter(|pair| pair[0] < pair[1]) {
                streamed.hold(&stream, pair[0]);
                whole.hold(&stream, pair[0]);
                stream.push(&bytes[pair[0]..pair[1]]);
                told.extend(streamed.told(&stream));
            }
            stream.finish();
            told.extend(streamed.told(&stream));
            let mut kept: Vec<usize> = cuts.iter().copied().filter(|begins| *begins < expect.len()).collect();
            kept.dedup();
            prop_assert_eq!(&told, &kept);
            prop_assert_eq!(&whole.told(&stream), &kept);
        }
    }
}
