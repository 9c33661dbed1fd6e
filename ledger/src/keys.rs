//! Keys of API clients and what each may spend: the rules, without storage.
//!
//! A call reserves its ceiling at its key and at every key above it, before anything is sent. When it ends, what it cost
//! is posted and the rest returns. So at every moment and for every key
//!
//! ```text
//! spent + reserved <= total          spent today + reserved <= per day          reserved by one call <= per request
//! paid in - paid out - spent - reserved >= 0, for a key that spends only what was paid in
//! ```
//!
//! | call | awaits | a crash here means |
//! |---|---|---|
//! | open | its end | settled at the next start for what the journal says that its requests cost |
//! | done, failed | nothing | nothing: what it cost is posted |
//!
//! Secrets are not here: a key is known by the SHA-256 of what its client shows.

use satgrid_types::{Msat, UnixMs};
use thiserror::Error;

/// Keys above one another, the one that is shown among them.
pub const MAX_DEPTH: usize = 4;
/// Longest name of a key, in bytes.
pub const MAX_NAME_LEN: usize = 128;
/// Models that one key may be held to.
pub const MAX_MODELS: usize = 64;
/// Keys of one node, revoked ones included.
pub const MAX_KEYS: u64 = 1_000_000;
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

/// Names a key; not secret. Written `key_17`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u64);

impl core::fmt::Display for KeyId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{KEY_PREFIX}{}", self.0)
    }
}

/// What the text of every [`KeyId`] begins with.
pub const KEY_PREFIX: &str = "key_";

/// A text that names no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a key's id looks like {KEY_PREFIX}17")]
pub struct NoKeyId;

impl core::str::FromStr for KeyId {
    type Err = NoKeyId;
    fn from_str(text: &str) -> Result<KeyId, NoKeyId> {
        let digits = text.strip_prefix(KEY_PREFIX).ok_or(NoKeyId)?;
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
        if plain { digits.parse().map(KeyId).map_err(|_| NoKeyId) } else { Err(NoKeyId) }
    }
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// Asks for completions.
    Infer,
    /// Makes and revokes keys below itself; cannot ask for completions.
    Manage,
    /// As `Infer`, but spends only what strangers paid in: the front door's.
    Prepaid,
}

impl KeyKind {
    pub const fn name(self) -> &'static str {
        match self {
            KeyKind::Infer => "infer",
            KeyKind::Manage => "manage",
            KeyKind::Prepaid => "prepaid",
        }
    }
    pub fn from_name(name: &str) -> Option<KeyKind> {
        [KeyKind::Infer, KeyKind::Manage, KeyKind::Prepaid].into_iter().find(|kind| kind.name() == name)
    }
}

/// What a key may do. Absent limits do not limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub per_request: Option<Msat>,
    /// From midnight to midnight, UTC.
    pub per_day: Option<Msat>,
    pub total: Option<Msat>,
    pub requests_per_minute: Option<u32>,
    /// Empty: every model.
    pub models: Vec<String>,
    pub expires_at: Option<UnixMs>,
}

/// What moved under a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyUsage {
    pub spent: Msat,
    /// Held by calls that are not over.
    pub reserved: Msat,
    /// Of `spent`, what today's calls cost.
    pub spent_today: Msat,
    /// By invoices. Only for [`KeyKind::Prepaid`].
    pub paid_in: Msat,
    /// Refunds, those under way included.
    pub paid_out: Msat,
    pub requests: u64,
}

/// A key, its limits and its figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    pub id: KeyId,
    pub name: String,
    pub kind: KeyKind,
    pub parent: Option<KeyId>,
    pub created_at: UnixMs,
    pub revoked_at: Option<UnixMs>,
    pub limits: KeyLimits,
    pub usage: KeyUsage,
}

/// A key that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKey {
    pub name: String,
    pub kind: KeyKind,
    pub parent: Option<KeyId>,
    pub limits: KeyLimits,
}

/// Which limit was too low.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    PerRequest,
    PerDay,
    Total,
    /// What was paid in.
    Balance,
}

impl Limit {
    pub const fn name(self) -> &'static str {
        match self {
            Limit::PerRequest => "per request",
            Limit::PerDay => "per day",
            Limit::Total => "total",
            Limit::Balance => "balance",
        }
    }
}

/// Why a key may not be used for this call.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyRefusal {
    #[error("{0} is revoked")]
    Revoked(KeyId),
    #[error("{0} has expired")]
    Expired(KeyId),
    #[error("{0} makes and revokes keys; it cannot ask for completions")]
    CannotInfer(KeyId),
    #[error("{key} may not use the model {model}")]
    Model { key: KeyId, model: String },
    #[error("{key}: {required} needed, {available} left ({})", limit.name())]
    Limit { key: KeyId, limit: Limit, required: Msat, available: Msat },
}

/// The day on which a moment falls, counted from 1970-01-01, UTC.
pub const fn day_of(at: UnixMs) -> u64 {
    at.0 / DAY_MS
}

impl KeyRecord {
    /// Whether the key opens anything at all.
    pub fn usable(&self, now: UnixMs) -> Result<(), KeyRefusal> {
        if self.revoked_at.is_some() {
            return Err(KeyRefusal::Revoked(self.id));
        }
        if self.limits.expires_at.is_some_and(|at| at <= now) {
            return Err(KeyRefusal::Expired(self.id));
        }
        Ok(())
    }

    /// The most that one more call may reserve, and the limit that says so; `None` where nothing limits it.
    pub fn room(&self) -> Option<(Msat, Limit)> {
        let KeyUsage { spent, reserved, spent_today, paid_in, paid_out, .. } = self.usage;
        let held = spent.saturating_add(reserved);
        let today = spent_today.saturating_add(reserved);
        let rooms = [
            self.limits.per_request.map(|limit| (limit, Limit::PerRequest)),
            self.limits.per_day.map(|limit| (limit.saturating_sub(today), Limit::PerDay)),
            self.limits.total.map(|limit| (limit.saturating_sub(held), Limit::Total)),
            (self.kind == KeyKind::Prepaid)
                .then(|| (paid_in.saturating_sub(paid_out).saturating_sub(held), Limit::Balance)),
        ];
        rooms.into_iter().flatten().min_by_key(|(room, _)| *room)
    }

    /// What a prepaid key can still spend or have refunded.
    pub fn balance(&self) -> Msat {
        let KeyUsage { spent, reserved, paid_in, paid_out, .. } = self.usage;
        paid_in.saturating_sub(paid_out).saturating_sub(spent).saturating_sub(reserved)
    }
}

/// How much a call may reserve: as much of `wanted` as every key in `chain` (the one that was shown and those above it)
/// leaves, and never less than `needed`.
pub fn admit(chain: &[KeyRecord], now: UnixMs, model: &str, needed: Msat, wanted: Msat) -> Result<Msat, KeyRefusal> {
    if let Some(shown) = chain.first()
        && shown.kind == KeyKind::Manage
    {
        return Err(KeyRefusal::CannotInfer(shown.id));
    }
    let mut granted = wanted.max(needed);
    for key in chain {
        key.usable(now)?;
        if !key.limits.models.is_empty() && !key.limits.models.iter().any(|allowed| allowed == model) {
            return Err(KeyRefusal::Model { key: key.id, model: model.to_owned() });
        }
        if let Some((available, limit)) = key.room() {
            if available < needed {
                return Err(KeyRefusal::Limit { key: key.id, limit, required: needed, available });
            }
            granted = granted.min(available);
        }
    }
    Ok(granted)
}

/// The least of what every key in `chain` leaves; `None` where nothing limits it.
pub fn room(chain: &[KeyRecord]) -> Option<Msat> {
    chain.iter().filter_map(KeyRecord::room).map(|(room, _)| room).min()
}

/// Whether a key may stand below its parent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NewKeyError {
    #[error("a key's name has 1 to {MAX_NAME_LEN} bytes and no control characters")]
    Name,
    #[error("a key may be held to {MAX_MODELS} models at most")]
    TooManyModels,
    #[error("keys stand at most {MAX_DEPTH} deep")]
    TooDeep,
    #[error("{0} is revoked or has expired: no key can be made below it")]
    ParentUnusable(KeyId),
    #[error("a key below {0} must be a key to infer with")]
    Kind(KeyId),
    #[error("a limit of zero would refuse every call; revoke the key instead")]
    ZeroLimit,
}

impl NewKey {
    /// `above`: the parent and those above it, nearest first.
    pub fn check(&self, now: UnixMs, above: &[KeyRecord]) -> Result<(), NewKeyError> {
        let name = self.name.trim();
        if name.is_empty() || self.name.len() > MAX_NAME_LEN || self.name.chars().any(char::is_control) {
            return Err(NewKeyError::Name);
        }
        if self.limits.models.len() > MAX_MODELS {
            return Err(NewKeyError::TooManyModels);
        }
        if above.len() >= MAX_DEPTH {
            return Err(NewKeyError::TooDeep);
        }
        let zero = |limit: Option<Msat>| limit.is_some_and(Msat::is_zero);
        if zero(self.limits.per_request) || zero(self.limits.per_day) || zero(self.limits.total) {
            return Err(NewKeyError::ZeroLimit);
        }
        for key in above {
            key.usable(now).map_err(|_| NewKeyError::ParentUnusable(key.id))?;
        }
        match above.first() {
            Some(parent) if parent.kind != KeyKind::Manage && self.kind != KeyKind::Infer => {
                Err(NewKeyError::Kind(parent.id))
            }
            Some(parent) if self.kind == KeyKind::Prepaid => Err(NewKeyError::Kind(parent.id)),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    fn key(id: u64) -> KeyRecord {
        KeyRecord {
            id: KeyId(id),
            name: "k".into(),
            kind: KeyKind::Infer,
            parent: None,
            created_at: NOW,
            revoked_at: None,
            limits: KeyLimits::default(),
            usage: KeyUsage::default(),
        }
    }

    fn limited(id: u64, set: impl FnOnce(&mut KeyRecord)) -> KeyRecord {
        let mut record = key(id);
        set(&mut record);
        record
    }

    #[test]
    fn the_tightest_limit_of_the_chain_decides() {
        let check = |chain: &[KeyRecord], needed: u64, wanted: u64, expect: Result<u64, Limit>| {
            let got = admit(chain, NOW, "m", Msat(needed), Msat(wanted));
            let got = got.map(|msat| msat.0).map_err(|refusal| match refusal {
                KeyRefusal::Limit { limit, .. } => limit,
                KeyRefusal::Revoked(_)
                | KeyRefusal::Expired(_)
                | KeyRefusal::CannotInfer(_)
                | KeyRefusal::Model { .. } => panic!("{refusal}"),
            });
            assert_eq!(got, expect, "{needed} of {wanted}");
        };
        check(&[key(1)], 10, 40, Ok(40));
        let per_request = limited(1, |k| k.limits.per_request = Some(Msat(20)));
        check(std::slice::from_ref(&per_request), 10, 40, Ok(20));
        check(std::slice::from_ref(&per_request), 21, 40, Err(Limit::PerRequest));
        let total = limited(2, |k| {
            k.limits.total = Some(Msat(100));
            k.usage = KeyUsage { spent: Msat(60), reserved: Msat(25), ..KeyUsage::default() };
        });
        check(std::slice::from_ref(&total), 15, 40, Ok(15));
        check(std::slice::from_ref(&total), 16, 40, Err(Limit::Total));
        check(&[key(1), total], 16, 16, Err(Limit::Total));
        let day = limited(3, |k| {
            k.limits.per_day = Some(Msat(30));
            k.usage = KeyUsage { spent: Msat(900), spent_today: Msat(10), reserved: Msat(5), ..KeyUsage::default() };
        });
        check(std::slice::from_ref(&day), 15, 15, Ok(15));
        check(&[day], 16, 16, Err(Limit::PerDay));
        let prepaid = limited(4, |k| {
            k.kind = KeyKind::Prepaid;
            k.usage = KeyUsage { paid_in: Msat(50), paid_out: Msat(10), spent: Msat(20), ..KeyUsage::default() };
        });
        check(std::slice::from_ref(&prepaid), 20, 99, Ok(20));
        check(&[prepaid], 21, 21, Err(Limit::Balance));
    }

    #[test]
    fn who_may_ask_for_what() {
        let refused = |record: KeyRecord| admit(&[record], NOW, "m", Msat(1), Msat(1)).unwrap_err();
        assert!(matches!(refused(limited(1, |k| k.revoked_at = Some(NOW))), KeyRefusal::Revoked(_)));
        assert!(matches!(refused(limited(1, |k| k.limits.expires_at = Some(NOW))), KeyRefusal::Expired(_)));
        assert!(matches!(refused(limited(1, |k| k.kind = KeyKind::Manage)), KeyRefusal::CannotInfer(_)));
        assert!(matches!(refused(limited(1, |k| k.limits.models = vec!["other".into()])), KeyRefusal::Model { .. }));
        // A parent that manages does not stop the keys that it made.
        let parent = limited(1, |k| k.kind = KeyKind::Manage);
        assert_eq!(admit(&[key(2), parent], NOW, "m", Msat(1), Msat(1)), Ok(Msat(1)));
    }

    #[test]
    fn keys_have_one_text_form() {
        assert_eq!("key_17".parse(), Ok(KeyId(17)));
        for bad in ["17", "key_", "key_017", "key_+1", "key_0", "key_99999999999999999999"] {
            assert_eq!(bad.parse::<KeyId>(), Err(NoKeyId), "{bad}");
        }
    }
}
