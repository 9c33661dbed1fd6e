//! When a certificate begins and ends: the one thing of it that its keeper must know.

use anyhow::{Context, ensure};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::time::Duration;

/// Unix seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    pub begins: u64,
    pub ends: u64,
}

impl Life {
    /// Of the first certificate in a PEM text.
    pub(crate) fn of_pem(text: &str) -> anyhow::Result<Life> {
        let first = CertificateDer::pem_slice_iter(text.as_bytes()).next().context("no certificate in it")?;
        let first = first.context("a certificate that is no PEM")?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&first).context("no X.509 certificate")?;
        let validity = certificate.validity();
        let unix = |at: i64| u64::try_from(at).context("a certificate of before 1970");
        let life = Life { begins: unix(validity.not_before.timestamp())?, ends: unix(validity.not_after.timestamp())? };
        ensure!(life.begins < life.ends, "the certificate ends before it begins");
        Ok(life)
    }

    /// Time until a third of the life is left.
    pub(crate) fn until_renewal(self, now: u64) -> Duration {
        let third = self.ends.saturating_sub(self.begins) / 3;
        Duration::from_secs(self.ends.saturating_sub(third).saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_certificate_is_read() {
        let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 2);
        let key = rcgen::KeyPair::generate().unwrap();
        // From 2050 on a certificate writes its times in another form.
        for ((year, month, day), ends) in [((2049, 12, 31), 2_524_521_600), ((2051, 1, 1), 2_556_144_000)] {
            params.not_after = rcgen::date_time_ymd(year, month, day);
            let pem = params.self_signed(&key).unwrap().pem();
            // As it is kept: behind its key.
            let life = Life::of_pem(&format!("{}{pem}", key.serialize_pem())).unwrap();
            assert_eq!(life, Life { begins: 1_767_312_000, ends });
        }
    }

    #[test]
    fn what_is_no_certificate_is_an_error() {
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let cut = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        for bad in ["", "nothing", cut, &key] {
            assert!(Life::of_pem(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn renewal_is_due_with_a_third_left() {
        let life = Life { begins: 1_000, ends: 1_900 };
        assert_eq!(life.until_renewal(1_000), Duration::from_secs(600));
        assert_eq!(life.until_renewal(1_700), Duration::ZERO);
    }
}
