#!/usr/bin/env bash
# Builds Bitcoin Core's bitcoind once, into the cache, and prints its path. For the tests that want a real chain.
#
# The sources are those that the registry's package libbitcoinkernel-sys brings along (no wallet, no GUI). It takes about ten
# minutes of processor time, cmake, a C++20 compiler and Boost's headers (apt-get install libboost-dev).
#   BITCOIND="$(tests/scripts/bitcoind.sh)" make test-wallet
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh
version=0.4.1
cache="${XDG_CACHE_HOME:-$HOME/.cache}/satgrid"
out="$cache/bitcoind/$version"
if [ -x "$out/bin/bitcoind" ]; then
  echo "$out/bin/bitcoind"
  exit 0
fi
[ -e /usr/include/boost/version.hpp ] || {
  echo "error: Boost's headers are missing" >&2
  echo "hint: apt-get install libboost-dev" >&2
  exit 1
}
source_dir() {
  compgen -G "${CARGO_HOME:-$HOME/.cargo}/registry/src/*/libbitcoinkernel-sys-$version/bitcoin" | head -1
}
if [ -z "$(source_dir)" ]; then
  fetch="$(mktemp -d)"
  trap 'rm -rf "$fetch"' EXIT
  mkdir "$fetch/src"
  touch "$fetch/src/lib.rs"
  printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2024"\n[dependencies]\nlibbitcoinkernel-sys = "=%s"\n[workspace]\n' \
    "$version" >"$fetch/Cargo.toml"
  cargo fetch --manifest-path "$fetch/Cargo.toml" >&2
fi
build="${BITCOIND_BUILD:-$cache/bitcoind/build-$version}"
# The package leaves out data, benchmarks and tests.
cmake -B "$build" -S "$(source_dir)" -DCMAKE_BUILD_TYPE=Release -DBUILD_DAEMON=ON -DBUILD_CLI=ON -DENABLE_WALLET=OFF \
  -DBUILD_TESTS=OFF -DBUILD_BENCH=OFF -DBUILD_TX=OFF -DBUILD_UTIL=OFF -DBUILD_UTIL_CHAINSTATE=OFF -DBUILD_BITCOIN_BIN=OFF \
  -DBUILD_WALLET_TOOL=OFF -DBUILD_FUZZ_BINARY=OFF -DBUILD_GUI=OFF -DBUILD_KERNEL_LIB=OFF -DENABLE_EXTERNAL_SIGNER=OFF \
  -DENABLE_IPC=OFF -DWITH_ZMQ=OFF -DWITH_EMBEDDED_ASMAP=OFF -DINSTALL_MAN=OFF >&2
nice cmake --build "$build" --target bitcoind bitcoin-cli --parallel "${JOBS:-2}" >&2
mkdir -p "$out/bin"
cp "$build/bin/bitcoind" "$build/bin/bitcoin-cli" "$out/bin/"
rm -rf "$build"
echo "$out/bin/bitcoind"
