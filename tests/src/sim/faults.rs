//! What goes wrong in a run, and the calls that it happens to.

use super::Sim;
use crate::world::Ask;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use satgrid_node::consumer::CallId;
use satgrid_wallet::fake::Crash;

/// One thing that happens.
#[derive(Debug, Clone)]
pub enum Fault {
    Call { consumer: usize, ask: Box<Ask>, cancel_after_ms: Option<u64> },
    Lead { consumer: usize, workers: Vec<usize>, prompt: u32, decode: u32 },
    Cancel { consumer: usize, call: CallId },
    KillProvider { provider: usize, for_ms: u64, lose_rows_ms: u64 },
    StartProvider { provider: usize },
    KillConsumer { consumer: usize, for_ms: u64, lose_rows_ms: u64 },
    StartConsumer { consumer: usize },
    KillEngine { provider: usize, for_ms: u64 },
    StartEngine { provider: usize },
    BreakLinks { consumer: usize, provider: usize },
    BreakProviderJournal { provider: usize, for_ms: u64 },
    BreakConsumerJournal { consumer: usize, for_ms: u64 },
    Close { consumer: usize },
    Publish { provider: usize },
}

/// Draws one.
pub(super) fn random(rng: &mut ChaCha8Rng, providers: usize, consumers: usize) -> Fault {
    let (provider, consumer) = (rng.gen_range(0..providers), rng.gen_range(0..consumers));
    let for_ms = rng.gen_range(50..20_000);
    let lose_rows_ms = if rng.gen_bool(0.5) { rng.gen_range(0..6_000) } else { 0 };
    match rng.gen_range(0..10) {
        0 | 1 => Fault::KillProvider { provider, for_ms, lose_rows_ms },
        2 | 3 => Fault::KillConsumer { consumer, for_ms, lose_rows_ms },
        4 => Fault::KillEngine { provider, for_ms },
        5 | 6 => Fault::BreakLinks { consumer, provider },
        7 if rng.gen_bool(0.5) => Fault::BreakProviderJournal { provider, for_ms },
        7 => Fault::BreakConsumerJournal { consumer, for_ms },
        8 => Fault::Close { consumer },
        _ => Fault::Publish { provider },
    }
}

impl Sim {
    pub(super) fn apply(&mut self, fault: Fault) {
        self.world.say(|| format!("** {}", format!("{fault:?}").chars().take(90).collect::<String>()));
        let now = self.world.now;
        let provider_up = |sim: &Sim, p: usize| sim.world.providers[p].role.is_some();
        let consumer_up = |sim: &Sim, c: usize| sim.world.consumers[c].role.is_some();
        match fault {
            Fault::Call { consumer, ask, cancel_after_ms } if consumer_up(self, consumer) => {
                let call = self.world.submit(consumer, *ask);
                if let Some(ms) = cancel_after_ms {
                    self.add(now.plus_ms(ms), Fault::Cancel { consumer, call });
                }
            }
            Fault::Lead { consumer, workers, prompt, decode } if consumer_up(self, consumer) => {
                self.world.lead(consumer, &workers, prompt, decode);
            }
            Fault::Cancel { consumer, call } if consumer_up(self, consumer) => self.world.cancel(consumer, call),
            Fault::KillProvider { provider, for_ms, lose_rows_ms } if provider_up(self, provider) => {
                self.stats.provider_deaths += 1;
                self.world.crash_provider(provider, Crash { lose_rows_ms, close_channels: false });
                self.add(now.plus_ms(for_ms), Fault::StartProvider { provider });
            }
            Fault::StartProvider { provider } if !provider_up(self, provider) => {
                self.world.providers[provider].journal.broken = false;
                self.world.restart_provider(provider);
            }
            Fault::KillConsumer { consumer, for_ms, lose_rows_ms } if consumer_up(self, consumer) => {
                self.stats.consumer_deaths += 1;
                self.world.crash_consumer(consumer, Crash { lose_rows_ms, close_channels: false });
                self.add(now.plus_ms(for_ms), Fault::StartConsumer { consumer });
            }
            Fault::StartConsumer { consumer } if !consumer_up(self, consumer) => {
                self.world.consumers[consumer].journal.broken = false;
                self.world.restart_consumer(consumer);
            }
            Fault::KillEngine { provider, for_ms } if provider_up(self, provider) => {
                self.stats.engine_deaths += 1;
                self.world.kill_engine(provider);
                self.add(now.plus_ms(for_ms), Fault::StartEngine { provider });
            }
            Fault::StartEngine { provider } => self.world.restart_engine(provider),
            Fault::BreakLinks { consumer, provider } => {
                self.stats.broken_links += 1;
                self.world.break_links(consumer, provider);
            }
            Fault::BreakProviderJournal { provider, for_ms } if provider_up(self, provider) => {
                self.stats.broken_journals += 1;
                self.world.providers[provider].journal.broken = true;
                self.add(now.plus_ms(for_ms), Fault::KillProvider { provider, for_ms: 100, lose_rows_ms: 0 });
            }
            Fault::BreakConsumerJournal { consumer, for_ms } if consumer_up(self, consumer) => {
                self.stats.broken_journals += 1;
                self.world.consumers[consumer].journal.broken = true;
                self.add(now.plus_ms(for_ms), Fault::KillConsumer { consumer, for_ms: 100, lose_rows_ms: 0 });
            }
            Fault::Close { consumer } if consumer_up(self, consumer) => self.world.close_all(consumer),
            Fault::Publish { provider } if provider_up(self, provider) => self.world.publish(provider),
            _ => {}
        }
    }
}
