//! One certificate from an authority: the account, the order, and an answer on the door's own port for each name. The words of
//! ACME are `instant_acme`'s; here they are put in order, spoken over this node's HTTP client, and refusals get a remedy.

use super::kept::{Held, Kept};
use crate::config;
use crate::door::life::Life;
use anyhow::Context;
use axum::http;
use bytes::Bytes;
use http_body_util::Limited;
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType, Error, HttpClient, Identifier, NewAccount,
    NewOrder, Order, OrderStatus, Problem, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use satgrid_api::Certificates;
use std::{pin::Pin, time::Duration};
use thiserror::Error as ThisError;

const WAIT: Duration = Duration::from_secs(30);
/// The longest answer: a chain of certificates is some kilobytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// How long an authority may take to look, and then to sign.
const PATIENCE: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(120));
const FORGOTTEN: &str = "urn:ietf:params:acme:error:accountDoesNotExist";

/// Why there is no certificate.
#[derive(Debug, ThisError)]
pub(super) enum AcmeError {
    #[error("{0}")]
    Refused(Problem),
    // With what lies beneath: an HTTP client's own words alone say little.
    #[error("the authority cannot be asked: {0:#}")]
    Unreachable(anyhow::Error),
    #[error("the authority offers no tls-alpn-01")]
    OtherQuestions,
    #[error("what the authority says is not understood: {0}")]
    Odd(Error),
    #[error("{0:#}")]
    Ours(#[from] anyhow::Error),
}

impl From<Error> for AcmeError {
    // Theirs, and open to more.
    #[allow(clippy::wildcard_enum_match_arm)]
    fn from(error: Error) -> AcmeError {
        match error {
            Error::Api(problem) => AcmeError::Refused(problem),
            Error::Other(why) => AcmeError::Unreachable(anyhow::anyhow!(why)),
            other => AcmeError::Odd(other),
        }
    }
}

/// A client that is built like all others of this node, in place of the library's own.
struct Https(reqwest::Client);

impl HttpClient for Https {
    fn request(
        &self,
        request: http::Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let http = self.0.clone();
        let other = |error: reqwest::Error| Error::Other(Box::new(error));
        Box::pin(async move {
            let request = reqwest::Request::try_from(request.map(reqwest::Body::wrap)).map_err(other)?;
            let answer = http::Response::from(http.execute(request).await.map_err(other)?);
            Ok(BytesResponse::from(answer.map(|body| Limited::new(body, MAX_ANSWER_BYTES))))
        })
    }
}

fn https(settings: &config::Acme) -> anyhow::Result<Box<Https>> {
    let mut http = reqwest::Client::builder().timeout(WAIT).https_only(true);
    if let Some(path) = &settings.ca {
        let pem = std::fs::read(path).with_context(|| format!("door.acme_ca: {}", path.display()))?;
        http = http.add_root_certificate(reqwest::Certificate::from_pem(&pem).context("door.acme_ca")?);
    }
    Ok(Box::new(Https(http.build()?)))
}

/// A fresh certificate; what proves the names is put into `certificates` while the authority looks.
pub(super) async fn order(
    settings: &config::Acme,
    kept: &Kept,
    certificates: &Certificates,
) -> Result<Held, AcmeError> {
    match order_once(settings, kept, certificates).await {
        Err(AcmeError::Refused(problem)) if problem.r#type.as_deref() == Some(FORGOTTEN) => {
            kept.forget_account()?;
            order_once(settings, kept, certificates).await
        }
        other => other,
    }
}

async fn order_once(settings: &config::Acme, kept: &Kept, certificates: &Certificates) -> Result<Held, AcmeError> {
    let account = account(settings, kept).await?;
    let names: Vec<Identifier> = settings.domains.iter().cloned().map(Identifier::Dns).collect();
    let mut order = account.new_order(&NewOrder::new(&names)).await?;
    let mut asked = order.authorizations();
    while let Some(authorization) = asked.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Pending {
            // Proved of late, or refused: the order's own state says which.
            continue;
        }
        let mut challenge = authorization.challenge(ChallengeType::TlsAlpn01).ok_or(AcmeError::OtherQuestions)?;
        let name = challenge.identifier().to_string();
        answer(certificates, &name, challenge.key_authorization().digest().as_ref())?;
        challenge.set_ready().await?;
    }
    match order.poll_ready(&PATIENCE).await {
        Ok(OrderStatus::Ready) => {}
        Ok(OrderStatus::Pending | OrderStatus::Processing | OrderStatus::Valid | OrderStatus::Invalid) => {
            return Err(why_not(&mut order, None).await);
        }
        Err(Error::Api(problem)) => return Err(why_not(&mut order, Some(problem)).await),
        Err(error) => return Err(error.into()),
    }
    let key = order.finalize().await?;
    let chain = order.poll_certificate(&PATIENCE).await?;
    let life = Life::of_pem(&chain)?;
    Ok(Held { key, chain, life })
}

/// The account at this authority; made where there is none.
async fn account(settings: &config::Acme, kept: &Kept) -> Result<Account, AcmeError> {
    let builder = Account::builder_with_http(https(settings)?);
    if let Some(known) = kept.account()? {
        return Ok(builder.from_credentials(known).await?);
    }
    let contact: Vec<&str> = settings.contact.as_deref().into_iter().collect();
    // Validation has seen to it that the operator agreed.
    let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let (account, credentials) = builder.create(&new, settings.directory.clone(), None).await?;
    kept.keep_account(&credentials)?;
    Ok(account)
}

/// Puts the certificate in place that proves a name to who looks for it (RFC 8737).
fn answer(certificates: &Certificates, name: &str, digest: &[u8]) -> anyhow::Result<()> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let key = KeyPair::generate()?;
    let made = params.self_signed(&key)?;
    Ok(certificates.answer(name, made.der(), &key.serialize_der())?)
}

/// What the authority found when it looked.
async fn why_not(order: &mut Order, said: Option<Problem>) -> AcmeError {
    let mut asked = order.authorizations();
    while let Some(authorization) = asked.next().await {
        let Ok(mut authorization) = authorization else { continue };
        let Ok(state) = authorization.refresh().await else { continue };
        if let Some(problem) = state.challenges.iter().find_map(|challenge| challenge.error.clone()) {
            return AcmeError::Refused(problem);
        }
    }
    match said {
        Some(problem) => AcmeError::Refused(problem),
        None => AcmeError::Ours(anyhow::anyhow!("the authority refused and does not say why")),
    }
}

impl AcmeError {
    /// What to do about it.
    pub(super) fn hint(&self, settings: &config::Acme) -> Option<String> {
        match self {
            AcmeError::Refused(problem) => hint_of(problem.r#type.as_deref()?, &settings.domains.join(", ")),
            AcmeError::Unreachable(_) => {
                Some(format!("{} must be reachable from here (door.acme_directory)", settings.directory))
            }
            AcmeError::OtherQuestions => Some("choose another door.acme_directory".to_owned()),
            AcmeError::Odd(_) => Some("does door.acme_directory name an ACME directory?".to_owned()),
            AcmeError::Ours(_) => None,
        }
    }
}

/// By the last word of the problem's type (RFC 8555, section 6.7).
pub(super) fn hint_of(kind: &str, names: &str) -> Option<String> {
    let hint = match kind.rsplit(':').next().unwrap_or_default() {
        "connection" | "tls" | "unauthorized" | "incorrectResponse" => format!(
            "the authority connects to {names} on port 443: that port must lead to door.listen, without a proxy that ends TLS"
        ),
        "dns" => format!("{names} must resolve to this machine, for the authority too"),
        "caa" => format!("the CAA records of {names} must allow this authority"),
        "rateLimited" => {
            "wait; while you try things, name the authority's staging directory in door.acme_directory".to_owned()
        }
        "rejectedIdentifier" | "unsupportedIdentifier" => {
            format!("the authority signs nothing for {names} (door.acme_domains)")
        }
        "invalidContact" | "unsupportedContact" => {
            "door.acme_contact must be mailto: and an address that takes mail".to_owned()
        }
        "externalAccountRequired" => {
            "this authority wants accounts made elsewhere; choose another door.acme_directory".to_owned()
        }
        "userActionRequired" => "the authority's terms have changed; read them where it says".to_owned(),
        _ => return None,
    };
    Some(hint)
}
