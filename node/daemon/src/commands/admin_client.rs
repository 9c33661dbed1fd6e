//! The running node's admin port, as the commands ask it. Reads the token and nothing else.

use crate::admin::TOKEN_FILE;
use crate::config::Config;
use crate::failure::HintExt;
use anyhow::{Context, bail};
use serde_json::Value;

pub(super) struct Admin {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Admin {
    /// The node of this configuration, with the token from its folder.
    pub(super) fn of(config: &Config) -> anyhow::Result<Admin> {
        let token = std::fs::read_to_string(config.node.dir.join(TOKEN_FILE))
            .with_context(|| format!("no {TOKEN_FILE} in {}", config.node.dir.display()))
            .hint("`satgrid up` makes it; is this the right --config?")?;
        let base = format!("http://{}/admin/v1", config.api.admin);
        Ok(Admin { client: reqwest::Client::new(), base, token: token.trim().to_owned() })
    }

    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(self.client.get(format!("{}/{path}", self.base))).await
    }
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.answer(self.client.post(format!("{}/{path}", self.base)).json(body)).await
    }
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(self.client.delete(format!("{}/{path}", self.base))).await
    }
    async fn answer(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        let sent = request.bearer_auth(&self.token).send().await;
        let response = sent.context("the node does not answer on its admin port").hint("is `satgrid up` running?")?;
        let status = response.status();
        let answer: Value = response.json().await.unwrap_or_default();
        if !status.is_success() {
            let said = answer["error"].as_str().or(answer["error"]["message"].as_str());
            bail!("{}", said.unwrap_or("the node refused"));
        }
        Ok(answer)
    }
}
