//! "Most you can lose now": the two figures that bound a session, from numbers that each side already holds.

use satgrid_types::Msat;

/// The consumer's side of one session.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerExposure {
    /// Slices that arrived.
    pub paid: Msat,
    /// The charge up to the last countersigned statements: work that was received.
    pub charged: Msat,
    /// The slice that is being paid, with the most that its route may cost.
    pub in_flight: Msat,
}

impl ConsumerExposure {
    /// What is gone if the provider vanishes now: money sent for which no work was received.
    pub fn most(&self) -> Msat {
        self.paid.saturating_add(self.in_flight).saturating_sub(self.charged)
    }
}

/// The provider's side of one session.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ProviderExposure {
    /// Cost of all work done in open requests.
    pub done: Msat,
    /// Cost of what the consumer countersigned of it.
    pub acked: Msat,
    /// Charges beyond what was prepaid (the credit window in use).
    pub credit: Msat,
}

impl ProviderExposure {
    /// What is gone if the consumer vanishes now: work that nobody signed for, and credit given.
    pub fn most(&self) -> Msat {
        self.done.saturating_sub(self.acked).saturating_add(self.credit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_by_hand() {
        let c = ConsumerExposure { paid: Msat(20_000), charged: Msat(13_000), in_flight: Msat(10_100) };
        assert_eq!(c.most(), Msat(17_100));
        let p = ProviderExposure { done: Msat(5_000), acked: Msat(4_200), credit: Msat(0) };
        assert_eq!(p.most(), Msat(800));
    }
}
