//! Bytes in pieces to text in pieces, each piece valid UTF-8.
//!
//! A token may end in the middle of a character. The incomplete tail (at most three bytes) is held back until
//! its rest comes; what can never become a character turns into U+FFFD, exactly as `String::from_utf8_lossy`
//! would do over the whole. So the text does not depend on how the bytes were cut.

/// Collects bytes and gives out complete characters.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    tail: Vec<u8>,
}

impl Utf8Stream {
    /// Text that is complete with these bytes; empty where they only begin a character.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.tail.extend_from_slice(bytes);
        let mut text = String::new();
        let mut at = 0;
        while at < self.tail.len() {
            match std::str::from_utf8(&self.tail[at..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    at = self.tail.len();
                }
                Err(error) => {
                    let good = at + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.tail[at..good]));
                    at = good;
                    let Some(bad) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    at += bad;
                }
            }
        }
        self.tail.drain(..at);
        text
    }

    /// The end of the stream: a character that never came whole becomes one U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.tail).into_owned();
        self.tail.clear();
        text
    }

    /// Bytes held back, at most three.
    pub fn held(&self) -> usize {
        self.tail.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn characters_wait_for_their_last_byte() {
        let mut stream = Utf8Stream::default();
        let smile = "a\u{1F600}b".as_bytes();
        let given: Vec<String> = smile.iter().map(|byte| stream.push(&[*byte])).collect();
        assert_eq!(given, ["a", "", "", "", "\u{1F600}", "b"]);
        assert_eq!(stream.push(&[0xE2, 0x82]), "");
        assert_eq!(stream.held(), 2);
        assert_eq!(stream.push(b"x"), "\u{FFFD}x");
        assert_eq!(stream.push(&[0xE2, 0x82]), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
        assert_eq!(stream.finish(), "");
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_text(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80u8..0xC0, 0xE0u8..0xF8], 0..60),
            cuts in prop::collection::vec(0usize..60, 0..10),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut stream = Utf8Stream::default();
            let mut text = String::new();
            for pair in cuts.windows(2) {
                text += &stream.push(&bytes[pair[0]..pair[1]]);
                prop_assert!(stream.held() <= 3);
            }
            text += &stream.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
