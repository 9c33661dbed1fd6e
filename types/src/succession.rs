//! A node's key that gives way to another, or to none: the last word of the old key.
//!
//! ```text
//! rotation    {old, new}   signed by both: nobody inherits without the old key, and nobody is made an heir unasked
//! revocation  {old}        signed by the old key: nobody signs after it
//! ```
//!
//! It is published as a Nostr event of kind 8521, which relays keep and never replace, by the old or by the new Nostr key; the
//! content is this statement in hex and proves itself. Whoever holds a stolen key can sign one, too. So two rotations of one
//! key to different heirs, or a rotation and a revocation, make the key nobody's: **a thief can end a name, never inherit it**
//! once its owner has spoken (`satgrid_market::Lineage` keeps that rule).

use crate::{
    EventError, NodeKey, NostrEvent, NostrKey, Signature, Signed, Statement, UnixMs, Verified, VerifyError, cbor,
    cbor::CodecError, node_key, sign_body, verify_body,
};
use ed25519_dalek::SigningKey;
use minicbor::{Decode, Encode};
use secp256k1::Keypair;
use thiserror::Error;

/// Kind of a succession: a regular event, kept and not replaced.
pub const SUCCESSION_KIND: u16 = 8_521;
/// No signed succession is longer, in bytes.
pub const MAX_SUCCESSION_BYTES: usize = 512;

/// Why a key is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum GivenUp {
    /// By habit.
    #[n(0)]
    Routine,
    /// Somebody else may have it.
    #[n(1)]
    Stolen,
    /// The node ends.
    #[n(2)]
    Ended,
}

impl GivenUp {
    pub const fn name(self) -> &'static str {
        match self {
            GivenUp::Routine => "routine",
            GivenUp::Stolen => "stolen",
            GivenUp::Ended => "ended",
        }
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Succession {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub old: NodeKey,
    /// Absent in a revocation.
    #[n(2)]
    pub new: Option<NodeKey>,
    #[n(3)]
    pub old_nostr: NostrKey,
    #[n(4)]
    pub new_nostr: Option<NostrKey>,
    /// By the signer's clock.
    #[n(5)]
    pub at: UnixMs,
    #[n(6)]
    pub why: GivenUp,
}

impl Succession {
    pub const VERSION: u32 = 1;
}
impl Statement for Succession {
    const KIND: &'static str = "succession";
    const MAX_LEN: usize = 256;
}

/// A succession as it travels: by the old key, and accepted by the new one where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SignedSuccession {
    #[cbor(n(0), with = "minicbor::bytes")]
    body: Vec<u8>,
    /// By the old key.
    #[n(1)]
    given: Signature,
    /// By the new key.
    #[n(2)]
    accepted: Option<Signature>,
}

/// Why a succession is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SuccessionRefusal {
    #[error("kind {kind} is not a succession")]
    OtherKind { kind: u16 },
    #[error("no succession in the event: {0}")]
    Content(&'static str),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Event(#[from] EventError),
    #[error(transparent)]
    Signature(#[from] VerifyError),
    #[error("version {0} is not known here")]
    Version(u32),
    #[error("names an heir that did not accept, or accepts for nobody")]
    Acceptance,
    #[error("a key cannot be its own heir")]
    Self_,
    #[error("published by a Nostr key that it does not name")]
    Stranger,
}

impl SuccessionRefusal {
    /// A stable word for counters.
    pub const fn reason(&self) -> &'static str {
        match self {
            SuccessionRefusal::OtherKind { .. } => "other_kind",
            SuccessionRefusal::Content(_) | SuccessionRefusal::Codec(_) => "malformed",
            SuccessionRefusal::Version(_) => "version",
            SuccessionRefusal::Event(_) | SuccessionRefusal::Signature(_) => "forged",
            SuccessionRefusal::Acceptance | SuccessionRefusal::Self_ | SuccessionRefusal::Stranger => "succession",
        }
    }
}

impl SignedSuccession {
    /// The old key gives way to the new one.
    pub fn rotate(old: (&SigningKey, NostrKey), new: (&SigningKey, NostrKey), at: UnixMs, why: GivenUp) -> Self {
        let said = Succession {
            version: Succession::VERSION,
            old: node_key(old.0),
            new: Some(node_key(new.0)),
            old_nostr: old.1,
            new_nostr: Some(new.1),
            at,
            why,
        };
        let body = cbor::encode(&said);
        let given = sign_body::<Succession>(&body, old.0);
        let accepted = Some(sign_body::<Succession>(&body, new.0));
        SignedSuccession { body, given, accepted }
    }

    /// The old key gives way to none.
    pub fn revoke(old: (&SigningKey, NostrKey), at: UnixMs, why: GivenUp) -> Self {
        let (version, old_nostr) = (Succession::VERSION, old.1);
        let said = Succession { version, old: node_key(old.0), new: None, old_nostr, new_nostr: None, at, why };
        let body = cbor::encode(&said);
        SignedSuccession { given: sign_body::<Succession>(&body, old.0), body, accepted: None }
    }

    /// What it claims, before anybody checked.
    pub fn peek(&self) -> Result<Succession, VerifyError> {
        self.by_old().peek()
    }

    fn by_old(&self) -> Signed<Succession> {
        Signed::from_parts(self.body.clone(), self.given)
    }

    /// What it says, if everybody that it takes has signed.
    pub fn verify(&self) -> Result<Verified<Succession>, SuccessionRefusal> {
        let said = self.peek()?;
        if said.version != Succession::VERSION {
            return Err(SuccessionRefusal::Version(said.version));
        }
        if said.new == Some(said.old) {
            return Err(SuccessionRefusal::Self_);
        }
        let verified = self.by_old().verify(&said.old)?;
        match (&said.new, &said.new_nostr, &self.accepted) {
            (Some(new), Some(_), Some(accepted)) => verify_body::<Succession>(&self.body, new, accepted)?,
            (None, None, None) => {}
            (_, _, _) => return Err(SuccessionRefusal::Acceptance),
        }
        Ok(verified)
    }

    /// The key that stands after the old one, if that is proven.
    pub fn heir(&self) -> Option<NodeKey> {
        self.verify().ok().and_then(|said| said.new)
    }

    pub fn to_hex(&self) -> String {
        hex::encode(cbor::encode(self))
    }

    pub fn from_hex(text: &str) -> Result<Self, SuccessionRefusal> {
        let bytes = hex::decode(text).map_err(|_| SuccessionRefusal::Content("not hex"))?;
        Ok(cbor::decode_limited(&bytes, MAX_SUCCESSION_BYTES)?)
    }

    /// The event that tells of it, by one of the Nostr keys that it names. The same bytes whenever it is made.
    pub fn event(&self, keys: &Keypair, said: &Succession, aux: &[u8; 32]) -> NostrEvent {
        let mut tags = vec![vec!["k".to_owned(), said.old.to_string()]];
        tags.extend(said.new.map(|new| vec!["k".to_owned(), new.to_string()]));
        NostrEvent::sign(keys, said.at.as_secs(), SUCCESSION_KIND, tags, self.to_hex(), aux)
    }
}

/// Checks an event that claims to be a succession.
pub fn verify_succession(event: &NostrEvent) -> Result<(SignedSuccession, Verified<Succession>), SuccessionRefusal> {
    if event.kind != SUCCESSION_KIND {
        return Err(SuccessionRefusal::OtherKind { kind: event.kind });
    }
    if event.content.len() > 2 * MAX_SUCCESSION_BYTES {
        return Err(SuccessionRefusal::Content("too long"));
    }
    event.verify()?;
    let signed = SignedSuccession::from_hex(&event.content)?;
    let said = signed.verify()?;
    if event.pubkey != said.old_nostr && Some(event.pubkey) != said.new_nostr {
        return Err(SuccessionRefusal::Stranger);
    }
    Ok((signed, said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nostr_key;

    fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }
    fn nostr(n: u8) -> Keypair {
        Keypair::from_seckey_slice(secp256k1::SECP256K1, &[n; 32]).unwrap()
    }
    fn rotation(old: u8, new: u8) -> SignedSuccession {
        let named = |n: u8| nostr_key(&nostr(n));
        SignedSuccession::rotate((&key(old), named(old)), (&key(new), named(new)), UnixMs(1_000), GivenUp::Routine)
    }

    #[test]
    fn an_heir_is_named_by_the_old_key_and_accepts() {
        let signed = rotation(1, 2);
        let said = signed.verify().unwrap();
        assert_eq!((said.old, said.new), (node_key(&key(1)), Some(node_key(&key(2)))));
        assert_eq!(SignedSuccession::from_hex(&signed.to_hex()).unwrap(), signed);
        assert!(signed.to_hex().len() <= 2 * MAX_SUCCESSION_BYTES);
        let revoked = SignedSuccession::revoke((&key(1), nostr_key(&nostr(1))), UnixMs(1), GivenUp::Stolen);
        assert_eq!(revoked.verify().unwrap().new, None);

        let check = |signed: SignedSuccession| assert!(signed.verify().is_err(), "{signed:?}");
        check(SignedSuccession { accepted: None, ..rotation(1, 2) });
        check(SignedSuccession { accepted: rotation(1, 3).accepted, ..rotation(1, 2) });
        check(SignedSuccession { accepted: rotation(1, 2).accepted, ..revoked });
        check(rotation(1, 1));
        let said = rotation(1, 2).peek().unwrap();
        let by = |said: &Succession, old: &SigningKey, new: &SigningKey| {
            let body = cbor::encode(said);
            let (given, accepted) = (sign_body::<Succession>(&body, old), Some(sign_body::<Succession>(&body, new)));
            SignedSuccession { body, given, accepted }
        };
        assert!(by(&said, &key(1), &key(2)).verify().is_ok());
        check(by(&said, &key(3), &key(2)));
        check(by(&said, &key(1), &key(3)));
        let later = Succession { version: 2, ..said };
        assert_eq!(by(&later, &key(1), &key(2)).verify().unwrap_err(), SuccessionRefusal::Version(2));
    }

    #[test]
    fn the_event_is_by_a_key_that_it_names() {
        let signed = rotation(1, 2);
        let said = signed.verify().unwrap();
        for by in [1, 2] {
            let event = signed.event(&nostr(by), &said, &[0; 32]);
            assert_eq!(verify_succession(&event).unwrap().0, signed);
        }
        let stranger = signed.event(&nostr(3), &said, &[0; 32]);
        assert_eq!(verify_succession(&stranger).unwrap_err(), SuccessionRefusal::Stranger);
        let mut bent = signed.event(&nostr(1), &said, &[0; 32]);
        bent.content = rotation(1, 3).to_hex();
        assert_eq!(verify_succession(&bent).unwrap_err().reason(), "forged");
    }
}
