//! A request's body, within its limits of size and time.

use axum::{
    body::{Body, Bytes, HttpBody as _},
    http::StatusCode,
};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::{config::ApiConfig, error::ApiError};

pub(crate) async fn read(config: &ApiConfig, body: Body) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("The body is larger than {} bytes.", config.max_body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    };
    // By its own claim: nothing of it is read.
    if body.size_hint().lower() > config.max_body_bytes as u64 {
        return Err(too_large());
    }
    let limited = Limited::new(body, config.max_body_bytes);
    match tokio::time::timeout(config.body_wait, limited.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", "The body broke off.")),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("The body did not arrive within {} s.", config.body_wait.as_secs()),
        )),
    }
}
