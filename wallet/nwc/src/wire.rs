//! NIP-47 as JSON: requests, answers, and the two ways in which they are encrypted.

use nostr_sdk::nips::{nip04, nip44};
use nostr_sdk::prelude::{Event, EventBuilder, Keys, Kind, PublicKey, SecretKey, Tag, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) const INFO: Kind = Kind::Custom(13_194);
pub(crate) const REQUEST: Kind = Kind::Custom(23_194);
pub(crate) const RESPONSE: Kind = Kind::Custom(23_195);
pub(crate) const NOTIFICATION_NIP04: Kind = Kind::Custom(23_196);
pub(crate) const NOTIFICATION: Kind = Kind::Custom(23_197);
/// What this side of the wallet answers.
pub(crate) const METHODS: [&str; 6] =
    ["pay_invoice", "make_invoice", "lookup_invoice", "list_transactions", "get_balance", "get_info"];

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub method: String,
    #[serde(default)]
    pub params: Value,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub code: String,
    pub message: String,
}

impl Fault {
    pub(crate) fn new(code: &str, message: impl Into<String>) -> Fault {
        Fault { code: code.to_owned(), message: message.into() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Response {
    pub result_type: String,
    #[serde(default)]
    pub error: Option<Fault>,
    #[serde(default)]
    pub result: Option<Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encryption {
    Nip44,
    Nip04,
}

impl Encryption {
    pub(crate) fn seal(self, ours: &SecretKey, theirs: &PublicKey, text: &str) -> Option<String> {
        match self {
            Encryption::Nip44 => nip44::encrypt(ours, theirs, text, nip44::Version::V2).ok(),
            Encryption::Nip04 => nip04::encrypt(ours, theirs, text).ok(),
        }
    }
    pub(crate) fn open(self, ours: &SecretKey, theirs: &PublicKey, text: &str) -> Option<String> {
        match self {
            Encryption::Nip44 => nip44::decrypt(ours, theirs, text).ok(),
            Encryption::Nip04 => nip04::decrypt(ours, theirs, text).ok(),
        }
    }
    /// As the event's tag says, which is absent for NIP-04.
    pub(crate) fn of(event: &Event) -> Encryption {
        let says = tag(event, "encryption").unwrap_or_default();
        if says.split_whitespace().any(|word| word == "nip44_v2") { Encryption::Nip44 } else { Encryption::Nip04 }
    }
    fn tags(self) -> Vec<Tag> {
        match self {
            Encryption::Nip44 => Tag::parse(["encryption", "nip44_v2"]).into_iter().collect(),
            Encryption::Nip04 => Vec::new(),
        }
    }
}

/// The first value of a tag.
pub(crate) fn tag<'a>(event: &'a Event, name: &str) -> Option<&'a str> {
    let mut tags = event.tags.iter().map(|tag| tag.as_slice());
    tags.find(|tag| tag.first().is_some_and(|first| first == name))?.get(1).map(String::as_str)
}

/// An encrypted event to `theirs`, about the event `about` if there is one.
pub(crate) fn event(
    keys: &Keys,
    theirs: &PublicKey,
    kind: Kind,
    encryption: Encryption,
    text: &str,
    about: Option<&Event>,
) -> Option<Event> {
    let content = encryption.seal(keys.secret_key(), theirs, text)?;
    let mut tags = vec![Tag::public_key(*theirs)];
    tags.extend(about.map(|event| Tag::event(event.id)));
    if kind == REQUEST {
        tags.extend(encryption.tags());
        tags.push(Tag::expiration(Timestamp::now() + REQUEST_LIVES_S));
    }
    EventBuilder::new(kind, content).tags(tags).sign_with_keys(keys).ok()
}

/// How long a request is worth answering.
pub(crate) const REQUEST_LIVES_S: u64 = 60;
