#!/usr/bin/env bash
# Fetches the small real model once, checks it, and prints its path on stdout.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

exec "$SATGRID_BIN" models pull gemma-3-270m
