//! The commented file that `satgrid init` writes: every key with its meaning; what is not set shows its default.

use std::collections::BTreeMap;

use super::keys::{KEYS, Kind, Preset, SECTIONS};

/// The text of a new file. `set` holds TOML text by key.
pub(crate) fn render(set: &BTreeMap<&str, String>, offer_models: bool) -> String {
    let mut text = String::from(
        "# satgrid. `satgrid config check` prints what will be used and where it came from.\n\
         # Precedence: flag, then environment (SATGRID_SECTION_KEY), then this file, then the default shown behind `#`.\n",
    );
    for (section, purpose) in SECTIONS {
        text.push_str(&format!("\n# {purpose}\n[{section}]\n"));
        for key in KEYS.iter().filter(|key| key.section() == *section) {
            let tables = matches!(key.kind, Kind::Tables(_));
            let line = match (set.get(key.path), key.preset) {
                (Some(value), _) => format!("{} = {value}", key.name()),
                (None, _) if tables => continue,
                (None, Preset::Value(value)) => format!("# {} = {value}", key.name()),
                (None, Preset::Derived(how)) => format!("# {} = ({how})", key.name()),
                (None, Preset::Unset) => format!("# {} =", key.name()),
            };
            text.push_str(&format!("{line:<44} # {}\n", key.help));
        }
        match *section {
            "api" => text.push_str(API_KEYS),
            "provider" => {
                text.push_str(&if offer_models { MODELS.replace("# ", "") } else { MODELS.to_owned() });
                text.push_str(PARTS);
            }
            _ => {}
        }
    }
    text
}

const API_KEYS: &str = "\n# [[api.keys]]\n# name = \"laptop\"\n# secret = \"file:keys/laptop\"\n";

const MODELS: &str = "\n# [[provider.models]]\n# name = \"gemma-3-270m\"\n# price_in_msat_per_mtok = 1000000\n\
    # price_out_msat_per_mtok = 4000000\n# profile = \"exact\"\n# slots = 8\n# context = 2048\n";

/// Layers for sale, and a model whose middle layers are bought: files made by `satgrid models split`.
const PARTS: &str = "\n# [[provider.stages]]\n# path = \"middle.gguf\"\n\
    # price_msat_per_million_position_layers = 2000000\n\n# [[provider.packs]]\n\
    # path = \"model.experts-1.gguf\"\n# price_msat_per_million_expert_rows = 500000\n\n# [[provider.leads]]\n# head = \"head.gguf\"\n\
    # tail = \"tail.gguf\"\n# alias = \"my-model\"\n# price_in_msat_per_mtok = 1000000\n\
    # price_out_msat_per_mtok = 4000000\n# max_price_msat_per_million_position_layers = 3000000\n# wire = \"f32\"\n";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Overrides, load};

    /// What is written can be read, and says what was asked.
    #[test]
    fn round_trip() {
        for offer_models in [false, true] {
            let set = BTreeMap::from([("node.network", "\"signet\"".to_owned())]);
            let text = render(&set, offer_models);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("satgrid.toml");
            std::fs::write(&path, &text).unwrap();
            let env = BTreeMap::from([("HOME".to_owned(), "/h".to_owned())]);
            let loaded = load(&Overrides { file: Some(path), values: Vec::new() }, &env).unwrap();
            assert_eq!(loaded.config.node.network.name(), "signet");
            assert_eq!(loaded.config.provider.models.len(), usize::from(offer_models), "{text}");
        }
    }

    #[test]
    fn every_key_is_mentioned() {
        let text = render(&BTreeMap::new(), false);
        for key in KEYS {
            assert!(text.contains(key.name()), "{}", key.path);
        }
    }
}
