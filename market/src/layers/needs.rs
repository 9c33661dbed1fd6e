//! What layers of a model take of a worker's memory: weights by the model's own table of tensors, which its root covers, and
//! the cache of the sequences that a lead wants held. Nothing here is measured, and nothing is believed of a listing.

use satgrid_types::LayerRange;

/// By layer of the whole model, in bytes. Empty where the table is not at hand: then nobody is too small.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerNeeds {
    pub weights: Vec<u64>,
    /// The cache of one position of one sequence, in one layer.
    pub position: u64,
}

impl LayerNeeds {
    /// Of these layers, with so many sequences of so many positions.
    pub fn of(&self, range: &LayerRange, slots: u32, context: u32) -> u64 {
        let (start, end) = (range.start() as usize, range.end() as usize);
        let weights = self.weights.get(start..end).unwrap_or_default().iter();
        let cells = u64::from(slots).saturating_mul(context.into()).saturating_mul(range.layers().into());
        weights.fold(cells.saturating_mul(self.position), |sum, bytes| sum.saturating_add(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_cells_are_summed() {
        let needs = LayerNeeds { weights: vec![1, 10, 100, 1_000], position: 7 };
        for (from, to, slots, context, expect) in
            [(1, 3, 1, 0, 110), (1, 3, 2, 5, 110 + 2 * 5 * 2 * 7), (0, 4, 1, 1, 1_111 + 28), (2, 9, 1, 1, 49)]
        {
            let range = LayerRange::new(from, to).unwrap();
            assert_eq!(needs.of(&range, slots, context), expect, "{from} to {to}");
        }
        let most = LayerNeeds { weights: vec![u64::MAX; 2], position: u64::MAX };
        assert_eq!(most.of(&LayerRange::new(0, 2).unwrap(), u32::MAX, u32::MAX), u64::MAX);
        assert_eq!(LayerNeeds::default().of(&LayerRange::new(0, 2).unwrap(), 9, 9), 0);
    }
}
