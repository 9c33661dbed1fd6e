#!/usr/bin/env bash
# Runs the second verifier over every golden vector, then over each bundle given (or both parties' bundles: A.bundle,B.bundle).
#
#   tests/interop/run.sh [FILE | A,B]...      exit 0 if all vectors agree and every bundle is clean, else 1 or 2
#
# Needs python3 with venv. The environment goes under the user's cache; nothing is installed elsewhere.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/interop-venv
stamp=$venv/.installed-$(sha256sum <"$here/requirements.txt" | cut -c1-16)
if [[ ! -e $stamp ]]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
  touch "$stamp"
fi
export PYTHONDONTWRITEBYTECODE=1
status=0
"$venv/bin/python" "$here/verify.py" --vectors "$here/../vectors" || status=$?
for bundle in "$@"; do
  # shellcheck disable=SC2086 # two files are given as one argument, with a comma between
  code=0
  verdict=$("$venv/bin/python" "$here/verify.py" ${bundle//,/ }) || code=$?
  echo "$bundle: $verdict"
  ((code > status)) && status=$code
done
exit "$status"
