#!/usr/bin/env bash
# The shipped binary, end to end, on a tiny model that the test writes and on the real one. Expects build.sh to have run.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

SATGRID_TEST_MODEL="$(tests/scripts/model.sh)"
export SATGRID_TEST_MODEL
# One at a time: each test starts a whole market of its own.
exec cargo test $LOCKED -p satgrid-tests --test e2e -- --ignored --test-threads 1 --nocapture
