//! Guesses of what comes next, to be verified in one batch: where a trip through the model is dear and a row more is cheap (a
//! ring of machines), several positions are evaluated at once on the chance that the guess is right. What is drawn decides;
//! a guess changes when a token comes, never which.
//!
//! [`Drafter`] is the port; [`Lookup`] guesses that a text goes on as it went on before, in the prompt or in what was said
//! since. A small model guesses behind the same port, in `engine/llama`. Pure: no clock, no random source.

/// Most tokens in one guess.
pub const MAX_GUESS: usize = 16;
/// A shorter common end says nothing about what follows.
const LEAST_MATCH: usize = 2;
/// Longer ones are all as good.
const ENOUGH_MATCH: usize = 8;
/// Steps without a guess after one that was wholly wrong; doubled with each that follows.
const FIRST_PAUSE: u32 = 1;
const MAX_PAUSE: u32 = 32;
/// Wrong guesses that a job may make before any is right, and for each token said.
const CREDIT: usize = 2 * MAX_GUESS;

/// Guesses for one job.
pub trait Drafter: Send {
    /// What may follow `tokens`, at most `most` of them; empty where there is no good guess.
    fn guess(&mut self, tokens: &[u32], most: usize) -> Vec<u32>;
    /// How much of the last guess was right.
    fn verified(&mut self, guessed: usize, right: usize);
}

/// How long guesses may be: doubled while they are right, halved when they are not; after one that was wholly wrong there is
/// a pause, each time a longer one.
#[derive(Debug, Clone)]
pub struct Pace {
    length: usize,
    pause: u32,
    next_pause: u32,
    /// Wrong guesses that are still allowed: what is wasted never exceeds what was said by a fixed ratio.
    credit: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { length: 4, pause: 0, next_pause: FIRST_PAUSE, credit: CREDIT }
    }
}

impl Pace {
    /// How long a guess may be at this step, where `most` would be of use.
    pub fn step(&mut self, most: usize) -> usize {
        self.credit = (self.credit + 1).min(CREDIT);
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        most.min(self.length).min(self.credit)
    }

    /// How much of the last guess was right.
    pub fn verified(&mut self, guessed: usize, right: usize) {
        self.credit = (self.credit + right).saturating_sub(guessed - right.min(guessed)).min(CREDIT);
        if right == guessed {
            self.length = (self.length * 2).min(MAX_GUESS);
            self.next_pause = FIRST_PAUSE;
        } else if right > 0 {
            self.length = right.max(2);
            self.next_pause = FIRST_PAUSE;
        } else {
            self.length = (self.length / 2).max(2);
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        }
    }
}

/// Prompt lookup: what followed the last time that the text ended like this.
#[derive(Debug, Clone, Default)]
pub struct Lookup {
    pace: Pace,
}

impl Drafter for Lookup {
    fn guess(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        let most = self.pace.step(most);
        follow(tokens, most)
    }

    fn verified(&mut self, guessed: usize, right: usize) {
        self.pace.verified(guessed, right);
    }
}

/// What followed the newest of the longest earlier matches of the text's end. Where that runs into the end itself, it is
/// what would follow if the text went on in that rhythm.
fn follow(tokens: &[u32], most: usize) -> Vec<u32> {
    let end = tokens.len();
    let (mut best, mut at) = (LEAST_MATCH - 1, None);
    for before in (1..end).rev() {
        let common =
            (0..before.min(ENOUGH_MATCH)).take_while(|n| tokens[before - 1 - n] == tokens[end - 1 - n]).count();
        if common > best {
            (best, at) = (common, Some(before));
            if common >= ENOUGH_MATCH {
                break;
            }
        }
    }
    let Some(at) = at else { return Vec::new() };
    let period = end - at;
    (0..most).map(|n| tokens[at + n % period]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, most: usize, expect: &str) {
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let guess: String = follow(&tokens, most).into_iter().map(|token| char::from(token as u8)).collect();
        assert_eq!(guess, expect, "{text}");
    }

    #[test]
    fn a_text_goes_on_as_it_did() {
        check("", 4, "");
        check("abc", 4, "");
        check("the cat sat. the ca", 4, "t sa");
        // One letter in common is no reason.
        check("xay bzaq", 4, "");
        // The longest match wins, then the newest.
        check("1abcX 2abcY 1abc", 1, "X");
        check("abcX abcY abc", 1, "Y");
        // A rhythm goes on beyond what was said.
        check("ababab", 5, "ababa");
        check("aaaa", 3, "aaa");
    }

    #[test]
    fn length_follows_success_and_waste_is_bounded() {
        let text: Vec<u32> = [1, 2, 3, 4].repeat(8);
        let mut lookup = Lookup::default();
        let mut lengths = Vec::new();
        for _ in 0..4 {
            let guess = lookup.guess(&text, 100).len();
            lengths.push(guess);
            lookup.verified(guess, guess);
        }
        assert_eq!(lengths, [4, 8, 16, 16]);
        // From now on it is always wrong.
        let (mut wasted, mut guesses, steps) = (0, 0, 1_000);
        for _ in 0..steps {
            let guess = lookup.guess(&text, 100).len();
            if guess > 0 {
                lookup.verified(guess, 0);
                guesses += 1;
            }
            wasted += guess;
        }
        assert!(guesses <= 40 && wasted <= 120, "{guesses} guesses, {wasted} positions for {steps} tokens");
        // And comes back when it is right.
        while lookup.guess(&text, 100).is_empty() {}
        lookup.verified(2, 2);
        assert_eq!(lookup.guess(&text, 100).len(), 4);
        assert_eq!(lookup.guess(&text, 1).len(), 1, "never more than asked");
    }
}
