#!/usr/bin/env bash
# One backend of ggml as a loadable library: build-backend.sh cuda|vulkan|metal GGML_SOURCE_FOLDER
# Needs a C++ compiler, cmake, and the vendor's compiler (nvcc; glslc); no Rust, no network. The sources must be those that
# satgrid was built from: `make build-gpu` passes them, docs/operating/gpu.md says how to carry them to another machine.
set -euo pipefail
backend="$1"
ggml="$(cd "$2" && pwd)"
out="$(mkdir -p "${OUT:-.}" && cd "${OUT:-.}" && pwd)"
work="${WORK:-$(mktemp -d)}"
flags=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_CPU=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF)
case "$backend" in
    # NCCL is for one model over several cards, which here are several processes.
    cuda) flags+=(-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-native}") ;;
    vulkan) flags+=(-DGGML_VULKAN=ON) ;;
    metal) flags+=(-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON) ;;
    *) echo "unknown backend $backend: cuda, vulkan or metal" >&2; exit 2 ;;
esac
if command -v ninja >/dev/null 2>&1; then flags+=(-G Ninja); fi
# The package of the sources leaves this template out, and ggml's CMake file insists on it.
source="$ggml"
if [ ! -e "$ggml/ggml.pc.in" ]; then
    source="$work/ggml"
    mkdir -p "$source"
    cp -R "$ggml/." "$source/"
    touch "$source/ggml.pc.in"
fi
echo "== ggml-$backend from $ggml"
cmake -S "$source" -B "$work/$backend" "${flags[@]}"
cmake --build "$work/$backend" --target "ggml-$backend" --parallel "${JOBS:-$(nproc)}"
find "$work/$backend" -name "libggml-$backend.so" -exec cp -L {} "$out/" \;
ls -l "$out/libggml-$backend.so"
