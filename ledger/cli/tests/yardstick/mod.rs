//! The bare loop that verification is measured against: the same signatures and invoices, and nothing around them.

use satgrid_ledger::{
    Entry, Evidence,
    audit::read_invoice,
    statements::{Ack, Receipt, RequestOpen},
};
use satgrid_types::{NodeKey, verify_body};
use std::collections::BTreeMap;

/// One check for each piece of evidence. Bodies, signatures and keys lie ready: nothing is decoded but invoices. `keys`
/// are the consumers', by session.
pub(crate) fn bare_checks(
    entries: Vec<Entry>,
    keys: &BTreeMap<[u8; 32], NodeKey>,
    provider: NodeKey,
) -> Vec<Box<dyn Fn()>> {
    let mut checks: Vec<Box<dyn Fn()>> = Vec::new();
    for entry in entries {
        match entry.evidence.unwrap() {
            Evidence::Receipt { receipt, .. } => {
                let consumer = keys[&receipt.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<Receipt>(receipt.body(), &provider, receipt.provider_signature()).unwrap();
                    verify_body::<Receipt>(receipt.body(), &consumer, receipt.consumer_signature()).unwrap();
                }));
            }
            Evidence::Ack(ack) => {
                let consumer = keys[&ack.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<Ack>(ack.body(), &provider, ack.provider_signature()).unwrap();
                    verify_body::<Ack>(ack.body(), &consumer, ack.consumer_signature()).unwrap();
                }));
            }
            Evidence::Request(request) => {
                let consumer = keys[&request.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<RequestOpen>(request.body(), &consumer, request.signature()).unwrap();
                }));
            }
            Evidence::Invoice { bolt11, .. } => checks.push(Box::new(move || {
                read_invoice(&bolt11).unwrap();
            })),
            _ => {}
        }
    }
    checks
}
