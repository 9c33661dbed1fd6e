//! Records how llama.cpp was compiled, for the build id: every flag that reached CMake, the C++ compiler, the target.

use std::process::Command;

/// What `tests/scripts/build-native.sh` sets where the processor has it.
const NATIVE: [&str; 7] = [
    "GGML_AVX512",
    "GGML_AVX512_VNNI",
    "GGML_AVX512_VBMI",
    "GGML_AVX512_BF16",
    "GGML_AVX_VNNI",
    "GGML_AMX_TILE",
    "GGML_AMX_INT8",
];

fn main() {
    let mut flags: Vec<String> = std::env::vars()
        .filter(|(name, _)| name.starts_with("GGML_") || name.starts_with("CMAKE_"))
        .filter(|(name, _)| name != "CMAKE_BUILD_PARALLEL_LEVEL")
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    flags
        .extend(std::env::var("CARGO_ENCODED_RUSTFLAGS").ok().map(|f| format!("rustflags={}", f.replace('\x1f', " "))));
    flags.extend(std::env::var("CARGO_CFG_TARGET_FEATURE").ok().map(|f| format!("features={f}")));
    flags.sort();
    emit("SATGRID_ENGINE_FLAGS", &flags.join(";"));
    emit("SATGRID_ENGINE_TARGET", &std::env::var("TARGET").unwrap_or_default());
    emit("SATGRID_ENGINE_COMPILER", &compiler());
    println!("cargo:rerun-if-changed=build.rs");
    let common = ["GGML_LLAMAFILE", "GGML_NATIVE", "GGML_BACKEND_DL", "CXX", "CXXFLAGS", "CFLAGS"];
    for name in common.iter().chain(&NATIVE) {
        println!("cargo:rerun-if-env-changed={name}");
    }
}

/// The first line of the C++ compiler's own `--version`: name, packaging and version.
fn compiler() -> String {
    let name = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&name).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown compiler").to_owned()
}

fn emit(name: &str, value: &str) {
    println!("cargo:rustc-env={name}={}", value.replace(['\n', '\r'], " "));
}
