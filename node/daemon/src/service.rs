//! The API's `Service` over the consumer role: from a request's words to token ids, and from token ids to text and a bill.
//!
//! The walk: name to root by the catalogue, a plan over the book, the model's tokenizer (fetched by its hash if need be),
//! template and tokens, a plan again with the true length, then a call to the role. Nothing here moves money.

use crate::accounts::{
    Desk,
    budget::{Budget, Wanted as BudgetWanted},
};
use crate::clock::Trouble;
use crate::drive::{
    consumer::{ConsumerView, Message},
    market::Market,
    now,
    tokenizers::{Tokenizers, Vocabulary},
};
use crate::embeds;
use crate::voice::{self, Asked, Voice, tokens_of};
use async_trait::async_trait;
use futures::stream;
use satgrid_api::{
    self as api, CallContext, CompletionEvent, CompletionRequest, CompletionStream, LimitSource, ModelInfo, Prompt,
    Readiness, Routing, RoutingSort, Service, ServiceError, Shortfall, TokenizeRequest, Tokenized, TopUp,
};
use satgrid_engine::port::Tokenizer;
use satgrid_market::{Choice, Demand, NoPlan, ProviderPattern, Sort, Verdict, Wanted};
use satgrid_node::consumer::{Bill, CallError, CallId, ConsumerEvent, Emission, FundsLimit, Submit};
use satgrid_types::{Digest, FinishReason, ModelRoot, Msat, NodeKey, RequestId, TokenUsage, UnixMs, VerifiedListing};
use satgrid_wallet::{InvoiceRequest, Lightning};
use sha2::Digest as _;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;

/// Output that a plan expects where the caller sets no limit, for ranking by price.
const EXPECTED_OUTPUT: u32 = 256;
/// A top-up invoice is made for this many times what is missing.
const TOP_UP_FACTOR: u64 = 10;
const TOP_UP_EXPIRY_SECS: u32 = 3_600;
const BUSY_RETRY: Duration = Duration::from_secs(2);

/// What the API's requests are served with.
pub(crate) struct Gateway {
    pub market: Market,
    pub tokenizers: Tokenizers,
    pub consumer: mpsc::Sender<Message>,
    pub wallet: Arc<dyn Lightning>,
    pub view: Arc<RwLock<ConsumerView>>,
    pub relays: Box<dyn Fn() -> (usize, usize) + Send + Sync>,
    pub clock: Trouble,
    pub allow_unverified_names: bool,
    pub only: Vec<ProviderPattern>,
    pub prefer: Vec<ProviderPattern>,
    pub desk: Arc<Desk>,
    pub next_call: AtomicU64,
    pub started: UnixMs,
}

/// A request as it would be sent.
pub(crate) struct Prepared {
    pub candidates: Vec<VerifiedListing>,
    vocabulary: Arc<Vocabulary>,
    pub asked: Asked,
    pub max_output: u32,
}

/// A model, the providers to try, and the words to speak with them.
struct Planned {
    candidates: Vec<VerifiedListing>,
    vocabulary: Arc<Vocabulary>,
}

#[async_trait]
impl Service for Gateway {
    async fn ready(&self) -> Readiness {
        let mut reasons = Vec::new();
        let (connected, all) = (self.relays)();
        if connected == 0 {
            reasons.push(format!("none of {all} relays is connected; trying again"));
        }
        if self.market.live().is_empty() {
            reasons.push("no listing is known yet".to_owned());
        }
        let halted = self.view.read().ok().and_then(|view| view.halted.clone().or_else(|| view.paused.clone()));
        let ready = halted.is_none() && !self.market.live().is_empty();
        reasons.extend(halted.map(|reason| format!("stopped taking work: {reason}")));
        reasons.extend(self.clock.borrow().clone());
        Readiness { ready, reasons }
    }

    async fn models(&self) -> Vec<ModelInfo> {
        let mut by_name: BTreeMap<String, Vec<Arc<VerifiedListing>>> = BTreeMap::new();
        for listing in self.market.live() {
            let name = match self.market.catalogue.with_root(&listing.model_root) {
                Some(model) => model.name.clone(),
                None if self.allow_unverified_names => listing.model.clone(),
                None => continue,
            };
            by_name.entry(name).or_default().push(listing);
        }
        by_name.into_iter().filter_map(|(id, listings)| model_info(id, &listings, self.started)).collect()
    }

    async fn complete(
        &self,
        request: CompletionRequest,
        context: CallContext,
    ) -> Result<CompletionStream, ServiceError> {
        let mut names = vec![request.model.clone()];
        names.extend(request.fallback_models.iter().cloned());
        let mut first_error = None;
        for name in names {
            match self.start(&name, &request, &context).await {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    let elsewhere =
                        matches!(error, ServiceError::UnknownModel { .. } | ServiceError::NoProvider { .. });
                    if !elsewhere {
                        return Err(error);
                    }
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or(ServiceError::UnknownModel { model: request.model }))
    }

    async fn tokenize(&self, request: TokenizeRequest) -> Result<Tokenized, ServiceError> {
        let planned = self.plan(&request.model, &Routing::default(), 1, 1, None).await?;
        let tokens = match &request.prompt {
            Prompt::Text(text) => {
                let tokenizer = &planned.vocabulary.tokenizer;
                tokenizer.tokenize(text, request.add_special_tokens, false).await.map_err(internal)?
            }
            Prompt::Messages(_) | Prompt::Tokens(_) | Prompt::Embed(_) => {
                tokens_of(&planned.vocabulary, &request.prompt, request.add_generation_prompt).await?
            }
        };
        let context_length = planned.candidates.first().map_or(0, |listing| listing.context_length);
        Ok(Tokenized { tokens, context_length })
    }

    async fn detokenize(&self, model: String, tokens: Vec<u32>) -> Result<String, ServiceError> {
        let planned = self.plan(&model, &Routing::default(), 1, 1, None).await?;
        let pieces = planned
            .vocabulary
            .tokenizer
            .pieces(&tokens, false)
            .await
            .map_err(|error| ServiceError::InvalidRequest { param: "tokens".into(), message: error.to_string() })?;
        Ok(String::from_utf8_lossy(&pieces.concat()).into_owned())
    }
}

impl Gateway {
    /// What a request would be sent as: who may serve it, its tokens, its longest output.
    pub(crate) async fn prepare(&self, name: &str, request: &CompletionRequest) -> Result<Prepared, ServiceError> {
        let asked = request.max_tokens.unwrap_or(EXPECTED_OUTPUT);
        let kind = Some(matches!(request.prompt, Prompt::Embed(_)));
        // A first plan finds the tokenizer, a second one knows the prompt's length.
        let planned = self.plan(name, &request.routing, 1, 1, kind).await?;
        let words = voice::asked(&planned.vocabulary, request).await?;
        let prompt_tokens = u32::try_from(words.tokens.len()).unwrap_or(u32::MAX);
        let longest = planned.candidates.iter().map(|listing| listing.context_length).max().unwrap_or(0);
        if words.tokens.is_empty() {
            let message = "the prompt has no tokens".to_owned();
            return Err(ServiceError::InvalidRequest { param: "messages".into(), message });
        }
        if let Some(texts) = &words.texts {
            let longest = embeds::check(texts, &planned.candidates)?;
            let Planned { candidates, vocabulary } = self.plan(name, &request.routing, longest, 0, kind).await?;
            return Ok(Prepared { candidates, vocabulary, asked: words, max_output: 0 });
        }
        let wanted = request.max_tokens.map_or(1, |max| max.max(1));
        if prompt_tokens >= longest || prompt_tokens.saturating_add(wanted) > longest {
            let prompt_tokens = prompt_tokens.saturating_add(request.max_tokens.unwrap_or(0));
            return Err(ServiceError::ContextLength { prompt_tokens, context_length: longest });
        }
        let output = asked.min(longest - prompt_tokens);
        let planned = self.plan(name, &request.routing, prompt_tokens, output, kind).await?;
        let room = planned.candidates.first().map_or(longest, |l| l.context_length).saturating_sub(prompt_tokens);
        let max_output = request.max_tokens.unwrap_or(room).min(room).max(1);
        let Planned { candidates, vocabulary } = planned;
        Ok(Prepared { candidates, vocabulary, asked: words, max_output })
    }

    async fn start(
        &self,
        name: &str,
        request: &CompletionRequest,
        context: &CallContext,
    ) -> Result<CompletionStream, ServiceError> {
        let Prepared { candidates, vocabulary, asked, max_output } = self.prepare(name, request).await?;
        let ends = vocabulary.tokenizer.special().eog.clone();
        let voice = Voice::new(vocabulary, request, &asked);
        let prompt_tokens = u32::try_from(asked.tokens.len()).unwrap_or(u32::MAX);
        let rates = candidates.iter().map(|listing| listing.rates).collect();
        let wanted = BudgetWanted { model: name, request, rates, prompt: prompt_tokens, max_output };
        let budget = Budget::open(&self.desk, context, wanted).await?;
        let call = CallId(self.next_call.fetch_add(1, Ordering::Relaxed));
        let prints: Vec<_> = candidates.iter().map(|listing| (listing.node_key, fingerprint(listing))).collect();
        let submit = Submit {
            call,
            candidates,
            prompt: asked.tokens,
            sampling: request.sampling.clone(),
            stop: request.stop.clone(),
            max_output: budget.max_output,
            ends,
            grammar: asked.grammar,
            top_logprobs: request.top_logprobs,
            embed: asked.texts,
            allow_fallbacks: request.routing.allow_fallbacks,
            part: None,
            max_cost: budget.max_cost(),
        };
        let (emit, emissions) = mpsc::unbounded_channel();
        let mut run = Run {
            call,
            emissions,
            consumer: self.consumer.clone(),
            budget: Some(budget),
            voice,
            ready: VecDeque::new(),
            emitted_tokens: 0,
            prompt_tokens,
            model: name.to_owned(),
            spoke: false,
            over: false,
        };
        if self.consumer.send(Message::Call(Box::new(submit), emit)).await.is_err() {
            run.ended(None, &api::Bill::default()).await;
            return Err(stopped());
        }
        run.budget.iter_mut().for_each(Budget::asked);
        // Admitted once a provider has the request: refusals before that become statuses.
        let started = match run.emissions.recv().await {
            Some(Emission::Ordered { .. } | Emission::Ticket { .. }) => {
                run.ended(None, &api::Bill::default()).await;
                return Err(stopped());
            }
            Some(Emission::Started { provider, request }) => {
                run.leg(request, provider).await?;
                let print = prints.into_iter().find(|(known, _)| *known == provider).map(|(_, print)| print);
                CompletionEvent::Started { model: name.to_owned(), fingerprint: print }
            }
            Some(Emission::Failed { error, bill }) => {
                run.ended(None, &api_bill(&bill, prompt_tokens, 0)).await;
                return Err(self.refused(name, error, &bill).await);
            }
            Some(
                Emission::Logprobs { .. }
                | Emission::Tokens { .. }
                | Emission::Embedded { .. }
                | Emission::Finished { .. },
            )
            | None => return Err(stopped()),
        };
        let first = stream::iter([Ok(started)]);
        let rest = stream::unfold(run, |mut run| async move { run.next().await.map(|event| (event, run)) });
        Ok(Box::pin(futures::StreamExt::chain(first, rest)))
    }

    /// Providers that fit, best first, all of one model; and that model's tokenizer.
    /// `embeds`: of a model that does, or that does not, where that matters.
    async fn plan(
        &self,
        name: &str,
        routing: &Routing,
        prompt: u32,
        output: u32,
        embeds: Option<bool>,
    ) -> Result<Planned, ServiceError> {
        let unknown = |_| ServiceError::UnknownModel { model: name.to_owned() };
        let wanted = self.market.catalogue.resolve(name, self.allow_unverified_names).map_err(unknown)?;
        let demand = self.demand(wanted, routing, prompt, output)?;
        let Choice { best, failover } = match self.market.plan(&demand) {
            Ok(choice) => choice,
            Err(NoPlan::NotListed) if matches!(demand.wanted, Wanted::ClaimedName(_)) => {
                return Err(ServiceError::UnknownModel { model: name.to_owned() });
            }
            Err(error) => return Err(self.no_provider(name, &demand, &error)),
        };
        let mut candidates: Vec<VerifiedListing> = Vec::new();
        for plan in std::iter::once(best).chain(failover) {
            let Some(stage) = plan.sole() else { continue };
            let same = candidates
                .first()
                .is_none_or(|f| f.model_root == stage.listing.model_root && f.tokenizer == stage.listing.tokenizer);
            if same {
                candidates.push(VerifiedListing::clone(&stage.listing));
            }
        }
        // One root is one kind of model, whatever else is said of it.
        if let Some(embeds) = embeds
            && candidates.first().is_some_and(|first| first.embeds.is_some() != embeds)
        {
            return Err(ServiceError::WrongKind { model: name.to_owned(), embeds: !embeds });
        }
        let Some(first) = candidates.first() else {
            return Err(ServiceError::NoProvider {
                model: name.to_owned(),
                why: vec!["no plan has one provider".into()],
            });
        };
        let vocabulary = self
            .tokenizers
            .get(first.tokenizer, &candidates)
            .await
            .map_err(|error| ServiceError::NoProvider { model: name.to_owned(), why: vec![format!("{error:#}")] })?;
        Ok(Planned { candidates, vocabulary })
    }

    fn demand(&self, wanted: Wanted, routing: &Routing, prompt: u32, output: u32) -> Result<Demand, ServiceError> {
        let mut demand = Demand::new(wanted, prompt, output);
        demand.expected_output_tokens = output.min(EXPECTED_OUTPUT);
        demand.only = if routing.only.is_empty() { self.only.clone() } else { patterns("only", &routing.only)? };
        demand.ignore = patterns("ignore", &routing.ignore)?;
        demand.order = if routing.order.is_empty() { self.prefer.clone() } else { patterns("order", &routing.order)? };
        demand.allow_fallbacks = routing.allow_fallbacks || routing.order.is_empty();
        demand.quantisations = routing.quantisations.iter().cloned().collect::<BTreeSet<_>>();
        let most = self.desk.rate.max_price(&routing.max_price)?;
        demand.max_price.input = most.prompt;
        demand.max_price.output = most.completion;
        demand.max_price.per_request = most.request;
        demand.sort = match routing.sort {
            Some(RoutingSort::Throughput) => Sort::Throughput,
            Some(RoutingSort::Latency) => Sort::Latency,
            Some(RoutingSort::Price) | None => Sort::Price,
        };
        Ok(demand)
    }

    fn no_provider(&self, name: &str, demand: &Demand, error: &NoPlan) -> ServiceError {
        let mut why: Vec<String> = self
            .market
            .explain(demand, name)
            .iter()
            .filter_map(|c| match &c.verdict {
                Verdict::Refused(why) => Some(format!("provider {}: {why}", c.listing.node_key.short())),
                Verdict::Ranked { .. } => None,
            })
            .take(8)
            .collect();
        if why.is_empty() {
            why.push(error.to_string());
        }
        why.extend(self.clock.borrow().clone());
        ServiceError::NoProvider { model: name.to_owned(), why }
    }

    /// A call that was refused before its first token, as the API tells it.
    async fn refused(&self, name: &str, error: CallError, bill: &Bill) -> ServiceError {
        match error {
            CallError::Funds { required, available, limit } => {
                let topup = match limit {
                    FundsLimit::Wallet => self.top_up(required.saturating_sub(available)).await,
                    FundsLimit::SessionCap | FundsLimit::ExposureCap => None,
                };
                let limit = match limit {
                    FundsLimit::Wallet => LimitSource::Wallet,
                    FundsLimit::SessionCap | FundsLimit::ExposureCap => LimitSource::Node,
                };
                ServiceError::InsufficientFunds(Box::new(Shortfall { required, available, limit, topup }))
            }
            CallError::NoProvider { why } => ServiceError::NoProvider { model: name.to_owned(), why: vec![why] },
            error @ (CallError::ProvidersFailed { .. }
            | CallError::Cancelled
            | CallError::Full { .. }
            | CallError::Busy
            | CallError::Paused { .. }
            | CallError::Journal { .. }) => ended(error, bill, 0, 0),
        }
    }

    /// An invoice that fills the wallet. Its payer needs a route to us; the wallet says what it can receive.
    async fn top_up(&self, missing: Msat) -> Option<TopUp> {
        let amount = Msat(missing.0.max(1_000).saturating_mul(TOP_UP_FACTOR));
        let description_hash = Digest(sha2::Sha256::digest(b"satgrid top-up").into());
        let request = InvoiceRequest { amount, description_hash, expiry_secs: TOP_UP_EXPIRY_SECS };
        let invoice = self.wallet.create_invoice(request).await.ok()?;
        let expires_at = now().plus_ms(u64::from(TOP_UP_EXPIRY_SECS) * 1_000);
        Some(TopUp { bolt11: invoice.bolt11, payment_hash: invoice.payment_hash, expires_at })
    }
}

/// The same where the same weights run in the same build of an engine: what OpenAI's `system_fingerprint` tells.
fn fingerprint(listing: &VerifiedListing) -> String {
    let both = sha2::Sha256::new().chain_update(listing.model_root.as_bytes()).chain_update(listing.build.as_bytes());
    let [a, b, c, d, e, ..] = <[u8; 32]>::from(both.finalize());
    format!("fp_{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}")
}

/// One completion under way. Dropping it cancels the call.
struct Run {
    call: CallId,
    emissions: mpsc::UnboundedReceiver<Emission>,
    consumer: mpsc::Sender<Message>,
    voice: Voice,
    /// Events that are due.
    ready: VecDeque<CompletionEvent>,
    emitted_tokens: u32,
    prompt_tokens: u32,
    model: String,
    /// Something of the answer has come.
    spoke: bool,
    over: bool,
    /// Taken when the call has ended.
    budget: Option<Budget>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.over {
            let (consumer, call) = (self.consumer.clone(), self.call);
            let (_, none) = mpsc::unbounded_channel();
            let mut emissions = std::mem::replace(&mut self.emissions, none);
            let (budget, prompt, output) = (self.budget.take(), self.prompt_tokens, self.emitted_tokens);
            tokio::spawn(async move {
                let _ = consumer.send(Message::Event(ConsumerEvent::Cancel { call })).await;
                // What the client has left behind is still paid for: its end says how much that was.
                let Some(mut budget) = budget else { return };
                let mut output = output;
                while let Some(emission) = emissions.recv().await {
                    match emission {
                        Emission::Started { request, provider } => drop(budget.leg(request, provider).await),
                        Emission::Ordered { .. }
                        | Emission::Ticket { .. }
                        | Emission::Embedded { .. }
                        | Emission::Logprobs { .. } => {}
                        Emission::Tokens { ids } => {
                            output = output.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
                        }
                        Emission::Finished { bill, .. } | Emission::Failed { bill, .. } => {
                            let bill = budget.rated(api_bill(&bill, prompt, output));
                            return budget.end(None, &bill).await;
                        }
                    }
                }
            });
        }
    }
}

impl Run {
    /// Writes down which request to a provider the call now is.
    async fn leg(&mut self, request: RequestId, provider: NodeKey) -> Result<(), ServiceError> {
        match &mut self.budget {
            Some(budget) => budget.leg(request, provider).await,
            None => Ok(()),
        }
    }

    /// The call has ended: its budget is posted, and its bill gets the moment's exchange rate.
    async fn ended(&mut self, finish: Option<FinishReason>, bill: &api::Bill) -> api::Bill {
        self.over = true;
        let Some(budget) = self.budget.take() else { return bill.clone() };
        let bill = budget.rated(bill.clone());
        budget.end(finish, &bill).await;
        bill
    }

    async fn next(&mut self) -> Option<Result<CompletionEvent, ServiceError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            match self.emissions.recv().await {
                Some(Emission::Ordered { .. } | Emission::Ticket { .. }) => {}
                Some(Emission::Started { request, provider }) => {
                    if let Err(error) = self.leg(request, provider).await {
                        return Some(Err(error));
                    }
                }
                Some(Emission::Embedded { row }) => {
                    if !std::mem::replace(&mut self.spoke, true) {
                        self.budget.iter().for_each(Budget::spoke);
                    }
                    self.ready.push_back(CompletionEvent::Embedding { row });
                }
                Some(Emission::Logprobs { entries }) => self.voice.likely(entries),
                Some(Emission::Tokens { ids }) => {
                    if !std::mem::replace(&mut self.spoke, true) {
                        self.budget.iter().for_each(Budget::spoke);
                    }
                    self.emitted_tokens += u32::try_from(ids.len()).unwrap_or(u32::MAX);
                    match self.voice.tokens(&ids).await {
                        Ok(events) => self.ready.extend(events),
                        Err(error) => return Some(Err(error)),
                    }
                }
                Some(Emission::Finished { reason, bill }) => {
                    let rest = self.voice.finish();
                    self.ready.extend(rest);
                    let reason = if self.voice.stopped() { FinishReason::Stop } else { reason };
                    let mut bill = api_bill(&bill, self.prompt_tokens, self.emitted_tokens);
                    bill.usage.reasoning = self.voice.reasoning;
                    let bill = self.ended(Some(reason), &bill).await;
                    self.ready.push_back(CompletionEvent::Finished { reason, bill });
                }
                Some(Emission::Failed { error, bill }) => {
                    self.ended(None, &api_bill(&bill, self.prompt_tokens, self.emitted_tokens)).await;
                    tracing::info!(model = %self.model, %error, "a call failed");
                    return Some(Err(ended(error, &bill, self.prompt_tokens, self.emitted_tokens)));
                }
                None => {
                    self.over = true;
                    return Some(Err(stopped()));
                }
            }
        }
    }
}

fn model_info(id: String, listings: &[Arc<VerifiedListing>], created: UnixMs) -> Option<ModelInfo> {
    let cheapest = listings.iter().min_by_key(|l| (l.rates.output, l.rates.input, l.id()))?;
    let roots: BTreeSet<ModelRoot> = listings.iter().map(|l| l.model_root).collect();
    let sellers: BTreeSet<_> = listings.iter().map(|l| l.node_key).collect();
    let quantisations: BTreeSet<_> = listings.iter().map(|l| l.quantisation.clone()).collect();
    Some(ModelInfo {
        id,
        created,
        root: if roots.len() == 1 { roots.first().copied() } else { None },
        context_length: listings.iter().map(|l| l.context_length).max()?,
        rates: cheapest.rates,
        sellers: u32::try_from(sellers.len()).unwrap_or(u32::MAX),
        quantisations: quantisations.into_iter().collect(),
        embeds: cheapest.embeds,
    })
}

fn patterns(param: &str, texts: &[String]) -> Result<Vec<ProviderPattern>, ServiceError> {
    let parse = |text: &String| {
        text.parse().map_err(|error: satgrid_market::demand::BadPattern| ServiceError::InvalidRequest {
            param: format!("provider.{param}"),
            message: error.to_string(),
        })
    };
    texts.iter().map(parse).collect()
}

/// Each token once, however many providers worked on it; the cost is the sum of what each was paid.
fn api_bill(bill: &Bill, prompt: u32, completion: u32) -> api::Bill {
    let cached = bill.legs.first().map_or(0, |leg| leg.usage.cached_prompt.min(prompt));
    let legs = bill.legs.iter().map(|leg| api::Leg {
        provider: leg.provider,
        receipt: leg.receipt,
        usage: leg.usage,
        rates: leg.rates,
        cost: leg.cost,
    });
    api::Bill {
        usage: TokenUsage { prompt, cached_prompt: cached, completion, ..TokenUsage::default() },
        cost: bill.cost(),
        routing_fees: Msat::ZERO,
        legs: legs.collect(),
        ..api::Bill::default()
    }
}

/// A call's failure as the API tells it, with what was charged.
fn ended(error: CallError, bill: &Bill, prompt: u32, completion: u32) -> ServiceError {
    let charged = (!bill.legs.is_empty()).then(|| Box::new(api_bill(bill, prompt, completion)));
    match error {
        CallError::ProvidersFailed { reason } => ServiceError::ProviderFailed { reason, bill: charged },
        CallError::NoProvider { why } => ServiceError::ProviderFailed { reason: why, bill: charged },
        CallError::Funds { required, available, .. } => {
            let reason = format!("{required} more were needed to go on and {available} could be paid");
            ServiceError::ProviderFailed { reason, bill: charged }
        }
        CallError::Cancelled => ServiceError::ProviderFailed { reason: "the call was cancelled".into(), bill: charged },
        CallError::Busy | CallError::Full { .. } => ServiceError::Busy { retry_after: BUSY_RETRY },
        CallError::Journal { reason } | CallError::Paused { reason } => {
            ServiceError::NotReady { reasons: vec![reason] }
        }
    }
}

fn internal(error: impl std::fmt::Display) -> ServiceError {
    ServiceError::Internal { detail: error.to_string() }
}

fn stopped() -> ServiceError {
    ServiceError::NotReady { reasons: vec!["this node is stopping".into()] }
}
