#!/usr/bin/env bash
# Bans, licences and sources always; advisories where their database can be fetched (say so where it cannot).
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh deny
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

cargo deny --log-level error check bans licenses sources
if timeout 30 cargo deny --log-level off fetch db >/dev/null 2>&1; then
    cargo deny --log-level error check --disable-fetch advisories
else
    echo "deny: the advisory database is not reachable from here; advisories were not checked" >&2
fi
