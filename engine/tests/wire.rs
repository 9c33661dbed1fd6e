//! Commands, events and facts cross a socket: what is encoded is decoded, and hostile bytes are an error.

#![allow(clippy::unwrap_used)]

use minicbor::{Decode, Encode};
use proptest::collection::vec;
use proptest::prelude::*;
use satgrid_engine::port::{Command, EngineEvent, EngineFacts, FinishReason, Job, JobError, JobId};
use satgrid_engine::sampling::{Logprobs, Sampling, SamplingError};
use satgrid_engine::toy::{ToyConfig, ToyEngine};

fn round_trip<T: Encode<()> + for<'b> Decode<'b, ()>>(value: &T) -> T {
    let bytes = minicbor::to_vec(value).expect("encode");
    minicbor::decode(&bytes).expect("decode")
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let numbers = prop::array::uniform6(-1e3f32..1e3);
    (numbers, any::<u32>(), any::<u32>(), vec((any::<u32>(), -1e3f32..1e3), 0..4), any::<u64>()).prop_map(
        |([temperature, top_p, min_p, presence, frequency, repeat], top_k, window, logit_bias, seed)| Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty: presence,
            frequency_penalty: frequency,
            repeat_penalty: repeat,
            repeat_window: window,
            logit_bias,
            seed,
        },
    )
}

fn job() -> impl Strategy<Value = Job> {
    let limits = (any::<u32>(), any::<bool>(), any::<u32>());
    (any::<u64>(), any::<[u8; 32]>(), vec(any::<u32>(), 0..9), sampling(), vec(".{0,5}", 0..3), limits).prop_map(
        |(id, session, prompt, sampling, stop, (max_output, ignore_eos, resumed))| Job {
            id: JobId(id),
            session,
            prompt,
            sampling,
            max_output,
            stop,
            ignore_eos,
            resumed,
            extras: Default::default(),
        },
    )
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        job().prop_map(Command::Start),
        (any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(job, prompt_upto, output_upto)| Command::Grant {
            job: JobId(job),
            prompt_upto,
            output_upto
        }),
        any::<u64>().prop_map(|job| Command::Cancel { job: JobId(job) }),
        any::<[u8; 32]>().prop_map(|session| Command::ForgetSession { session }),
    ]
}

fn event() -> impl Strategy<Value = EngineEvent> {
    let reason = prop_oneof![Just(FinishReason::Stop), Just(FinishReason::Length), Just(FinishReason::Cancelled)];
    let error = prop_oneof![
        Just(JobError::PromptEmpty),
        Just(JobError::Busy),
        any::<[u32; 2]>().prop_map(|[prompt, context]| JobError::PromptTooLong { prompt, context }),
        ".{0,9}".prop_map(|reason| JobError::Backend { reason }),
        any::<u32>().prop_map(|entries| JobError::Sampling(SamplingError::TooManyBiases { entries })),
    ];
    let id = || any::<u64>().prop_map(JobId);
    prop_oneof![
        (id(), any::<u32>(), any::<u32>()).prop_map(|(job, upto, cached)| EngineEvent::Prefilled { job, upto, cached }),
        (id(), any::<u32>(), vec(any::<u32>(), 0..9)).prop_map(|(job, first, ids)| EngineEvent::Tokens {
            job,
            first,
            ids
        }),
        (id(), reason, any::<u32>()).prop_map(|(job, reason, evaluated)| EngineEvent::Finished {
            job,
            reason,
            evaluated
        }),
        (id(), error).prop_map(|(job, error)| EngineEvent::Failed { job, error }),
        ".{0,9}".prop_map(|reason| EngineEvent::Down { reason }),
        Just(EngineEvent::Up),
        (id(), any::<u32>(), vec(any::<(u32, i32)>(), 0..3)).prop_map(|(job, first, top)| EngineEvent::Logprobs {
            job,
            first,
            entries: vec![Logprobs { drawn_micro: -5, top }],
        }),
        (id(), any::<u32>(), vec(any::<u8>(), 0..9)).prop_map(|(job, index, row)| EngineEvent::Embedded {
            job,
            index,
            row
        }),
    ]
}

proptest! {
    #[test]
    fn commands_round_trip(command in command()) {
        prop_assert_eq!(round_trip(&command), command);
    }

    #[test]
    fn events_round_trip(event in event()) {
        prop_assert_eq!(round_trip(&event), event);
    }

    #[test]
    fn hostile_bytes_are_an_error_or_a_value(bytes in vec(any::<u8>(), 0..64)) {
        let _ = minicbor::decode::<Command>(&bytes);
        let _ = minicbor::decode::<EngineEvent>(&bytes);
        let _ = minicbor::decode::<EngineFacts>(&bytes);
    }
}

#[test]
fn facts_round_trip() {
    let facts = ToyEngine::new(ToyConfig::default()).facts();
    assert_eq!(round_trip(&facts), facts);
}
