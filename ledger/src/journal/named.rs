//! By which payment hashes and transaction ids an entry explains a line of a wallet's list.

use crate::entry::{Entry, Evidence};
use satgrid_types::{Digest, PaymentHash};

/// What this entry names. Payment hashes and transaction ids are both digests, and stand in one index.
pub fn named_by(entry: &Entry) -> Option<Digest> {
    let payment = |hash: &PaymentHash| Some(Digest(hash.0));
    match entry.evidence.as_ref()? {
        Evidence::Invoice { bolt11, .. } => hash_in(bolt11),
        Evidence::PaymentAttempted { payment_hash, .. }
        | Evidence::PaymentSettled { payment_hash, .. }
        | Evidence::PaymentReceived { payment_hash, .. }
        | Evidence::RefundAttempted { payment_hash, .. }
        | Evidence::RefundSettled { payment_hash, .. }
        | Evidence::RefundReceived { payment_hash, .. }
        | Evidence::WalletPayment { payment_hash, .. } => payment(payment_hash),
        Evidence::OnChain { txid, .. } => Some(*txid),
        Evidence::Genesis { .. }
        | Evidence::Listing { .. }
        | Evidence::Quote(_)
        | Evidence::Open(_)
        | Evidence::PaymentFailed { .. }
        | Evidence::Request(_)
        | Evidence::Ack(_)
        | Evidence::Receipt { .. }
        | Evidence::Abandoned { .. }
        | Evidence::Close(_)
        | Evidence::CreditNote(_)
        | Evidence::CreditTransfer(_)
        | Evidence::ChannelClosed { .. }
        | Evidence::Misbehaviour { .. }
        | Evidence::WalletSnapshot { .. }
        | Evidence::Checkpoint { .. }
        | Evidence::Succession(_)
        | Evidence::Promise(_) => None,
    }
}

/// BOLT 11 stands on Bech32: five bits a character.
const CHARACTERS: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
/// Characters of the time before the tagged fields.
const BEFORE: usize = 7;
/// Characters of the signature and the checksum after them.
const AFTER: usize = 104 + 6;
/// Tag and length of a payment hash.
const HASH: (u8, usize) = (1, 52);

/// The payment hash in an invoice, which was made or checked before it came into the journal: looked up, and nothing else of it
/// read or checked, which would take longer than all else that an entry costs. None unless there is exactly one.
fn hash_in(bolt11: &str) -> Option<Digest> {
    let (_, data) = bolt11.rsplit_once('1')?;
    let mut fields = data.as_bytes().get(BEFORE..data.len().checked_sub(AFTER)?)?;
    let mut found = None;
    while let Some(([tag, high, low], rest)) = fields.split_first_chunk() {
        let len = usize::from(bits(*high)?).saturating_mul(32).saturating_add(usize::from(bits(*low)?));
        let (value, after) = rest.split_at_checked(len)?;
        if (bits(*tag)?, len) == HASH && found.replace(digest(value)?).is_some() {
            return None;
        }
        fields = after;
    }
    found
}

fn bits(character: u8) -> Option<u8> {
    let at = CHARACTERS.iter().position(|one| one.eq_ignore_ascii_case(&character))?;
    u8::try_from(at).ok()
}

/// The first 32 bytes of these characters.
fn digest(characters: &[u8]) -> Option<Digest> {
    let mut bytes = [0; 32];
    let mut room = bytes.iter_mut();
    let (mut held, mut count) = (0u16, 0u8);
    for character in characters {
        held = held << 5 | u16::from(bits(*character)?);
        count = count.saturating_add(5);
        if let Some(spare) = count.checked_sub(8) {
            count = spare;
            if let Some(byte) = room.next() {
                *byte = u8::try_from(held >> count & 0xff).ok()?;
            }
        }
    }
    room.next().is_none().then_some(Digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{audit::read_invoice, testing::World};

    #[test]
    fn the_hash_that_is_looked_up_is_that_of_the_parsed_invoice() {
        let entries = World::example().provider.journal.entries();
        let mut seen = 0;
        for entry in &entries {
            let Some(Evidence::Invoice { bolt11, .. }) = &entry.evidence else { continue };
            let parsed = Some(Digest(read_invoice(bolt11).unwrap().payment_hash.0));
            assert_eq!(hash_in(bolt11), parsed);
            assert_eq!(hash_in(&bolt11.to_uppercase()), parsed);
            // Cut anywhere, it is what stood there or none.
            assert!((0..bolt11.len()).all(|end| hash_in(&bolt11[..end]).is_none_or(|hash| Some(hash) == parsed)));
            let (before, data) = bolt11.rsplit_once('1').unwrap();
            let twice = format!("{before}1{}{}{}", &data[..7], &data[7..data.len() - 110], &data[7..]);
            assert_eq!(hash_in(&twice), None, "two of them");
            seen += 1;
        }
        assert!(seen > 1);
        assert_eq!((hash_in(""), hash_in("1"), hash_in("lnbc1\u{e9}")), (None, None, None));
    }
}
