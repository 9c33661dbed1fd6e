# Sourced by every make target: finds what bootstrap.sh installed and says where cargo builds. Installs nothing itself.
# shellcheck shell=bash

tools_dir="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/tools"

# cmake and libclang from Python wheels, where the system has none.
if ! command -v cmake >/dev/null 2>&1 && [ -x "$tools_dir/cmake/cmake/data/bin/cmake" ]; then
    export PATH="$tools_dir/cmake/cmake/data/bin:$PATH"
fi
# By the names that bindgen looks for: libclang-cpp, which comes with many a graphics driver, is another library.
have_system_libclang() { # [ROOT]
    local name
    for name in "${1:-}"/usr/lib/{llvm-*/lib,*-linux-gnu}/libclang{,-[0-9]*}.so*; do
        if [ -e "$name" ]; then return 0; fi
    done
    return 1
}
if [ -z "${LIBCLANG_PATH:-}" ] && ! have_system_libclang && [ -e "$tools_dir/libclang/clang/native/libclang.so" ]; then
    export LIBCLANG_PATH="$tools_dir/libclang/clang/native"
fi
# libclang without its own headers (the wheel, or Debian's bare library) reads gcc's.
if [ -z "${BINDGEN_EXTRA_CLANG_ARGS:-}" ] && command -v gcc >/dev/null 2>&1 &&
    { [ -n "${LIBCLANG_PATH:-}" ] || ! compgen -G "/usr/lib/llvm-*/lib/clang/*/include/stdbool.h" >/dev/null; }; then
    BINDGEN_EXTRA_CLANG_ARGS="-I$(gcc -print-file-name=include)"
    export BINDGEN_EXTRA_CLANG_ARGS
fi
if [ -x "$tools_dir/deny/bin/cargo-deny" ]; then
    export PATH="$tools_dir/deny/bin:$PATH"
fi

# Locally cargo builds in ./target. CI clones afresh each time, so there the target folder lives in the cache if it can.
if [ "${CI:-}" = true ] && [ -z "${CARGO_TARGET_DIR:-}" ]; then
    ci_target="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid/target"
    if mkdir -p "$ci_target" 2>/dev/null && [ -w "$ci_target" ]; then
        export CARGO_TARGET_DIR="$ci_target"
    fi
fi
# Property tests draw the same cases each time in CI, so that a submission is judged by what it changed; at a desk and in
# the long runs they explore.
if [ "${CI:-}" = true ]; then export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED:-20261122}"; fi
# The shipped binary, for whoever runs it from a script or a test.
SATGRID_BIN="${SATGRID_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/debug/satgrid}"
export SATGRID_BIN
# In CI the lockfile is the law; at a desk cargo may add to it.
LOCKED=""
if [ "${CI:-}" = true ]; then LOCKED="--locked"; fi
export LOCKED
