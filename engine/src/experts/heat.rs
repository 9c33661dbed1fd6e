//! How often the router chose each expert, and who should hold which for that.
//!
//! Routers are uneven: a few experts of a layer get many of its rows. A step waits for the host with the most work, so packs
//! are cut to be equally busy, layer by layer, and equally large; the hottest experts of a layer may be in two packs.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use satgrid_types::ExpertSet;

/// Rows that the router sent to each (layer, expert).
pub type Heat = BTreeMap<(u32, u32), u64>;

/// An expert's rows count so many times where its holders share them, so that they divide evenly.
const PARTS: u64 = 2;

/// Deals all experts of a model over packs so that each layer's rows fall evenly on them; the `copied` hottest experts of each layer
/// are in two packs. No pack holds more experts of a layer than an even deal needs. Without figures this is an even deal.
pub fn place(layers: u32, experts: u32, packs: u32, copied: u32, heat: &Heat) -> Vec<ExpertSet> {
    let packs = packs.max(1) as usize;
    let copied = if packs > 1 { copied.min(experts) } else { 0 };
    let most = u64::from(experts + copied).div_ceil(packs as u64);
    let mut sets: Vec<Vec<(u32, u32)>> = vec![Vec::new(); packs];
    for layer in 0..layers {
        let mut order: Vec<(u32, u64)> =
            (0..experts).map(|expert| (expert, heat.get(&(layer, expert)).copied().unwrap_or(0))).collect();
        order.sort_by_key(|&(expert, rows)| (Reverse(rows), expert));
        let (mut busy, mut here) = (vec![0_u64; packs], vec![0_u64; packs]);
        for (rank, (expert, rows)) in (0_u32..).zip(order) {
            let holders: u64 = if rank < copied { 2 } else { 1 };
            let mut taken: Option<usize> = None;
            for _ in 0..holders {
                // What is full takes no more, as long as another does: two copies never share a pack.
                let free = (0..packs).filter(|pack| Some(*pack) != taken);
                let next = free.min_by_key(|&pack| (here[pack] >= most, busy[pack], sets[pack].len(), pack));
                let Some(pack) = next else { break };
                busy[pack] = busy[pack].saturating_add(rows.saturating_mul(PARTS) / holders);
                here[pack] += 1;
                sets[pack].push((layer, expert));
                taken = Some(pack);
            }
        }
    }
    sets.into_iter().map(ExpertSet::new).collect()
}

/// Of each pack the thousandths of all rows that fall on it, and of the busiest layer the thousandths that fall on its
/// busiest pack. Holders of one expert share its rows. Without figures every expert counts alike.
pub fn load(sets: &[ExpertSet], heat: &Heat) -> (Vec<u64>, u64) {
    let mut holders: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for place in sets.iter().flat_map(ExpertSet::pairs) {
        *holders.entry(*place).or_default() += 1;
    }
    let rows = |place: &(u32, u32)| match heat.is_empty() {
        true => 1_000,
        false => heat.get(place).copied().unwrap_or(0).saturating_mul(1_000),
    };
    let mut of_layer: BTreeMap<u32, u64> = BTreeMap::new();
    let mut busy: BTreeMap<(u32, usize), u64> = BTreeMap::new();
    for (pack, set) in sets.iter().enumerate() {
        for place in set.pairs() {
            let share = rows(place) / holders.get(place).copied().unwrap_or(1).max(1);
            *of_layer.entry(place.0).or_default() += share;
            *busy.entry((place.0, pack)).or_default() += share;
        }
    }
    let all: u64 = of_layer.values().sum();
    let permille = |part: u64, whole: u64| part.saturating_mul(1_000).checked_div(whole).unwrap_or(0);
    let mut of_pack = vec![0_u64; sets.len()];
    for ((_, pack), rows) in &busy {
        of_pack[*pack] += rows;
    }
    let worst = busy.iter().map(|((layer, _), rows)| permille(*rows, of_layer.get(layer).copied().unwrap_or(0)));
    let worst = worst.max().unwrap_or(0);
    (of_pack.into_iter().map(|rows| permille(rows, all)).collect(), worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heat(rows: &[u64]) -> Heat {
        (0_u32..).zip(rows).map(|(expert, rows)| ((0, expert), *rows)).collect()
    }

    #[test]
    fn without_figures_it_is_an_even_deal() {
        let sets = place(3, 8, 3, 0, &Heat::new());
        let all: Vec<_> = sets.iter().flat_map(|set| set.pairs().to_vec()).collect();
        assert_eq!((all.len(), ExpertSet::new(all).pairs().len()), (24, 24));
        assert!(sets.iter().all(|set| set.pairs().len() == 8), "{sets:?}");
        assert_eq!(load(&sets, &Heat::new()).0, vec![333, 333, 333]);
    }

    #[test]
    fn hot_experts_are_parted_and_copied() {
        let heat = heat(&[100, 90, 10, 10, 5, 5]);
        // Two packs of three: the two hot ones part.
        let sets = place(1, 6, 2, 0, &heat);
        assert_ne!(sets[0].contains(0, 0), sets[0].contains(0, 1));
        let (_, worst) = load(&sets, &heat);
        assert!(worst <= 530, "{worst}");
        // One expert takes nearly everything: copied, each of the two packs has half of it.
        let one = self::heat(&[1_000, 1, 1, 1]);
        assert!(load(&place(1, 4, 2, 0, &one), &one).1 > 990);
        let sets = place(1, 4, 2, 1, &one);
        assert!(sets.iter().all(|set| set.contains(0, 0)));
        assert!(load(&sets, &one).1 < 510);
        // An expert is never twice in one pack.
        assert_eq!(place(1, 4, 1, 4, &one)[0].pairs().len(), 4);
    }

    proptest! {
        /// Every expert has a holder, copies are in different packs, and no pack is larger than an even deal needs.
        #[test]
        fn every_expert_is_held(rows in prop::collection::vec(0_u64..1_000, 1..24), packs in 1_u32..6, copied in 0_u32..30) {
            let experts = u32::try_from(rows.len()).unwrap();
            let heat = heat(&rows);
            let sets = place(1, experts, packs, copied, &heat);
            prop_assert_eq!(sets.len(), packs as usize);
            let copied = if packs > 1 { copied.min(experts) } else { 0 };
            let held: usize = sets.iter().map(|set| set.pairs().len()).sum();
            prop_assert_eq!(held, (experts + copied) as usize);
            prop_assert!((0..experts).all(|expert| sets.iter().any(|set| set.contains(0, expert))));
            let most = (experts + copied).div_ceil(packs) as usize;
            prop_assert!(sets.iter().all(|set| set.pairs().len() <= most + 1));
        }
    }
}
