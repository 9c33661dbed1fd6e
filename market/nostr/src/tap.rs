//! A tap on the wire: events go to our own verifier, everything else to the client library.
//!
//! The library drops what is forged, expired or replaced before anyone can count it, and checks signatures that we check
//! again. So EVENT messages are taken out of the stream right after the WebSocket; connections, subscriptions, pings and
//! reconnections stay the library's. The channel is bounded: when the verifier lags, the socket is read no further.

use std::fmt;
use std::time::Duration;

use futures::StreamExt;
use nostr_sdk::Url;
use nostr_sdk::pool::ConnectionMode;
use nostr_sdk::pool::transport::error::TransportError;
use nostr_sdk::pool::transport::websocket::{
    DefaultWebsocketTransport, WebSocketSink, WebSocketStream, WebSocketTransport,
};
use nostr_sdk::util::BoxedFuture;
use tokio::sync::mpsc;

/// What a relay sent.
#[derive(Debug)]
pub(crate) enum FromRelay {
    /// A whole EVENT message, as text.
    Event { text: String },
    /// All stored events of the wanted subscription were sent.
    EndOfStored { relay: String },
}

pub(crate) struct Tap {
    pub(crate) out: mpsc::Sender<FromRelay>,
    /// Whose end of stored events is told.
    pub(crate) wanted: &'static str,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tap")
    }
}

impl WebSocketTransport for Tap {
    fn support_ping(&self) -> bool {
        DefaultWebsocketTransport.support_ping()
    }

    fn connect<'a>(
        &'a self,
        url: &'a Url,
        mode: &'a ConnectionMode,
        timeout: Duration,
    ) -> BoxedFuture<'a, Result<(WebSocketSink, WebSocketStream), TransportError>> {
        Box::pin(async move {
            let (sink, stream) = DefaultWebsocketTransport.connect(url, mode, timeout).await?;
            let (relay, out, wanted) = (url.to_string(), self.out.clone(), self.wanted);
            let rest = stream.filter_map(move |item| {
                let text = item.as_ref().ok().and_then(|message| message.as_text());
                let (taken, passes) = match text.map(|text| (verb(text), text)) {
                    Some((Some("EVENT"), text)) => (Some(FromRelay::Event { text: text.to_owned() }), false),
                    Some((Some("EOSE"), text)) if is_end_of(text, wanted) => {
                        (Some(FromRelay::EndOfStored { relay: relay.clone() }), true)
                    }
                    Some(_) | None => (None, true),
                };
                let out = out.clone();
                async move {
                    if let Some(taken) = taken {
                        // Fails only when the subscriber is gone, and then nobody wants it.
                        let _ = out.send(taken).await;
                    }
                    passes.then_some(item)
                }
            });
            Ok((sink, Box::pin(rest) as WebSocketStream))
        })
    }
}

/// The first string of a JSON array, if it is a plain one.
fn verb(text: &str) -> Option<&str> {
    let rest = text.trim_start().strip_prefix('[')?.trim_start().strip_prefix('"')?;
    rest.split_once('"').map(|(verb, _)| verb)
}

/// Whether an EOSE message is about this subscription.
fn is_end_of(text: &str, subscription: &str) -> bool {
    serde_json::from_str::<(String, String)>(text).is_ok_and(|(_, id)| id == subscription)
}

#[cfg(test)]
mod tests {
    use super::{is_end_of, verb};

    #[test]
    fn the_end_of_one_subscription_is_not_that_of_another() {
        for (text, expected) in [
            ("[\"EOSE\",\"listings\"]", true),
            (" [ \"EOSE\" , \"listings\" ] ", true),
            ("[\"EOSE\",\"successions\"]", false),
            ("[\"EOSE\"]", false),
            ("[\"EOSE\",\"listings\"", false),
        ] {
            assert_eq!(is_end_of(text, "listings"), expected, "{text}");
        }
    }

    #[test]
    fn reads_the_verb_of_a_message() {
        for (text, expected) in [
            ("[\"EVENT\",\"s\",{}]", Some("EVENT")),
            (" [ \"EOSE\" ,\"s\"]", Some("EOSE")),
            ("[1]", None),
            ("", None),
            ("[\"EVENT", None),
        ] {
            assert_eq!(verb(text), expected, "{text}");
        }
    }
}
