//! What every tokenizer keeps.

use crate::port::{Tokenizer, TokenizerError};
use crate::stop::TextStream;

const TEXTS: [&str; 5] = ["Hello, world!", "a  b\n\nc", "caf\u{e9} \u{20ac}5", "\u{1f600}\u{1f680}", "x"];

pub(super) async fn round_trips(tok: &dyn Tokenizer) {
    for text in TEXTS {
        let ids = tok.tokenize(text, false, false).await.unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert!(!ids.is_empty() && ids.iter().all(|id| *id < tok.vocab_size()), "{text:?} gave {ids:?}");
        let mut stream = TextStream::default();
        let mut back = String::new();
        for piece in tok.pieces(&ids, false).await.unwrap_or_else(|error| panic!("{text:?}: {error}")) {
            back += &stream.push(&piece);
        }
        back += &stream.finish();
        assert_eq!(back.trim_start(), text, "tokenised and back");
    }

    let special = tok.special();
    let plain = tok.tokenize(TEXTS[0], false, false).await.expect("tokenize");
    let dressed = tok.tokenize(TEXTS[0], true, false).await.expect("tokenize");
    if let (true, Some(bos)) = (special.add_bos, special.bos) {
        assert_eq!((dressed[0], &dressed[1..=plain.len()]), (bos, &plain[..]), "BOS comes in front, once");
    }
    if let Some(eos) = special.eos {
        assert!(special.eog.contains(&eos), "EOS ends a generation");
        assert_eq!(tok.pieces(&[eos], false).await, Ok(vec![Vec::new()]), "a control token adds no text");
        let name = tok.pieces(&[eos], true).await.expect("pieces").concat();
        assert!(!name.is_empty(), "unless its name is asked for");
        let name = String::from_utf8_lossy(&name).into_owned();
        assert_eq!(tok.tokenize(&name, false, true).await, Ok(vec![eos]), "{name:?} is parsed when asked");
        assert_ne!(tok.tokenize(&name, false, false).await, Ok(vec![eos]), "{name:?} in a user's words is text");
    }
    let beyond = tok.vocab_size();
    let error = tok.pieces(&[0, beyond], false).await;
    assert_eq!(error, Err(TokenizerError::UnknownToken { token: beyond, vocab: beyond }));
}
