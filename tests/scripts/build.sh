#!/usr/bin/env bash
# Builds what is shipped: `satgrid` with every adapter, and the auditor's `satgrid-ledger`.
#   build.sh           as tests and the demo run it
#   build.sh release   optimised across crates: a third less processor time in the nodes for each token
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh build
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

if [ "${1:-}" = release ]; then
    echo "build: everything compiles anew and is optimised across crates: half an hour on 2 cores, 8 GB of disk" >&2
    exec cargo build --release $LOCKED -p satgrid -p satgrid-ledger-cli
fi
if [ ! -x "$SATGRID_BIN" ]; then
    echo "build: the first build compiles llama.cpp and a Lightning node: about 10 minutes on 4 cores, 20 on 2" >&2
fi
exec cargo build $LOCKED -p satgrid -p satgrid-ledger-cli
