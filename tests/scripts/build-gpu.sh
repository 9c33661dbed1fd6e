#!/usr/bin/env bash
# `make build-gpu`: the shipped binaries with backends loaded at run time, and the backends that this machine can build,
# together in one folder that can be copied to any machine with a glibc at least as new.
#   BACKENDS="cuda vulkan"   which to build (default: those whose compiler is found)
#   CUDA_ARCH=90-real        the card's architecture (default: what nvcc calls native, else all majors)
#   OUT=target/gpu           where the folder goes
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh build
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

out="${OUT:-target/gpu}"
# A target folder of its own: the flags differ from the default build's, and the two must not take turns recompiling.
export CARGO_TARGET_DIR="${GPU_TARGET_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/gpu-build}"
export GGML_BACKEND_DL=ON

echo "== satgrid with loadable backends, optimised across crates (llama.cpp compiles too: half an hour on 2 cores)"
# What both nodes do for a token counts at a card's speed.
cargo build --release ${LOCKED:-} -p satgrid -p satgrid-ledger-cli --features satgrid/gpu

mkdir -p "$out"
cp "$CARGO_TARGET_DIR/release/satgrid" "$CARGO_TARGET_DIR/release/satgrid-ledger" "$out/"
built="$(ls -dt "$CARGO_TARGET_DIR"/release/build/llama-cpp-sys-2-*/out | head -1)"
# The names that the executable asks for (libllama.so.0 and so on) and the backend modules. -L: no links, real files.
find "$built/lib" "$built/bin" -maxdepth 1 -name 'lib*.so*' -exec cp -L {} "$out/" \; 2>/dev/null || true

backends="${BACKENDS:-}"
if [ -z "$backends" ]; then
    command -v nvcc >/dev/null 2>&1 && backends="cuda"
    command -v glslc >/dev/null 2>&1 && backends="$backends vulkan"
fi
sources="$(dirname "$(cargo metadata --format-version 1 ${LOCKED:-} | python3 -c '
import json, sys
packages = json.load(sys.stdin)["packages"]
print(next(p["manifest_path"] for p in packages if p["name"] == "llama-cpp-sys-2"))')")/llama.cpp"
for backend in $backends; do
    OUT="$out" tests/scripts/build-backend.sh "$backend" "$sources/ggml"
done
if [ -z "${backends// /}" ]; then
    echo "no nvcc and no glslc here: only the processor's backend was built (docs/operating/gpu.md says how to add one)"
fi
echo "== $out"
ls -l "$out"
echo "sources of the backends: $sources/ggml"
"$out/satgrid" engine-worker --devices list
