//! What stands in the window: a listing is up while the engine behind it is.
//!
//! An engine that dies and comes back at once is nobody's business but its customers'. One that stays away (its card is gone,
//! its file was changed) has its listing withdrawn, so that nobody is sent here for nothing, and put up again when it is back.
//! What was measured of links to other nodes stands in it too, and is changed when it is news.

use crate::drive::probes::Told;
use satgrid_market_nostr::Publisher;
use satgrid_types::Listing;
use std::{
    sync::Weak,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// How long an engine may be away with its listing up: longer than a restart takes.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something for sale, and whether what computes it runs.
pub(super) struct Shown {
    pub listing: Listing,
    is_up: Box<dyn Fn() -> bool + Send>,
    absence: Absence,
}

impl Shown {
    pub(super) fn new(listing: Listing, is_up: impl Fn() -> bool + Send + 'static) -> Shown {
        Shown { listing, is_up: Box::new(is_up), absence: Absence::default() }
    }
}

/// Since when an engine is away.
#[derive(Default)]
struct Absence(Option<Instant>);

impl Absence {
    /// Whether its listing stands, with the engine up or not.
    fn is_short(&mut self, up: bool, now: Instant) -> bool {
        if up {
            self.0 = None;
            return true;
        }
        now.duration_since(*self.0.get_or_insert(now)) < PATIENCE
    }
}

/// Looks after the window until the node stops, whose publisher then withdraws everything.
pub(super) async fn keep(mut all: Vec<Shown>, mut told: Told, publisher: Weak<Publisher>, shutdown: CancellationToken) {
    let mut standing: Vec<bool> = vec![true; all.len()];
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let now = Instant::now();
        let stand: Vec<bool> = all.iter_mut().map(|shown| shown.absence.is_short((shown.is_up)(), now)).collect();
        // The first look sees what was measured while the node came up.
        if !told.has_news() && stand == standing {
            continue;
        }
        let Some(publisher) = publisher.upgrade() else { return };
        for (shown, (before, after)) in all.iter().zip(standing.iter().zip(&stand)) {
            match (before, after) {
                (true, false) => {
                    tracing::warn!(model = %shown.listing.model, "its engine stays away: the listing is withdrawn until it is back");
                }
                (false, true) => tracing::info!(model = %shown.listing.model, "its engine is back: listed again"),
                (true, true) | (false, false) => {}
            }
        }
        let listings =
            all.iter().zip(&stand).filter(|(_, stands)| **stands).map(|(shown, _)| told.with_links(&shown.listing));
        match publisher.offer(listings.collect()).await {
            Ok(Ok(())) => standing = stand,
            Ok(Err(error)) => tracing::error!(%error, "the listings could not be changed"),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_absence_is_nobodys_business() {
        let (start, mut absence) = (Instant::now(), Absence::default());
        for (second, up, stands) in [
            (0, true, true),
            (1, false, true),
            // Fourteen seconds are a restart.
            (15, false, true),
            (16, false, false),
            (17, true, true),
            // Each absence has its own patience.
            (18, false, true),
            (32, false, true),
            (33, false, false),
        ] {
            assert_eq!(absence.is_short(up, start + Duration::from_secs(second)), stands, "second {second}");
        }
    }
}
