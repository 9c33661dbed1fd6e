//! Requests per minute of each key: a bucket that refills evenly. In memory, so a restart forgives.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);
/// Keys that are remembered; beyond it, those that have not asked for a minute are forgotten.
const MAX_KEYS: usize = 10_000;

/// When each key's bucket is full again.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    full_at: Mutex<BTreeMap<String, Instant>>,
}

impl Pace {
    /// Takes one request of `per_minute`, or says how long to wait.
    pub(crate) fn take(&self, key: &str, per_minute: u32) -> Result<(), Duration> {
        let now = Instant::now();
        let each = MINUTE / per_minute.max(1);
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        if full_at.len() >= MAX_KEYS {
            full_at.retain(|_, at| *at > now);
        }
        let due = full_at.get(key).copied().unwrap_or(now).max(now);
        let next = due + each;
        let over = next.duration_since(now).saturating_sub(MINUTE);
        if !over.is_zero() {
            return Err(over);
        }
        full_at.insert(key.to_owned(), next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_minute_holds_so_many() {
        let pace = Pace::default();
        for _ in 0..3 {
            assert_eq!(pace.take("a", 3), Ok(()));
        }
        assert_eq!(pace.take("a", 3), Err(Duration::from_secs(20)));
        assert_eq!(pace.take("b", 3), Ok(()));
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(pace.take("a", 3), Ok(()));
        assert!(pace.take("a", 3).is_err());
    }
}
