//! Which server, and how it is to be spoken to.

use std::time::Duration;

/// What a server understands beside OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// llama.cpp's server: `/completion` takes and, with `return_tokens`, gives token ids.
    LlamaServer,
    /// vLLM: `/v1/completions` takes ids as the prompt and gives them with `return_token_ids`.
    Vllm,
    /// SGLang: `/generate` with `input_ids` and `output_ids`.
    Sglang,
    /// Ollama: `/api/generate`, text only.
    Ollama,
    /// `/v1/completions` with text and nothing more.
    Text,
}

impl Dialect {
    pub const ALL: [Dialect; 5] =
        [Dialect::LlamaServer, Dialect::Vllm, Dialect::Sglang, Dialect::Ollama, Dialect::Text];

    /// The word for it in configuration and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Dialect::LlamaServer => "llama-server",
            Dialect::Vllm => "vllm",
            Dialect::Sglang => "sglang",
            Dialect::Ollama => "ollama",
            Dialect::Text => "text",
        }
    }

    pub fn from_name(name: &str) -> Option<Dialect> {
        Dialect::ALL.into_iter().find(|dialect| dialect.name() == name)
    }

    /// Whether prompts go out as token ids.
    pub const fn takes_ids(self) -> bool {
        match self {
            Dialect::LlamaServer | Dialect::Vllm | Dialect::Sglang => true,
            Dialect::Ollama | Dialect::Text => false,
        }
    }
}

/// A server and how to treat it.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// `http://host:port`, without `/v1` and without a slash at the end.
    pub url: String,
    /// The name that the server knows the model by.
    pub model: String,
    /// As `Authorization: Bearer`.
    pub key: Option<String>,
    /// Found out by asking where it is not said.
    pub dialect: Option<Dialect>,
    /// Jobs that run at once.
    pub slots: u32,
    /// Prompt and output tokens that one job may hold.
    pub context: u32,
    /// Silence after which a stream is given up.
    pub stall: Duration,
}

impl UpstreamConfig {
    pub fn new(url: &str, model: &str, slots: u32, context: u32) -> UpstreamConfig {
        let url = url.trim_end_matches('/');
        UpstreamConfig {
            url: url.strip_suffix("/v1").unwrap_or(url).to_owned(),
            model: model.to_owned(),
            key: None,
            dialect: None,
            slots,
            context,
            stall: Duration::from_secs(120),
        }
    }
}
