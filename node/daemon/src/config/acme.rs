//! Who signs the front door's certificate, and for what names: `door.acme_*`.

use super::types::Door;
use super::validate::Problem;
use std::path::PathBuf;

/// Set where an authority is to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acme {
    pub domains: Vec<String>,
    /// `mailto:` and an address.
    pub contact: Option<String>,
    pub directory: String,
    /// Who signs the address of an authority of one's own.
    pub ca: Option<PathBuf>,
}

impl Door {
    pub(crate) fn acme(&self) -> Option<Acme> {
        let asked = !self.acme_domains.is_empty();
        asked.then(|| Acme {
            domains: self.acme_domains.iter().map(|name| name.to_ascii_lowercase()).collect(),
            contact: self.acme_contact.clone(),
            directory: self.acme_directory.clone(),
            ca: self.acme_ca.clone(),
        })
    }
}

/// What an authority would refuse.
pub(super) fn problems(door: &Door) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut check = |sound: bool, key, fault: String, remedy: &str| {
        if !sound {
            found.push(Problem { key, fault, remedy: remedy.to_owned() });
        }
    };
    if door.acme_domains.is_empty() {
        let stray = door.acme_contact.is_some() || door.acme_terms_agreed || door.acme_ca.is_some();
        check(
            !stray,
            "door.acme_domains",
            "an authority is to be asked, and for no name".to_owned(),
            "name the hosts: acme_domains = [\"door.example.com\"]",
        );
        return found;
    }
    check(
        door.certificate.is_none(),
        "door.acme_domains",
        "a certificate from files is named too".to_owned(),
        "unset door.certificate and door.key, or door.acme_domains",
    );
    check(
        door.acme_terms_agreed,
        "door.acme_terms_agreed",
        format!("{} signs only for those who agree to its terms of service", door.acme_directory),
        "read them, then set door.acme_terms_agreed = true",
    );
    for name in door.acme_domains.iter().filter(|name| !is_host(name)) {
        check(
            false,
            "door.acme_domains",
            format!("{name:?} is no name that an authority signs for"),
            "name hosts in full, in ASCII, without wildcards: door.example.com",
        );
    }
    check(
        door.acme_directory.starts_with("https://"),
        "door.acme_directory",
        format!("{} is no https address", door.acme_directory),
        "name the authority's directory",
    );
    let mail = door.acme_contact.as_ref().is_none_or(|contact| contact.starts_with("mailto:") && contact.contains('@'));
    check(mail, "door.acme_contact", "it is no mail address".to_owned(), "write mailto:you@example.com, or unset it");
    check(
        door.acme_ca.as_ref().is_none_or(|path| path.is_file()),
        "door.acme_ca",
        "there is no such file".to_owned(),
        "name the PEM file of the root, or unset it for a public authority",
    );
    found
}

fn is_host(name: &str) -> bool {
    let label = |label: &str| {
        let plain = label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
        plain && !label.is_empty() && label.len() < 64 && !label.starts_with('-') && !label.ends_with('-')
    };
    let number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|c| c.is_ascii_digit()));
    name.contains('.') && name.len() <= 253 && !number && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for good in ["door.example.com", "a.b", "XN--MNCHEN-3YA.example"] {
            assert!(is_host(good), "{good}");
        }
        for bad in ["", "localhost", "*.example.com", "münchen.example", "a..b", "-a.b", "a.b.", "192.0.2.1", "a.b:443"]
        {
            assert!(!is_host(bad), "{bad}");
        }
    }
}
