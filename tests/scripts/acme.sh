#!/usr/bin/env bash
# The front door's certificate against Let's Encrypt's own test server, pebble, out of Debian's package: signed, served, kept,
# renewed, and an authority that finds no answer. SATGRID_PEBBLE names a folder that has `pebble` and `pebble-challtestsrv` already.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh
cache="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/pebble"
if [ -z "${SATGRID_PEBBLE:-}" ]; then
  if [ ! -x "$cache/usr/bin/pebble" ]; then
    fetch="$(mktemp -d)"
    trap 'rm -rf "$fetch"' EXIT
    (cd "$fetch" && apt-get download pebble >&2) || {
      echo "error: Debian's package pebble cannot be fetched" >&2
      echo "hint: SATGRID_PEBBLE=/folder/with/pebble uses one of yours" >&2
      exit 1
    }
    mkdir -p "$cache"
    dpkg -x "$fetch"/pebble_*.deb "$cache"
  fi
  export SATGRID_PEBBLE="$cache/usr/bin"
fi
# With the other heavy crates, so that features and so what is built are the same as everywhere.
cargo test ${LOCKED:-} -p satgrid-engine-llama -p satgrid-wallet-ldk -p satgrid-devnet -p satgrid --bins door::acme -- --include-ignored
