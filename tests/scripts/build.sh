#!/usr/bin/env bash
# Builds what is shipped: `satgrid` with every adapter, and the auditor's `satgrid-ledger`.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh build
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

if [ ! -x "$SATGRID_BIN" ]; then
    echo "build: the first build compiles llama.cpp and a Lightning node: about 10 minutes on 4 cores, 20 on 2" >&2
fi
exec cargo build $LOCKED -p satgrid -p satgrid-ledger-cli
