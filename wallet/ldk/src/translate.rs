//! ldk-node's values as the port's. Total functions, no effects.

use ldk_node::{
    Node, NodeError,
    bitcoin::secp256k1::PublicKey,
    lightning::{
        events::{ClosureReason, PaymentFailureReason},
        ln::types::ChannelId as LdkChannelId,
    },
    payment::{PaymentDetails, PaymentDirection, PaymentKind, PaymentStatus},
};
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use satgrid_wallet::{ChannelId, Direction, FailureReason, PaymentRecord, PaymentState, WalletError, WalletEvent};

pub(crate) fn public_key(key: &LightningKey) -> Result<PublicKey, WalletError> {
    PublicKey::from_slice(&key.0).map_err(|_| WalletError::Node { reason: format!("{key} is not a node id") })
}
pub(crate) fn node_key(key: &PublicKey) -> LightningKey {
    LightningKey(key.serialize())
}
pub(crate) fn channel_id(id: &LdkChannelId) -> ChannelId {
    ChannelId(id.0)
}

pub(crate) fn wallet_error(error: NodeError) -> WalletError {
    if error == NodeError::NotRunning { WalletError::Stopped } else { WalletError::Node { reason: error.to_string() } }
}

/// A Lightning payment's row; `None` for what is on chain or has no hash yet.
pub(crate) fn record(details: PaymentDetails) -> Option<PaymentRecord> {
    let (hash, preimage) = match &details.kind {
        PaymentKind::Bolt11 { hash, preimage, .. }
        | PaymentKind::Bolt11Jit { hash, preimage, .. }
        | PaymentKind::Spontaneous { hash, preimage } => (*hash, *preimage),
        PaymentKind::Bolt12Offer { hash, preimage, .. } | PaymentKind::Bolt12Refund { hash, preimage, .. } => {
            ((*hash)?, *preimage)
        }
        PaymentKind::Onchain { .. } => return None,
    };
    let amount = Msat(details.amount_msat.unwrap_or(0));
    let fee = Msat(details.fee_paid_msat.unwrap_or(0));
    let state = match (details.status, preimage) {
        (PaymentStatus::Pending, _) => PaymentState::InFlight,
        (PaymentStatus::Succeeded, Some(preimage)) => {
            PaymentState::Settled { preimage: Preimage(preimage.0), fee, amount }
        }
        // A success is written together with its preimage; without one it proves nothing.
        (PaymentStatus::Succeeded, None) => PaymentState::InFlight,
        (PaymentStatus::Failed, _) => PaymentState::Failed { reason: FailureReason::Other },
    };
    let direction = match details.direction {
        PaymentDirection::Inbound => Direction::Inbound,
        PaymentDirection::Outbound => Direction::Outbound,
    };
    let at = UnixMs::from_secs(details.latest_update_timestamp);
    Some(PaymentRecord { hash: PaymentHash(hash.0), direction, amount, fee, state, at })
}

/// An event as the port has it. The node is asked for what ldk-node left out of it.
pub(crate) fn event(node: &Node, event: ldk_node::Event) -> WalletEvent {
    use ldk_node::Event as E;
    match event {
        E::PaymentSuccessful { payment_hash, payment_preimage: Some(preimage), fee_paid_msat, .. } => {
            WalletEvent::PaymentSettled {
                hash: PaymentHash(payment_hash.0),
                preimage: Preimage(preimage.0),
                fee: Msat(fee_paid_msat.unwrap_or(0)),
            }
        }
        E::PaymentFailed { payment_hash: Some(hash), reason, .. } => {
            WalletEvent::PaymentFailed { hash: PaymentHash(hash.0), reason: failure(reason) }
        }
        E::PaymentReceived { payment_hash, amount_msat, .. } => {
            WalletEvent::PaymentReceived { hash: PaymentHash(payment_hash.0), amount: Msat(amount_msat) }
        }
        E::ChannelPending { channel_id: id, counterparty_node_id, .. } => {
            WalletEvent::ChannelPending { channel: channel_id(&id), counterparty: node_key(&counterparty_node_id) }
        }
        E::ChannelReady { channel_id: id, counterparty_node_id: Some(peer), .. } => {
            let details = node.list_channels().into_iter().find(|c| c.channel_id == id);
            WalletEvent::ChannelReady {
                channel: channel_id(&id),
                counterparty: node_key(&peer),
                // A channel that is gone already is not one to extend credit on.
                funding_confirmed: details.as_ref().is_some_and(|c| c.confirmations.unwrap_or(0) > 0),
                we_opened: details.is_some_and(|c| c.is_outbound),
            }
        }
        E::ChannelClosed { channel_id: id, counterparty_node_id, reason, .. } => WalletEvent::ChannelClosed {
            channel: channel_id(&id),
            counterparty: counterparty_node_id.as_ref().map(node_key),
            forced: reason.as_ref().is_some_and(is_forced),
            reason: reason.map_or_else(|| "no reason was kept".to_owned(), |r| r.to_string()),
        },
        // Events of old versions with missing fields, forwarding, manual claims and splices: none of ours.
        other @ (E::PaymentSuccessful { .. }
        | E::PaymentFailed { .. }
        | E::PaymentForwarded { .. }
        | E::PaymentClaimable { .. }
        | E::ChannelReady { .. }
        | E::SplicePending { .. }
        | E::SpliceFailed { .. }) => WalletEvent::Other { what: format!("{other:?}") },
    }
}

/// Whether a commitment transaction goes out, so that our share waits for its delay.
fn is_forced(reason: &ClosureReason) -> bool {
    match reason {
        ClosureReason::HolderForceClosed { broadcasted_latest_txn, .. } => *broadcasted_latest_txn != Some(false),
        ClosureReason::CounterpartyForceClosed { .. }
        | ClosureReason::CommitmentTxConfirmed
        | ClosureReason::ProcessingError { .. }
        | ClosureReason::OutdatedChannelManager
        | ClosureReason::HTLCsTimedOut { .. }
        | ClosureReason::PeerFeerateTooLow { .. } => true,
        ClosureReason::LegacyCooperativeClosure
        | ClosureReason::CounterpartyInitiatedCooperativeClosure
        | ClosureReason::LocallyInitiatedCooperativeClosure
        | ClosureReason::FundingTimedOut
        | ClosureReason::DisconnectedPeer
        | ClosureReason::CounterpartyCoopClosedUnfundedChannel
        | ClosureReason::LocallyCoopClosedUnfundedChannel
        | ClosureReason::FundingBatchClosure => false,
    }
}

fn failure(reason: Option<PaymentFailureReason>) -> FailureReason {
    match reason {
        Some(PaymentFailureReason::RouteNotFound) => FailureReason::NoRoute,
        Some(PaymentFailureReason::RetriesExhausted) => FailureReason::RetriesExhausted,
        Some(PaymentFailureReason::RecipientRejected) => FailureReason::Rejected,
        Some(PaymentFailureReason::PaymentExpired) => FailureReason::Expired,
        Some(
            PaymentFailureReason::UserAbandoned
            | PaymentFailureReason::UnexpectedError
            | PaymentFailureReason::UnknownRequiredFeatures
            | PaymentFailureReason::InvoiceRequestExpired
            | PaymentFailureReason::InvoiceRequestRejected
            | PaymentFailureReason::BlindedPathCreationFailed,
        )
        | None => FailureReason::Other,
    }
}
