//! A chat template rendered in the tokenizer's process. It is a program of whoever made the model: its steps and its output are
//! bounded by the engine's room, its memory here, its time by the node, which ends the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use satgrid_engine::port::SpecialTokens;
use satgrid_engine::template::{ChatOrder, Prompt, Template, TemplateError};

use crate::ffi::Model;

/// Address space that one rendering may take beyond what the process has: some hundred times the longest prompt's text.
const MEMORY: u64 = 512 << 20;

/// The model's template, compiled once; or why it does not compile.
pub(crate) struct Renderer(Result<Template, TemplateError>);

impl Renderer {
    pub(crate) fn new(model: &Model, special: &SpecialTokens) -> Self {
        let text = |id: Option<u32>| {
            let bytes = id.and_then(|id| model.piece(id, true)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let source = model.chat_template();
        let _bounded = Bounded::begin();
        Self(Template::new(source.as_deref(), &text(special.bos), &text(special.eos)))
    }

    pub(crate) fn render(&self, order: &ChatOrder) -> Result<Prompt, TemplateError> {
        let template = self.0.as_ref().map_err(Clone::clone)?;
        let _bounded = Bounded::begin();
        order.render(template)
    }
}

/// While it lives, an allocation beyond [`MEMORY`] fails, and with it the process.
struct Bounded {
    before: Option<Rlimit>,
}

impl Bounded {
    fn begin() -> Self {
        let before = getrlimit(Resource::As);
        let Some(used) = address_space() else { return Self { before: None } };
        let most = used.saturating_add(MEMORY);
        let most = before.current.map_or(most, |current| current.min(most));
        let limit = Rlimit { current: Some(most), maximum: before.maximum };
        Self { before: setrlimit(Resource::As, limit).is_ok().then_some(before) }
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // It was so before: the system lets a process go back up to its hard limit.
            let _ = setrlimit(Resource::As, before);
        }
    }
}

/// Bytes of address space that this process has, where the system tells.
fn address_space() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}
