//! The toy behind the `Engine` trait, without any runtime: a lock and a waker.

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use async_trait::async_trait;

use super::{ToyConfig, ToyEngine};
use crate::port::{Command, Engine, EngineDown, EngineEvent, EngineFacts};

#[derive(Debug)]
struct Shared {
    toy: ToyEngine,
    reader: Option<Waker>,
    shut: bool,
}

/// Works as fast as its events are read.
#[derive(Debug)]
pub struct AsyncToy {
    shared: Mutex<Shared>,
}

impl AsyncToy {
    pub fn new(config: ToyConfig) -> Self {
        Self { shared: Mutex::new(Shared { toy: ToyEngine::new(config), reader: None, shut: false }) }
    }

    /// Reaches into the toy, for example to let it die, and wakes the reader.
    pub fn with<T>(&self, act: impl FnOnce(&mut ToyEngine) -> T) -> T {
        let mut shared = self.lock();
        let result = act(&mut shared.toy);
        if let Some(reader) = shared.reader.take() {
            reader.wake();
        }
        result
    }

    /// No more commands; events end when all are read.
    pub fn shut_down(&self) {
        self.lock().shut = true;
        self.with(|_| ());
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic elsewhere is that test's failure; the toy's state is whole between calls.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Engine for AsyncToy {
    fn facts(&self) -> EngineFacts {
        self.lock().toy.facts()
    }

    fn send(&self, command: Command) -> Result<(), EngineDown> {
        if self.lock().shut {
            return Err(EngineDown);
        }
        self.with(|toy| toy.handle(command))
    }

    fn is_up(&self) -> bool {
        let shared = self.lock();
        !shared.shut && !shared.toy.is_down()
    }

    async fn next_event(&self) -> Option<EngineEvent> {
        poll_fn(|context| {
            let mut shared = self.lock();
            if let Some(event) = shared.toy.poll_event() {
                return Poll::Ready(Some(event));
            }
            if shared.shut {
                return Poll::Ready(None);
            }
            shared.reader = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}
