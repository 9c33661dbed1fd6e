#!/usr/bin/env bash
# `make test-wallet` and `make bench-wallet`: the wallet on real Lightning nodes.
#   wallet.sh          the port's suites, just-in-time channels, the short kill trials, apps over Nostr Wallet Connect
#   KILLS=100 wallet.sh       the long kill trials too, with the Lightning node killed (inside) and not (apart)
#   BITCOIND="$(tests/scripts/bitcoind.sh)" wallet.sh  the chain conformance against a real bitcoind too
#   wallet.sh bench    payment times as ratios from one run, the first earned sat, a start after 10,000 payments
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh build
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh
# shellcheck source=tests/scripts/phases.sh
. tests/scripts/phases.sh
# The daemon is named too: one set of features, so that ldk-node is built once.
heavy=(-p satgrid -p satgrid-wallet-ldk)

if [ "${1:-test}" = bench ]; then
  for what in payments_over_a_direct_channel first_earned_sat start_after_many_payments; do
    cargo test $LOCKED "${heavy[@]}" --test speed -- --ignored --nocapture --exact "$what"
  done
  exit
fi
phase "wallet, fake and apps" cargo test $LOCKED -p satgrid-wallet -p satgrid-wallet-nwc
phase "real nodes" cargo test $LOCKED "${heavy[@]}" --test two_nodes --test process --test just_in_time --test restored --test cold --test bad_luck
phase "kill -9, short" cargo test $LOCKED "${heavy[@]}" --test killed -- --nocapture
if [ -n "${KILLS:-}" ]; then
  phase "kill -9, $KILLS times" cargo test $LOCKED "${heavy[@]}" --test killed -- --ignored --exact trials --nocapture
fi
if [ -n "${BITCOIND:-}" ]; then
  phase "a real bitcoind" cargo test $LOCKED "${heavy[@]}" --test bitcoind -- --ignored --nocapture
fi
if command -v electrum >/dev/null; then
  phase "the daemon" cargo build $LOCKED -p satgrid
  phase "a node that is not ours (electrum)" python3 tests/interop/electrum/run.py
fi
if command -v npm >/dev/null; then
  phase "an app that is not ours (@getalby/sdk)" tests/interop/nwc/run.sh
fi
