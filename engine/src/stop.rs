//! Stop strings: the text ends before the first one, and no byte of it ever leaks.
//!
//! Matching is on bytes, so a stop string may straddle any number of tokens. Bytes that could still be the beginning
//! of a stop string are held back until that is decided. The match that completes first wins; of two that complete on
//! the same byte, the longer.

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
}

impl TextStream {
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        Self { stop: StopMatcher::new(stops), utf8: Utf8Stream::default() }
    }

    /// Takes one token's piece; returns the text that may be shown now.
    pub fn push(&mut self, piece: &[u8]) -> String {
        let sure = self.stop.push(piece);
        self.utf8.push(&sure)
    }

    /// The text that was still held back, when no more tokens come.
    pub fn finish(&mut self) -> String {
        let sure = self.stop.finish();
        let mut text = self.utf8.push(&sure);
        text += &self.utf8.finish();
        text
    }

    pub fn stopped(&self) -> bool {
        self.stop.stopped()
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
            prop_assert_eq!(out, expect);
            prop_assert_eq!(matcher.stopped(), stopped);
        }
    }
}
