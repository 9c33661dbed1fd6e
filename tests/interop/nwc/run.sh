#!/usr/bin/env bash
# Our wallet service against @getalby/sdk, a client that we did not write. Needs node and npm; the packages go under the
# user's cache.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
modules=${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/nwc-$(sha256sum <"$here/package.json" | cut -c1-16)
if [[ ! -e $modules/.installed ]]; then
  mkdir -p "$modules"
  cp "$here/package.json" "$modules/"
  (cd "$modules" && npm install --silent --no-audit --no-fund --ignore-scripts >&2)
  touch "$modules/.installed"
fi
cd "$here/../../.."
cargo build -q ${LOCKED:-} -p satgrid-wallet-nwc --example app_playground
playground=${CARGO_TARGET_DIR:-target}/debug/examples/app_playground
coproc PLAYGROUND { exec "$playground"; }
pid=$PLAYGROUND_PID
read -r world <&"${PLAYGROUND[0]}"
status=0
NWC_MODULES=$modules timeout 60 node "$here/client.mjs" "$world" || status=$?
kill "$pid" 2>/dev/null || true
exit "$status"
