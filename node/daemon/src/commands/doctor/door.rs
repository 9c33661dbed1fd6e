//! The front door's port and certificate: is there one, and for how long still.

use super::{Finding, fail, ok, warn};
use crate::config::{Acme, Config};
use crate::door::{acme::Kept, life::Life};
use crate::drive;
use std::path::Path;

const WHAT: &str = "door certificate";
const DAY: u64 = 86_400;
/// Of a certificate that somebody else renews.
const LITTLE: u64 = 14 * DAY;

pub(super) fn certificate(config: &Config) -> Option<Finding> {
    config.door.listen?;
    let now = drive::now().as_secs();
    match (config.door.acme(), &config.door.certificate) {
        (Some(acme), _) => Some(from_authority(&acme, &config.node.dir, now)),
        (None, Some(path)) => Some(from_file(path, now)),
        (None, None) => None,
    }
}

fn from_authority(acme: &Acme, data_dir: &Path, now: u64) -> Finding {
    let kept = Kept::of(acme, data_dir);
    let names = acme.domains.join(", ");
    let failure = kept.failure();
    let said = |detail: String| match &failure {
        Some(why) => format!("{detail}; the last try failed: {why}"),
        None => detail,
    };
    let remedy = "see what the last try says; the running node tries again by itself";
    match kept.life() {
        Err(error) => fail(WHAT, format!("{error:#}"), "remove the file: the node asks for another one"),
        Ok(None) if failure.is_none() => ok(WHAT, format!("none yet; {} is asked for {names}", acme.directory)),
        Ok(None) => fail(WHAT, said(format!("none for {names}")), remedy),
        Ok(Some(life)) if life.ends <= now => fail(WHAT, said(format!("{names}: it has ended")), remedy),
        Ok(Some(life)) => match failure {
            None => ok(WHAT, format!("{names}: {}, renewed by itself", left(life, now))),
            Some(_) => warn(WHAT, said(format!("{names}: {}", left(life, now))), remedy),
        },
    }
}

fn from_file(path: &Path, now: u64) -> Finding {
    let shown = path.display();
    let read = std::fs::read_to_string(path).map_err(anyhow::Error::from);
    match read.and_then(|text| Life::of_pem(&text)) {
        Err(error) => {
            fail(WHAT, format!("{shown}: {error:#}"), "name a PEM file with the chain, its own certificate first")
        }
        Ok(life) if life.ends <= now => fail(WHAT, format!("{shown}: it has ended"), "renew it; no restart is needed"),
        Ok(life) if life.ends - now < LITTLE => {
            warn(WHAT, format!("{shown}: {}", left(life, now)), "renew it; no restart is needed")
        }
        Ok(life) => ok(WHAT, format!("{shown}: {}", left(life, now))),
    }
}

fn left(life: Life, now: u64) -> String {
    format!("good for {} more days", life.ends.saturating_sub(now) / DAY)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_certificate_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chain.pem");
        let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (rcgen::date_time_ymd(2026, 1, 1), rcgen::date_time_ymd(2026, 4, 1));
        let pem = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        std::fs::write(&path, pem).unwrap();
        let end = Life::of_pem(&std::fs::read_to_string(&path).unwrap()).unwrap().ends;
        for (now, level) in [(end - 20 * DAY, Level::Ok), (end - 3 * DAY, Level::Warn), (end, Level::Fail)] {
            let finding = from_file(&path, now);
            assert_eq!(finding.level, level, "{}", finding.detail);
        }
        assert_eq!(from_file(dir.path(), 0).level, Level::Fail);
    }
}
