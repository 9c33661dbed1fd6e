//! A vocabulary in the order of its bytes, so that the tokens which a grammar allows are found prefix by prefix.

use super::matcher::{Matcher, Overrun, Places, Work};

/// The text tokens of a vocabulary, sorted. Tokens without text are not in it: they would not move a grammar on.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    pieces: Vec<(Vec<u8>, u32)>,
    /// How many bytes each piece shares with the one before.
    shared: Vec<usize>,
    /// Where each token is in `pieces`; `u32::MAX` for those without text.
    places: Vec<u32>,
    eog: Vec<u32>,
}

impl Vocabulary {
    /// The piece of every token, in the order of their ids; and those that end a generation.
    pub fn new(pieces: impl Iterator<Item = Vec<u8>>, eog: &[u32]) -> Self {
        let mut all = 0;
        let numbered = pieces.zip(0_u32..).inspect(|_| all += 1);
        // A token that ends the generation is no text, whatever its name.
        let mut pieces: Vec<(Vec<u8>, u32)> =
            numbered.filter(|(piece, token)| !piece.is_empty() && !eog.contains(token)).collect();
        pieces.sort_unstable();
        let mut places = vec![u32::MAX; all];
        for ((_, token), place) in pieces.iter().zip(0..) {
            places[*token as usize] = place;
        }
        let shared = std::iter::once(0)
            .chain(pieces.windows(2).map(|pair| pair[0].0.iter().zip(&pair[1].0).take_while(|(a, b)| a == b).count()))
            .take(pieces.len())
            .collect();
        Self { pieces, shared, places, eog: eog.to_vec() }
    }

    /// The text of a token that has any.
    pub fn piece(&self, token: u32) -> Option<&[u8]> {
        let place = *self.places.get(token as usize)?;
        self.pieces.get(place as usize).map(|(piece, _)| piece.as_slice())
    }

    pub fn eog(&self) -> &[u32] {
        &self.eog
    }

    /// Calls `allow` with every token that may come next.
    pub fn allowed(&self, matcher: &Matcher, mut allow: impl FnMut(u32)) -> Result<(), Overrun> {
        // `path[n]` is where the grammar stands after the first `n` bytes of the current piece.
        let mut path: Vec<Places> = vec![matcher.places().clone()];
        let (mut at, mut work) = (0, Work::of_many());
        while let Some((piece, token)) = self.pieces.get(at) {
            path.truncate(self.shared[at] + 1);
            let mut dead = None;
            while path.len() <= piece.len() {
                let (Some(last), Some(&byte)) = (path.last(), piece.get(path.len() - 1)) else { break };
                match matcher.step(last, byte, &mut work)? {
                    Some(next) => path.push(next),
                    None => {
                        dead = Some(path.len());
                        break;
                    }
                }
            }
            at += 1;
            match dead {
                // Everything that begins with the same bytes is out too.
                Some(length) => {
                    while self.shared.get(at).is_some_and(|shared| *shared >= length) {
                        at += 1;
                    }
                }
                None => allow(*token),
            }
        }
        Ok(())
    }
}
