#!/usr/bin/env bash
# The API beside llama.cpp's own server, which comes as a Python wheel into the cache: bench-api.sh [ARGUMENTS of bench-api.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

version=2026.10.11549
folder="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/xllamacpp-$version"
if [ ! -e "$folder/.installed" ]; then
    echo "bench-api: installing xllamacpp $version into $folder" >&2
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --only-binary :all: \
        --target "$folder" "xllamacpp==$version" >&2
    touch "$folder/.installed"
fi
export NO_PROXY=127.0.0.1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$folder"
exec python3 tests/scripts/bench-api.py "$SATGRID_BIN" "$(tests/scripts/model.sh)" "$@"
