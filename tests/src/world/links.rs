//! Links: frames in their wire form, per-stream order, latency, and what a break loses.

use super::{What, World, parts::Link};
use rand::Rng;
use satgrid_node::{
    LinkId, StreamId,
    consumer::{ConsumerEvent, SessionIndex, session_key},
    provider::ProviderEvent,
};
use satgrid_protocol::frame::{self, ConsumerControl, ConsumerFrame, ProviderControl, ProviderFrame};
use satgrid_types::{NodeKey, node_key};

/// What travels.
pub(super) enum Payload {
    Up,
    Frame(Vec<u8>),
    /// The other side has no more to say on this stream, or reset it.
    Closed,
    Down(String),
}

/// A connection attempt to a node that is not there fails after this.
const REFUSED_MS: u64 = 300;

impl World {
    pub(super) fn connect(&mut self, c: usize, end: LinkId, to: NodeKey, index: SessionIndex) {
        let epoch = self.consumers[c].epoch;
        let p = self
            .providers
            .iter()
            .position(|p| node_key(&p.key) == to && p.role.is_some() && p.unreachable_until <= self.now);
        let Some(p) = p else {
            return self.at(REFUSED_MS, What::Unreachable { consumer: c, epoch, link: end });
        };
        let range = self.options.latency_ms;
        let latency_ms = self.between(range);
        let id = self.next_link;
        self.next_link += 1;
        let peer = node_key(&session_key(&self.consumers[c].master, index));
        let link = Link {
            consumer: c,
            consumer_end: end,
            consumer_epoch: epoch,
            session_key: peer,
            provider: p,
            provider_end: LinkId(1_000_000 + id),
            provider_epoch: self.providers[p].epoch,
            latency_ms,
            closed: false,
            last: Default::default(),
        };
        let provider_end = link.provider_end;
        self.links.insert(id, link);
        // The handshake is over: the provider hears of it first, the consumer a trip later.
        let provider_epoch = self.providers[p].epoch;
        let host = Some(self.consumers[c].host);
        self.tell_provider(p, provider_epoch, ProviderEvent::LinkUp { link: provider_end, peer, host });
        self.send(id, false, None, Payload::Up);
    }

    /// Puts something on its way; a stream (or the control stream) does not overtake itself.
    fn send(&mut self, id: u64, to_provider: bool, stream: Option<StreamId>, payload: Payload) {
        let jitter = self.rng.gen_range(0..=self.options.jitter_ms);
        let now = self.now;
        let Some(link) = self.links.get_mut(&id).filter(|l| !l.closed) else { return };
        let mut at = now.plus_ms(link.latency_ms + jitter);
        let last = link.last.entry((stream, to_provider)).or_insert(at);
        at = at.max(*last);
        *last = at;
        self.at(at.since(now), What::Deliver { link: id, to_provider, stream, payload });
    }

    fn by_end(&self, consumer: Option<usize>, provider: Option<usize>, end: LinkId) -> Option<u64> {
        let of_consumer = |l: &Link| {
            consumer.is_some_and(|c| {
                l.consumer == c && l.consumer_end == end && l.consumer_epoch == self.consumers[c].epoch
            })
        };
        let of_provider = |l: &Link| {
            provider.is_some_and(|p| {
                l.provider == p && l.provider_end == end && l.provider_epoch == self.providers[p].epoch
            })
        };
        self.links.iter().rev().find(|(_, l)| of_consumer(l) || of_provider(l)).map(|(id, _)| *id)
    }

    pub(super) fn send_to_provider(&mut self, c: usize, end: LinkId, stream: Option<StreamId>, frame: Vec<u8>) {
        if let Some(id) = self.by_end(Some(c), None, end) {
            self.send(id, true, stream, Payload::Frame(frame));
        }
    }
    /// The key of the session that a consumer's link carries, and its provider.
    pub(super) fn carried(&self, c: usize, end: LinkId) -> Option<(NodeKey, usize)> {
        let link = self.links.get(&self.by_end(Some(c), None, end)?)?;
        Some((link.session_key, link.provider))
    }
    pub(super) fn send_to_consumer(&mut self, p: usize, end: LinkId, stream: Option<StreamId>, frame: Vec<u8>) {
        if let Some(id) = self.by_end(None, Some(p), end) {
            self.send(id, false, stream, Payload::Frame(frame));
        }
    }
    pub(super) fn close_stream(&mut self, c: Option<usize>, p: Option<usize>, end: LinkId, stream: StreamId) {
        if let Some(id) = self.by_end(c, p, end) {
            self.send(id, c.is_some(), Some(stream), Payload::Closed);
        }
    }

    /// One side closes: what is still on its way to it is lost, the other side hears of it a trip later.
    pub(super) fn close_link(&mut self, c: Option<usize>, p: Option<usize>, end: LinkId, reason: String) {
        let Some(id) = self.by_end(c, p, end) else { return };
        let to_provider = c.is_some();
        self.say(|| format!("link {id} closed by the {}: {reason}", if to_provider { "consumer" } else { "provider" }));
        self.send(id, to_provider, None, Payload::Down(reason.clone()));
        let Some(link) = self.links.get_mut(&id).filter(|l| !l.closed) else { return };
        link.closed = true;
        let (end, epoch) = (link.provider_end, link.provider_epoch);
        if let Some(p) = p {
            self.tell_provider(p, epoch, ProviderEvent::LinkDown { link: end });
        }
    }

    /// Something between the two breaks: both sides notice, nothing more arrives.
    pub fn break_links(&mut self, c: usize, p: usize) {
        let ids: Vec<u64> =
            self.links.iter().filter(|(_, l)| l.consumer == c && l.provider == p).map(|(id, _)| *id).collect();
        for id in ids {
            self.break_link(id);
        }
        self.settle();
    }

    pub(super) fn break_link(&mut self, id: u64) {
        let Some(link) = self.links.remove(&id) else { return };
        let reason = "the connection was lost".to_owned();
        self.say(|| format!("link {id} breaks"));
        self.tell_consumer(
            link.consumer,
            link.consumer_epoch,
            ConsumerEvent::LinkDown { link: link.consumer_end, reason, lost: true },
        );
        self.tell_provider(link.provider, link.provider_epoch, ProviderEvent::LinkDown { link: link.provider_end });
    }

    /// A process died: its links go with it. `heard`: the other sides are told at once.
    pub(super) fn cut_links_of(&mut self, consumer: Option<usize>, provider: Option<usize>) {
        let hit = |l: &Link| consumer == Some(l.consumer) || provider == Some(l.provider);
        let ids: Vec<u64> = self.links.iter().filter(|(_, l)| hit(l)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.break_link(id));
    }

    pub(super) fn deliver(&mut self, id: u64, to_provider: bool, stream: Option<StreamId>, payload: Payload) {
        let Some(link) = self.links.get(&id) else { return };
        let down = matches!(payload, Payload::Down(_));
        if to_provider {
            let (p, epoch, link) = (link.provider, link.provider_epoch, link.provider_end);
            let event = match payload {
                Payload::Up => return,
                Payload::Closed => ProviderEvent::StreamClosed { link, stream: stream.unwrap() },
                Payload::Down(_) => ProviderEvent::LinkDown { link },
                Payload::Frame(bytes) => match stream {
                    None => {
                        let frame: ConsumerControl = frame::decode(&bytes).expect("ours decode");
                        ProviderEvent::Control { link, frame }
                    }
                    Some(stream) => {
                        let frame: ConsumerFrame = frame::decode(&bytes).expect("ours decode");
                        ProviderEvent::Request { link, stream, frame }
                    }
                },
            };
            self.say(|| format!("-> provider {p}: {}", short(&format!("{event:?}"))));
            self.tell_provider(p, epoch, event);
        } else {
            let (c, epoch, link) = (link.consumer, link.consumer_epoch, link.consumer_end);
            let event = match payload {
                Payload::Up => ConsumerEvent::LinkUp { link },
                Payload::Closed => ConsumerEvent::StreamClosed { link, stream: stream.unwrap() },
                Payload::Down(reason) => ConsumerEvent::LinkDown { link, reason, lost: false },
                Payload::Frame(bytes) => match stream {
                    None => {
                        let frame: ProviderControl = frame::decode(&bytes).expect("ours decode");
                        ConsumerEvent::Control { link, frame }
                    }
                    Some(stream) => {
                        let frame: ProviderFrame = frame::decode(&bytes).expect("ours decode");
                        ConsumerEvent::Frame { link, stream, frame }
                    }
                },
            };
            self.say(|| format!("-> consumer {c}: {}", short(&format!("{event:?}"))));
            self.tell_consumer(c, epoch, event);
        }
        if down {
            self.links.remove(&id);
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(140).collect()
}
