#!/usr/bin/env bash
# lint.sh format|light|heavy: rustfmt, or clippy with warnings as errors on the light or on the heavy crates.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

# A minimal toolchain may come without the two components.
if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
    echo "lint: adding rustfmt and clippy to the toolchain" >&2
    rustup component add rustfmt clippy >&2
fi
case "${1:?format, light or heavy}" in
format) cargo fmt --all --check ;;
light) cargo clippy $LOCKED --all-targets -- -D warnings ;;
heavy) cargo clippy $LOCKED --all-targets -p satgrid-engine-llama -p satgrid-wallet-ldk -p satgrid-devnet -p satgrid -- -D warnings ;;
*) echo "error: lint.sh knows format, light and heavy" >&2 && exit 2 ;;
esac
