//! What the machine is, and how busy others keep it.

use std::fmt;
use std::fs::read_to_string;

pub(crate) struct Machine {
    model: String,
    cores: usize,
    load: String,
    governor: Option<String>,
    /// Thousandths of all processor time since the last boot that the hypervisor gave to others.
    stolen_permille: Option<u64>,
    memory_available_mb: Option<u64>,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let read = |path: &str| read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let load = read("/proc/loadavg");
        let stat = read("/proc/stat");
        let times: Vec<u64> =
            stat.lines().next().unwrap_or_default().split_whitespace().filter_map(|x| x.parse().ok()).collect();
        let all: u64 = times.iter().take(8).sum();
        Machine {
            model: model.map_or_else(|| "processor unknown".into(), |(_, name)| name.trim().to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            load: load.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
            governor: read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
                .ok()
                .map(|text| text.trim().to_owned()),
            stolen_permille: times.get(7).and_then(|stolen| (stolen * 1_000).checked_div(all)),
            memory_available_mb: field_kb(&read("/proc/meminfo"), "MemAvailable").map(|kb| kb / 1_024),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} cores, load {}", self.model, self.cores, self.load)?;
        write!(f, ", governor {}", self.governor.as_deref().unwrap_or("unknown"))?;
        if let Some(stolen) = self.stolen_permille {
            write!(f, ", stolen {stolen} permille since boot")?;
        }
        if let Some(memory) = self.memory_available_mb {
            write!(f, ", {memory} MB free")?;
        }
        Ok(())
    }
}

/// A figure of a file like `/proc/self/status`.
fn field_kb(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Resident memory of a process, in MB of 1,000,000 bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resident {
    pub(crate) all: f64,
    /// Heap and stacks; the rest are pages of files, the program's above all, which the system can drop.
    pub(crate) anonymous: f64,
}

pub(crate) fn resident(pid: u32) -> Option<Resident> {
    let status = read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mb = |name| field_kb(&status, name).map(|kb| kb as f64 * 1.024e-3);
    Some(Resident { all: mb("VmRSS")?, anonymous: mb("RssAnon")? })
}

/// Processes that this one started and that still run.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let of = |task: std::fs::DirEntry| read_to_string(task.path().join("children")).unwrap_or_default();
    let lists: Vec<String> = tasks.flatten().map(of).collect();
    lists.iter().flat_map(|list| list.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
}

/// Engines and tokenizers that this node started and that still run; its wallet's process is none.
pub(crate) fn engines(pid: u32) -> Vec<u32> {
    children(pid).into_iter().filter(is_engine).collect()
}

/// The processes of a node's wallet.
pub(crate) fn wallets(pid: u32) -> Vec<u32> {
    children(pid).into_iter().filter(|pid| !is_engine(pid)).collect()
}

fn is_engine(pid: &u32) -> bool {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).any(|word| word == b"engine-worker")
}

/// Processor time of a process, its threads and the children that it waited for, in seconds.
pub(crate) fn processor_seconds(pid: u32) -> f64 {
    // Fields 14 and 15 of `stat`, in ticks of 10 ms; the name in field 2 may hold spaces.
    let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|x| x.parse::<u64>().ok()).sum();
    ticks as f64 / 100.0
}
