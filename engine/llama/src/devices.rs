//! Which device a model runs on, and how much of it: decided from what the devices say and what the file needs, before a
//! byte of weights is read.

use std::path::Path;
use std::process::{Command, Stdio};

use satgrid_engine::memory::{DEVICE_OVERHEAD, Fit, Needs};
use satgrid_engine::port::Profile;

use crate::child::WorkerProgram;
use crate::settings::WorkerArgs;

/// Something to compute on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// As `device` in the configuration names it: `CPU`, `CUDA0`, `Vulkan0`, `Metal`.
    pub name: String,
    /// For example `NVIDIA H100 80GB HBM3`.
    pub description: String,
    /// The library that drives it: `CPU`, `CUDA`, `Vulkan`.
    pub backend: String,
    pub kind: DeviceKind,
    /// Bytes.
    pub free: u64,
    pub total: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    Processor,
    Gpu,
    /// Shares the host's memory.
    Integrated,
    /// Helps the processor (BLAS, AMX); holds no model.
    Accelerator,
}

impl DeviceKind {
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Processor => "cpu",
            DeviceKind::Gpu => "gpu",
            DeviceKind::Integrated => "igpu",
            DeviceKind::Accelerator => "accelerator",
        }
    }

    fn parse(name: &str) -> Option<DeviceKind> {
        [DeviceKind::Processor, DeviceKind::Gpu, DeviceKind::Integrated, DeviceKind::Accelerator]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    fn holds_models(self) -> bool {
        matches!(self, DeviceKind::Gpu | DeviceKind::Integrated)
    }
}

/// What the settings ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offload {
    /// A device's name, `cpu` for none, or unset: the graphics card with the most free memory, if there is one.
    pub device: Option<String>,
    /// Layers on the device. Unset: as many as fit.
    pub layers: Option<u32>,
}

impl Offload {
    /// The processor by name.
    pub(crate) fn wants_processor(&self) -> bool {
        self.device.as_deref().is_some_and(|name| name.eq_ignore_ascii_case("cpu"))
    }
}

/// Where a model is put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placement {
    Processor,
    Device { device: Device, layers: u32, whole: bool },
}

/// Why a model is put nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("there is no device {asked:?} here; there are: {found}")]
    NoSuchDevice { asked: String, found: String },
    #[error(
        "{layers} of {of} layers need {needed} on {device}, which has {free} free; {fits}. \
         Fewer slots or a shorter context need less"
    )]
    DoesNotFit { device: String, layers: u32, of: usize, needed: String, free: String, fits: String },
    #[error(
        "the model needs {needed}; {device} has {free} free and this machine {host}. A machine with this much can serve \
         layers 0..{layers} of it (satgrid models split)"
    )]
    TooLarge { needed: String, device: String, free: String, host: String, layers: u32 },
    #[error("{needed} are needed and memory_mib allows {most}. Fewer slots or a shorter context need less")]
    OverCap { needed: String, most: String },
}

impl PlaceError {
    pub(crate) fn over_cap(needs: &Needs, most: u64) -> PlaceError {
        PlaceError::OverCap { needed: gib(needs.total()), most: gib(most) }
    }
}

/// Decides. `host` is the memory that the processor's part may take, where the system tells.
pub(crate) fn place(
    offload: &Offload,
    devices: &[Device],
    needs: &Needs,
    host: Option<u64>,
) -> Result<Placement, PlaceError> {
    let candidate = match offload.device.as_deref() {
        Some(_) if offload.wants_processor() => None,
        Some(name) => {
            let found = devices.iter().find(|d| d.name.eq_ignore_ascii_case(name) && d.kind.holds_models());
            Some(found.ok_or_else(|| PlaceError::NoSuchDevice { asked: name.to_owned(), found: names(devices) })?)
        }
        None => devices.iter().filter(|device| device.kind.holds_models()).max_by_key(|device| device.free),
    };
    let Some(device) = candidate.filter(|_| offload.layers != Some(0)) else {
        let free = host.unwrap_or(u64::MAX);
        if needs.total() > free {
            return Err(too_large("the processor", 0, needs, free));
        }
        return Ok(Placement::Processor);
    };
    let all = u32::try_from(needs.layers.len()).unwrap_or(u32::MAX);
    let fit = needs.fit(device.free);
    let layers = match (offload.layers.map(|asked| asked.min(all)), fit) {
        (None, Fit::Whole { .. }) => all,
        (None, Fit::Part { layers, .. }) => layers,
        // A card that was chosen for having most free gives way to the processor; one that was named does not.
        (None, Fit::Nothing) if offload.device.is_none() => {
            return place(&Offload { device: Some("cpu".into()), layers: None }, devices, needs, host);
        }
        (asked, fit) => {
            let asked = asked.unwrap_or(1);
            let most = match fit {
                Fit::Whole { .. } => all,
                Fit::Part { layers, .. } => layers,
                Fit::Nothing => 0,
            };
            if asked > most {
                return Err(PlaceError::DoesNotFit {
                    device: device.name.clone(),
                    layers: asked,
                    of: needs.layers.len(),
                    needed: gib(needs.on_device(asked).saturating_add(DEVICE_OVERHEAD)),
                    free: gib(device.free),
                    fits: if most == 0 { "no layer fits".into() } else { format!("{most} would fit") },
                });
            }
            asked
        }
    };
    let beside = needs.total().saturating_sub(needs.on_device(layers));
    if host.is_some_and(|host| beside > host) {
        return Err(too_large(&device.name, device.free, needs, host.unwrap_or(0)));
    }
    Ok(Placement::Device { device: device.clone(), layers, whole: layers == all })
}

fn too_large(device: &str, free: u64, needs: &Needs, host: u64) -> PlaceError {
    let room = free.max(host).saturating_sub(needs.embedding).saturating_sub(needs.compute);
    let mut taken = 0_u64;
    let layers = needs.layers.iter().take_while(|bytes| {
        taken = taken.saturating_add(**bytes).saturating_add(needs.kv_layer);
        taken <= room
    });
    PlaceError::TooLarge {
        needed: gib(needs.total()),
        device: device.to_owned(),
        free: gib(if free == 0 { host } else { free }),
        host: gib(host),
        layers: u32::try_from(layers.count()).unwrap_or(u32::MAX),
    }
}

fn names(devices: &[Device]) -> String {
    devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn gib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 30;
    if tenths < 10 { format!("{} MiB", bytes >> 20) } else { format!("{}.{} GiB", tenths / 10, tenths % 10) }
}

/// What the profile promises on a device is tried on the device itself, with the model that is loaded.
pub(crate) fn needs_trial(placement: &Placement, profile: Profile) -> bool {
    matches!(placement, Placement::Device { .. }) && profile == Profile::Exact
}

/// Bytes that this machine can still give, by its own account.
pub(crate) fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Asks a child process: drivers load into it, and one that crashes takes nothing else along.
pub fn list_devices(program: &WorkerProgram) -> std::io::Result<Vec<Device>> {
    let mut command = Command::new(&program.exe);
    command.args(&program.leading_args).args(WorkerArgs::Devices.to_args());
    let output = command.stdin(Stdio::null()).stderr(Stdio::piped()).output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(std::io::Error::other(format!("{}; {}", output.status, words.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(parse_line).collect())
}

/// One line of the child's answer: fields parted by tabs.
pub(crate) fn to_line(device: &Device) -> String {
    let clean = |text: &str| text.replace(['\t', '\n'], " ");
    let Device { name, description, backend, kind, free, total } = device;
    format!("{}\t{}\t{}\t{free}\t{total}\t{}", clean(name), kind.name(), clean(backend), clean(description))
}

fn parse_line(line: &str) -> Option<Device> {
    let mut fields = line.split('\t');
    let mut next = || fields.next().map(str::to_owned);
    let (name, kind, backend) = (next()?, next()?, next()?);
    let (free, total) = (next()?.parse().ok()?, next()?.parse().ok()?);
    Some(Device { name, kind: DeviceKind::parse(&kind)?, backend, free, total, description: next()? })
}

/// Whether a backend for graphics cards could be loaded by this build at all.
pub const LOADS_BACKENDS: bool = cfg!(feature = "gpu");

/// The backends' libraries that lie beside a program.
pub fn libraries_beside(exe: &Path) -> Vec<String> {
    let entries = exe.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> = names.filter(|name| name.starts_with("libggml-")).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn needs() -> Needs {
        Needs { layers: vec![GIB; 10], embedding: GIB, head: GIB, kv_layer: GIB / 8, compute: GIB / 4 }
    }
    fn device(name: &str, kind: DeviceKind, free: u64) -> Device {
        let (description, backend) = ("a card".to_owned(), "CUDA".to_owned());
        Device { name: name.into(), description, backend, kind, free, total: free * 2 }
    }
    fn machine() -> Vec<Device> {
        vec![
            device("CPU", DeviceKind::Processor, 32 * GIB),
            device("CUDA0", DeviceKind::Gpu, 6 * GIB),
            device("CUDA1", DeviceKind::Gpu, 24 * GIB),
        ]
    }
    fn ask(device: Option<&str>, layers: Option<u32>) -> Offload {
        Offload { device: device.map(str::to_owned), layers }
    }

    #[test]
    fn where_a_model_goes() {
        #[track_caller]
        fn check(offload: Offload, devices: &[Device], host: u64, expect: Result<Option<(&str, u32)>, &str>) {
            let placed = place(&offload, devices, &needs(), Some(host));
            let short = placed.as_ref().map(|placement| match placement {
                Placement::Processor => None,
                Placement::Device { device, layers, .. } => Some((device.name.as_str(), *layers)),
            });
            match (short, expect) {
                (Ok(got), Ok(expect)) => assert_eq!(got, expect),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
                (got, expect) => panic!("{got:?}, not {expect:?}"),
            }
        }
        let all = machine();
        check(ask(None, None), &all, 32 * GIB, Ok(Some(("CUDA1", 10))));
        check(ask(None, None), &all[..2], 32 * GIB, Ok(Some(("CUDA0", 3))));
        check(ask(None, None), &all[..1], 32 * GIB, Ok(None));
        check(ask(Some("cpu"), None), &all, 32 * GIB, Ok(None));
        check(ask(Some("cuda0"), Some(0)), &all, 32 * GIB, Ok(None));
        check(ask(Some("CUDA0"), Some(3)), &all, 32 * GIB, Ok(Some(("CUDA0", 3))));
        check(ask(Some("CUDA0"), Some(10)), &all, 32 * GIB, Err("3 would fit"));
        check(ask(Some("CUDA7"), None), &all, 32 * GIB, Err("there are: CPU, CUDA0, CUDA1"));
        check(ask(Some("CPU "), None), &all, 32 * GIB, Err("no device"));
        let full = [device("CPU", DeviceKind::Processor, 32 * GIB), device("CUDA0", DeviceKind::Gpu, GIB / 2)];
        check(ask(None, None), &full, 32 * GIB, Ok(None));
        check(ask(Some("CUDA0"), None), &full, 32 * GIB, Err("no layer fits"));
        // Neither the card's six nor the host's four hold it; four layers could be served from there.
        check(ask(None, None), &all[..2], 4 * GIB, Err("layers 0..4"));
        check(ask(Some("cpu"), None), &all, 4 * GIB, Err("the model needs 13.5 GiB"));
    }

    #[test]
    fn a_device_survives_its_line() {
        for device in machine() {
            assert_eq!(parse_line(&to_line(&device)), Some(device));
        }
        let odd = Device { description: "a\tb".into(), ..device("Vulkan0", DeviceKind::Integrated, 1) };
        assert_eq!(parse_line(&to_line(&odd)).unwrap().description, "a b");
        assert_eq!(parse_line("not a device"), None);
    }
}
