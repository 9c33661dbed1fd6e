//! One model over a lead and three paid workers, all of them processes: the text of one machine, also when a worker is killed
//! in mid-answer, of one session or of eight. The market is `demo-split.py`'s, which only does what an operator could.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// A dead worker is noticed within 2 s; what a busy machine adds to that.
const NOTICED_WITHIN_S: f64 = 2.0 + 1.0;

/// Runs one of the scripts on this model; what it found comes back.
#[track_caller]
pub(crate) fn run(script: &str, dir: &Path, model: &Path, more: &[&str]) -> Value {
    let model = model.to_str().unwrap();
    run_alone(script, dir, &[&["--model", model], more].concat())
}

/// The same, with whatever model the script makes.
#[track_caller]
pub(crate) fn run_alone(script: &str, dir: &Path, more: &[&str]) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script);
    let mut command = Command::new("python3");
    command.arg(script).arg("--dir").arg(dir.join("split"));
    command.env("SATGRID_BIN", super::market::satgrid().get_program()).args(more);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
pub(crate) fn holds(found: &Value, killed: bool) {
    assert_eq!(found["same"], true, "{found:#}");
    assert_eq!(found["clean"], true, "{found:#}");
    assert_eq!(found["usage"]["completion_tokens"], 48, "{found:#}");
    if killed {
        let noticed = found["noticed_s"].as_f64().unwrap();
        assert!(noticed < NOTICED_WITHIN_S, "noticed after {noticed} s");
    }
}
