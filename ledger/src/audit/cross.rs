//! Both parties' exports of the same sessions, held against each other.

use super::{Finding, Party, Report, Rule, SessionSummary};
use satgrid_types::{NodeKey, SessionId};
use std::collections::{BTreeMap, BTreeSet};

/// Compares two reports made with [`super::Detail::Sessions`], one of each side: quotes, receipts, slices, requests that
/// were broken off, per-session totals to the msat, and the provider's inclusion promises against its log.
///
/// A session that only one export holds is a finding once anything was paid under it.
/// Each side's own findings are in its own report; these are only about where the two differ. Sessions with third
/// parties are passed over.
pub fn cross_check(a: &Report, b: &Report) -> Vec<Finding> {
    let mut findings = Vec::new();
    let shared = sessions_between(a, b).chain(sessions_between(b, a)).collect::<BTreeSet<_>>();
    for id in shared {
        match (a.sessions.get(&id), b.sessions.get(&id)) {
            // Two files of one side have nothing to say about the other: least of all that it broke a promise.
            (Some(one), Some(other)) if one.as_provider == other.as_provider => findings.push(Finding {
                rule: Rule::CrossMismatch,
                entry: None,
                session: Some(id),
                party: Party::Exporter,
                detail: format!("both exports are {}s'", if one.as_provider { "provider" } else { "consumer" }),
            }),
            (Some(one), Some(other)) => {
                let (provider, consumer) = if one.as_provider { (one, other) } else { (other, one) };
                compare(id, provider, consumer, &mut findings);
            }
            // An opening that was lost on its way, with nothing paid under it, is nobody's concern.
            (Some(only), None) | (None, Some(only)) if only.paid_msat == 0 && only.charged_msat == 0 => {}
            (Some(only), None) | (None, Some(only)) => findings.push(Finding {
                rule: Rule::CrossMissing,
                entry: None,
                session: Some(id),
                // Whose export lacks it: the other side of whoever has it.
                party: if only.as_provider { consumer_of(only) } else { provider_of(only) },
                detail: "the session is in one export only".into(),
            }),
            (None, None) => {}
        }
    }
    findings
}

/// Sessions of `a` that its counterparty's export `b` should hold too.
fn sessions_between(a: &Report, b: &Report) -> impl Iterator<Item = SessionId> {
    let others: Vec<NodeKey> = b.keys.iter().copied().chain([b.node]).collect();
    let whole = |report: &Report| report.filter == crate::bundle::Filter::All;
    let (b_has, both_whole) = (b.sessions.keys().copied().collect::<BTreeSet<_>>(), whole(a) && whole(b));
    let ids = a.sessions.iter().filter(move |(id, summary)| {
        // A provider cannot tell whose a session key is: only the consumer's export can miss one of the provider's.
        b_has.contains(id)
            || (both_whole
                && !summary.as_provider
                && summary.provider.is_some_and(|provider| others.contains(&provider)))
    });
    ids.map(|(id, _)| *id).collect::<Vec<_>>().into_iter()
}

fn provider_of(summary: &SessionSummary) -> Party {
    summary.provider.map_or(Party::Exporter, Party::Provider)
}
fn consumer_of(summary: &SessionSummary) -> Party {
    summary.consumer.map_or(Party::Exporter, Party::Consumer)
}

fn compare(id: SessionId, provider: &SessionSummary, consumer: &SessionSummary, findings: &mut Vec<Finding>) {
    let mut differ = |what: &str, provider: String, consumer: String| {
        if provider != consumer {
            findings.push(Finding {
                rule: Rule::CrossMismatch,
                entry: None,
                session: Some(id),
                party: Party::Exporter,
                detail: format!("{what}: the provider has {provider}, the consumer {consumer}"),
            });
        }
    };
    let sorted = |quotes: &[String]| quotes.iter().cloned().collect::<BTreeSet<_>>();
    // A quote that was given and lost on its way is in the provider's journal alone.
    let (given, taken) = (sorted(&provider.quotes), sorted(&consumer.quotes));
    if !taken.is_subset(&given) {
        differ("quotes", format!("{given:?}"), format!("{taken:?}"));
    }
    differ("receipts", provider.receipts.to_string(), consumer.receipts.to_string());
    differ("last receipt", format!("{:?}", provider.last_receipt), format!("{:?}", consumer.last_receipt));
    differ("slices", format!("{:?}", provider.slices), format!("{:?}", consumer.slices));
    // A request that nobody acknowledged costs nothing, and may never have reached the provider.
    let owed = |s: &SessionSummary| {
        s.abandoned.iter().filter(|(_, a)| a.0.is_some()).map(|a| format!("{a:?}")).collect::<Vec<_>>()
    };
    differ("abandoned requests", owed(provider).join(", "), owed(consumer).join(", "));
    differ("prompt tokens", provider.prompt_tokens.to_string(), consumer.prompt_tokens.to_string());
    differ("output tokens", provider.output_tokens.to_string(), consumer.output_tokens.to_string());
    differ("numerators", provider.numerators.to_string(), consumer.numerators.to_string());
    differ("paid msat", provider.paid_msat.to_string(), consumer.paid_msat.to_string());
    differ("charged msat", provider.charged_msat.to_string(), consumer.charged_msat.to_string());
    differ("credit msat", provider.credited_msat.to_string(), consumer.credited_msat.to_string());
    differ("credit spent elsewhere msat", provider.spent_msat.to_string(), consumer.spent_msat.to_string());
    differ("refunded msat", provider.refunded_msat.to_string(), consumer.refunded_msat.to_string());
    // What was signed by one side cannot be missing at the other's doing alone: a request is journalled before it is sent,
    // an invoice or a credit note before it is given.
    let mut lacks = |what: &str, missing: usize, party: Party| {
        if missing > 0 {
            findings.push(Finding {
                rule: Rule::CrossMismatch,
                entry: None,
                session: Some(id),
                party,
                detail: format!("{missing} {what} that its own key signed are not in its journal"),
            });
        }
    };
    lacks("requests", provider.requests.difference(&consumer.requests).count(), consumer_of(consumer));
    lacks("invoices", consumer.invoices.difference(&provider.invoices).count(), provider_of(provider));
    lacks("credit notes", consumer.notes.difference(&provider.notes).count(), provider_of(provider));
    let logged: BTreeMap<[u8; 32], (u64, satgrid_types::Digest)> =
        provider.logged.iter().map(|(receipt, index, leaf)| (*receipt, (*index, *leaf))).collect();
    for (receipt, index, leaf) in &consumer.promised {
        if logged.get(receipt) != Some(&(*index, *leaf)) {
            findings.push(Finding {
                rule: Rule::PromiseBroken,
                entry: Some(*index),
                session: Some(id),
                party: provider_of(provider),
                detail: format!("promised leaf {leaf} at {index}, the log holds {:?}", logged.get(receipt)),
            });
        }
    }
}
