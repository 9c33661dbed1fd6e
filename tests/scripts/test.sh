#!/usr/bin/env bash
# `make test`: everything that must hold, cheapest first, with the time of each step.
#   test.sh        all
#   test.sh fast   what takes seconds once built: format, light clippy, light tests
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${1:-all}" != fast ]; then
    tests/scripts/bootstrap.sh build
    tests/scripts/bootstrap.sh postgres
fi
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh
# shellcheck source=tests/scripts/phases.sh
. tests/scripts/phases.sh

phase "format" tests/scripts/lint.sh format
phase "clippy, light crates" tests/scripts/lint.sh light
phase "tests, light crates" cargo test $LOCKED
if [ "${1:-all}" = fast ]; then exit 0; fi
phase "golden vectors are current" cargo run $LOCKED -q -p satgrid-ledger --example make_vectors --features testing -- --check
phase "second verifier" tests/interop/run.sh

phase "deny" tests/scripts/deny.sh
phase "build" tests/scripts/build.sh
phase "clippy, heavy crates" tests/scripts/lint.sh heavy
phase "tests, heavy crates" cargo test $LOCKED -p satgrid-engine-llama -p satgrid-wallet-ldk -p satgrid-devnet -p satgrid
phase "end to end" tests/scripts/e2e.sh
phase "conformance" tests/scripts/conformance.sh short
