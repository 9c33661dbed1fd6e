//! With loadable backends, llama.cpp is a set of shared libraries: the program finds them in its own folder, wherever that is
//! carried, and nowhere else.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_GPU").is_some()
        && std::env::var("CARGO_CFG_TARGET_FAMILY").as_deref() == Ok("unix")
    {
        let origin =
            if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("macos") { "@loader_path" } else { "$ORIGIN" };
        println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{origin}");
    }
}
