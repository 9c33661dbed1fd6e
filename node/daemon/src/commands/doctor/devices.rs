//! The devices that engines can compute on, and what keeps a graphics card from being one of them.
//!
//! The engine's child lists them, since a driver that crashes must not take the doctor along. Where a card is present but not
//! usable, the finding names the first missing piece: the build, the backend's library, the driver.

use std::path::Path;

use satgrid_engine_llama::{Device, DeviceKind, LOADS_BACKENDS, libraries_beside, list_devices};

use super::{Finding, fail, ok, warn};
use crate::config::Config;
use crate::drive::engines::worker_program;
use crate::progress::megabytes;

/// How the operator gets a card to work; the same page for every lack.
const PAGE: &str = "docs/operating/gpu.md";

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let listed = worker_program().and_then(|program| {
        let libraries = libraries_beside(&program.exe);
        Ok((list_devices(&program)?, libraries))
    });
    let (devices, libraries) = match listed {
        Ok(listed) => listed,
        Err(error) => {
            let remedy = format!("a backend's library beside the program may not match its driver: see {PAGE}");
            return vec![fail("devices", format!("the engine's process cannot list them: {error}"), remedy)];
        }
    };
    let mut found: Vec<Finding> = devices.iter().map(|device| ok("device", describe(device))).collect();
    let usable = devices.iter().any(|d| matches!(d.kind, DeviceKind::Gpu | DeviceKind::Integrated));
    if !usable && let Some(card) = card_in_sight(Path::new("/")) {
        let (lack, remedy) = first_lack(LOADS_BACKENDS, &libraries, &card);
        found.push(warn("device", format!("{} is not used: {lack}", card.what), remedy));
    }
    for model in &config.provider.models {
        let Some(name) = model.device.as_deref().filter(|name| !name.eq_ignore_ascii_case("cpu")) else { continue };
        if !devices.iter().any(|device| device.name.eq_ignore_ascii_case(name)) {
            let known = devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
            let what = format!("{} wants {name}; there are: {known}", model.listed_name());
            found.push(fail("device", what, format!("name one of these, or remove `device`; see {PAGE}")));
        }
    }
    found
}

fn describe(device: &Device) -> String {
    let memory = if device.total == 0 {
        String::new()
    } else {
        format!(", {} of {} free", megabytes(device.free), megabytes(device.total))
    };
    format!("{} ({}): {}{memory}", device.name, device.kind.name(), device.description)
}

/// A card that the system shows, whoever can use it.
struct Card {
    what: String,
    /// The library that lets programs speak with it, and whether the system's driver is loaded.
    backend: &'static str,
    driver: Option<String>,
}

fn card_in_sight(root: &Path) -> Option<Card> {
    let nvidia = root.join("proc/driver/nvidia/version");
    if let Ok(text) = std::fs::read_to_string(&nvidia) {
        let driver = text.lines().next().unwrap_or_default().trim().to_owned();
        return Some(Card { what: "an NVIDIA card".into(), backend: "cuda", driver: Some(driver) });
    }
    let devices = std::fs::read_dir(root.join("sys/bus/pci/devices")).ok()?;
    let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    devices.flatten().map(|entry| entry.path()).find_map(|path| {
        // PCI class 03: display controllers; 0302 is NVIDIA's class for cards without a display.
        if !text(&path.join("class")).starts_with("0x03") {
            return None;
        }
        match text(&path.join("vendor")).as_str() {
            "0x10de" => Some(Card { what: "an NVIDIA card".into(), backend: "cuda", driver: None }),
            "0x1002" => Some(Card { what: "an AMD card".into(), backend: "vulkan", driver: Some(String::new()) }),
            "0x8086" => Some(Card { what: "an Intel card".into(), backend: "vulkan", driver: Some(String::new()) }),
            _ => None,
        }
    })
}

fn first_lack(build: bool, libraries: &[String], card: &Card) -> (String, String) {
    let library = format!("libggml-{}.so", card.backend);
    if card.driver.is_none() {
        return ("its driver is not loaded".into(), format!("install the vendor's driver and load it; see {PAGE}"));
    }
    if !build {
        return ("this build links the processor's backend alone".into(), format!("make build-gpu; see {PAGE}"));
    }
    if !libraries.contains(&library) {
        return (format!("{library} does not lie beside the program"), format!("make build-gpu; see {PAGE}"));
    }
    let driver = card.driver.as_deref().unwrap_or_default();
    let lack = format!("{library} is there and finds no card (driver: {driver})");
    (lack, format!("build the backend for this card and driver: see {PAGE}, \"The backend finds no card\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lack_is_named() {
        let card =
            |driver: Option<&str>| Card { what: "a card".into(), backend: "cuda", driver: driver.map(str::to_owned) };
        let library = ["libggml-cpu.so".to_owned(), "libggml-cuda.so".to_owned()];
        let rows = [
            (true, &library[..], None, "driver is not loaded"),
            (false, &[], Some("580"), "processor's backend alone"),
            (true, &library[..1], Some("580"), "does not lie beside"),
            (true, &library[..], Some("580"), "finds no card (driver: 580)"),
        ];
        for (build, libraries, driver, expect) in rows {
            let (lack, remedy) = first_lack(build, libraries, &card(driver));
            assert!(lack.contains(expect), "{lack}");
            assert!(remedy.contains(PAGE));
        }
    }

    #[test]
    fn a_card_is_seen_by_its_driver_or_on_the_bus() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert!(card_in_sight(root.path()).is_none());
        write("sys/bus/pci/devices/0000:00:01.0/class", "0x060000\n");
        write("sys/bus/pci/devices/0000:00:01.0/vendor", "0x10de\n");
        assert!(card_in_sight(root.path()).is_none(), "a bridge is no card");
        write("sys/bus/pci/devices/0000:00:02.0/class", "0x030200\n");
        write("sys/bus/pci/devices/0000:00:02.0/vendor", "0x10de\n");
        assert!(card_in_sight(root.path()).unwrap().driver.is_none());
        write("proc/driver/nvidia/version", "NVRM version: 580.1\nGCC\n");
        assert_eq!(card_in_sight(root.path()).unwrap().driver.as_deref(), Some("NVRM version: 580.1"));
    }
}
