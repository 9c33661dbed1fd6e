//! The configuration: one TOML file, and above it the environment and the command line.
//!
//! Precedence: flag over environment (`SATGRID_SECTION_KEY`) over file over default. Every value remembers where it
//! came from, so `satgrid config check` can say what will be used and why. Unknown keys are errors: a misspelt limit
//! must not silently be no limit. This module reads files and variables; it opens nothing else and decides nothing.

mod acme;
mod derived;
mod keys;
mod load;
mod places;
mod secret;
mod template;
mod types;
mod validate;

pub(crate) use acme::Acme;
pub(crate) use keys::SECTIONS;
pub(crate) use load::{Entry, Loaded, Overrides, load};
pub(crate) use places::{config_file, data_dir};
pub(crate) use secret::Secret;
pub(crate) use template::render;
pub(crate) use types::*;
pub(crate) use validate::{Problem, problems};
