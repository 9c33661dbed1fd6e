#!/usr/bin/env bash
# `make build-native`: the shipped binaries with llama.cpp compiled for this very processor (AVX-512, VNNI, AMX, where it has
# them) in place of the common one (AVX2) that every build shares. They run on processors like this one alone, and compute other
# bits than the common build: their listings say so by build and instruction set, and parts of one model want one of the two.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/scripts/bootstrap.sh build
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

# A target folder of its own: the flags differ from the default build's, and the two must not take turns recompiling.
export CARGO_TARGET_DIR="${NATIVE_TARGET_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/native}"

# What the system says of the processor, and the option of ggml that uses it.
known="avx512f:GGML_AVX512 avx512_vnni:GGML_AVX512_VNNI avx512vbmi:GGML_AVX512_VBMI avx512_bf16:GGML_AVX512_BF16
avx_vnni:GGML_AVX_VNNI amx_tile:GGML_AMX_TILE amx_int8:GGML_AMX_INT8"
has="$(grep -m1 '^flags' /proc/cpuinfo 2>/dev/null || true) "
used=()
for pair in $known; do
    if [[ "$has" == *" ${pair%%:*} "* ]]; then
        export "${pair#*:}=ON"
        used+=("${pair#*:}")
    fi
done
if [ ${#used[@]} -eq 0 ]; then
    echo "build-native: this processor has nothing that the common build leaves out; \`make build\` is as fast" >&2
    exit 1
fi
echo "== for this processor: ${used[*]} (llama.cpp compiles anew: minutes)"
cargo build $LOCKED -p satgrid -p satgrid-ledger-cli
echo "== $CARGO_TARGET_DIR/debug/satgrid, satgrid-ledger"
