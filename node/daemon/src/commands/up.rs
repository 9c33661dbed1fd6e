//! `satgrid up`: run the node that the configuration describes.

use crate::cli::Globals;
use crate::config::problems;
use crate::failure::{HintExt, Unusable};

pub(super) fn run(globals: &Globals) -> anyhow::Result<()> {
    let loaded = globals.load()?;
    if let Some(problem) = problems(&loaded.config).first() {
        let error = anyhow::anyhow!("{}: {}", problem.key, problem.fault);
        let error = Err::<(), _>(error).hint(format!("{}; `satgrid config check` shows every setting", problem.remedy));
        return error.map_err(|error| anyhow::Error::new(Unusable(error)));
    }
    crate::up::run(loaded.config)
}
