#!/usr/bin/env bash
# Runs the second verifier over every golden vector, then over each bundle given (or both parties' bundles: A.bundle,B.bundle).
#
#   tests/interop/run.sh [FILE | A,B]...      exit 0 if all vectors agree and every bundle is clean, else 1 or 2
#
# Needs python3 with pip. The packages go under the user's cache; nothing is installed elsewhere.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
packages=${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/interop-$python-$(sha256sum <"$here/requirements.txt" | cut -c1-16)
if [[ ! -e $packages/.installed ]]; then
  python3 -m pip install --quiet --disable-pip-version-check --upgrade --target "$packages" -r "$here/requirements.txt" >&2
  touch "$packages/.installed"
fi
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
status=0
python3 "$here/verify.py" --vectors "$here/../vectors" || status=$?
for bundle in "$@"; do
  # shellcheck disable=SC2086 # two files are given as one argument, with a comma between
  code=0
  verdict=$(python3 "$here/verify.py" ${bundle//,/ }) || code=$?
  echo "$bundle: $verdict"
  ((code > status)) && status=$code
done
exit "$status"
