//! What the next batch computes: a pure function of how far each running job is and may go.
//!
//! While any stream is decoding, prompts together get at most [`Limits::prefill_beside_streams`] positions between two
//! steps of the streams, so they slow these but never stop them; alone they get whole batches. Up to that bound prompts
//! go first: the sooner they are streams, the more of them share each step. They take turns, the one served longest ago first; in
//! `fast` a short rest goes before all, and where the bound is several batches, the steps ride in the last of them.
//! Where several batches are under way at once, streams that are away count as running, and beside them one prompt at a time
//! is on its way.
//!
//! | profile | a batch is                                                                        |
//! |---------|-----------------------------------------------------------------------------------|
//! | exact   | one position of each of n sequences, or n positions of one; steps and chunks take turns |
//! | fast    | one position of every stream, and prompt positions of any sequences beside them    |
//!
//! This module computes nothing and holds no state; the scheduler passes what it needs and acts on the answer.

use satgrid_engine::port::Profile;

/// A shorter piece of a prompt is not worth a batch of its own.
const LEAST_CHUNK: u32 = 8;
/// A piece of less than this part of what prompts may have in a batch is a sliver.
const SLIVERS: u32 = 8;

/// How far one running job is. Positions count from 0 through prompt and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) slot: u32,
    /// Positions already in the cache; the next to compute.
    pub(crate) at: u32,
    /// Positions of the prompt.
    pub(crate) prompt: u32,
    /// Positions below this may be computed now: their token is known and the grant covers them.
    pub(crate) upto: u32,
    /// The number of the last batch with positions of the job; 0 for none.
    pub(crate) served: u64,
}

/// The bounds of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) profile: Profile,
    /// Most positions in one batch.
    pub(crate) batch: u32,
    /// Most prompt positions in or between two steps of running streams.
    pub(crate) prefill_beside_streams: u32,
    /// Most streams in one step.
    pub(crate) streams: u32,
    /// Steps of streams are under way, and batches of prompts are.
    pub(crate) streams_away: bool,
    pub(crate) prompts_away: bool,
}

/// A run of positions `from..upto` of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) slot: u32,
    pub(crate) from: u32,
    pub(crate) upto: u32,
}

/// The next batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// By rising slot; empty when no job may go on.
    pub(crate) chunks: Vec<Chunk>,
    /// Positions in batches that were prompts' alone while streams waited, since these were last served: this one counted.
    pub(crate) since_step: u32,
}

impl Progress {
    fn ready(&self) -> u32 {
        self.upto.saturating_sub(self.at)
    }

    fn is_prefilling(&self) -> bool {
        self.at < self.prompt
    }

    fn next(&self, positions: u32) -> Chunk {
        Chunk { slot: self.slot, from: self.at, upto: self.at + self.ready().min(positions) }
    }
}

/// The next batch; `since_step` is the last one's.
pub(crate) fn plan_batch(jobs: &[Progress], limits: &Limits, since_step: u32) -> Plan {
    let batch = limits.batch.max(1);
    let mut ready: Vec<&Progress> = jobs.iter().filter(|job| job.ready() > 0).collect();
    ready.sort_by_key(|job| job.slot);
    let streams = ready.iter().filter(|job| !job.is_prefilling()).count();
    let mut prompts: Vec<&Progress> = ready.iter().copied().filter(|job| job.is_prefilling()).collect();
    prompts.sort_by_key(|job| (job.served, job.slot));
    let beside = streams > 0 || limits.streams_away;
    let prefill = if beside { limits.prefill_beside_streams.max(1) } else { batch };

    let mut chunks = match limits.profile {
        Profile::Exact => {
            // A prompt's lone position looks like a step of a stream and goes with them.
            let mut singles: Vec<_> = ready.iter().filter(|job| !job.is_prefilling() || job.ready() == 1).collect();
            singles.sort_by_key(|job| (job.served, job.slot));
            let most = batch.min(limits.streams.max(1)) as usize;
            let steps: Vec<Chunk> = singles.into_iter().take(most).map(|job| job.next(1)).collect();
            let room = match (steps.is_empty() && !limits.streams_away, beside && limits.prompts_away) {
                (_, true) => 0,
                (true, false) => batch,
                (false, false) => prefill.saturating_sub(since_step).min(batch),
            };
            let long = prompts.iter().find(|job| job.ready() > 1 && room >= LEAST_CHUNK.min(job.ready()));
            long.map_or(steps, |job| vec![job.next(room)])
        }
        Profile::Fast => {
            // A step of few streams beside a piece costs as much as one of many: pieces that fill batches come first.
            let left = if beside { prefill.saturating_sub(since_step) } else { batch };
            let waiting = prompts.iter().fold(0_u32, |sum, job| sum.saturating_add(job.ready()));
            let most = if left > batch && waiting >= batch { 0 } else { batch as usize };
            let steps = ready.iter().filter(|job| !job.is_prefilling()).take(most);
            let mut chunks: Vec<Chunk> = steps.map(|job| job.next(1)).collect();
            let mut room = left.min(batch - u32::try_from(chunks.len()).unwrap_or(batch).min(batch));
            // What is left of a prompt goes first, and none is begun by a sliver: prompts become streams in their order, next to
            // each other. The library computes runs of neighbouring sequences at once and parts a batch at each gap.
            // Otherwise they keep their turns.
            let least = (prefill.min(batch) / SLIVERS).max(1);
            prompts.sort_by_key(|job| job.ready() > least);
            for job in &prompts {
                let chunk = job.next(room);
                let positions = chunk.upto - chunk.from;
                if positions >= least.min(job.ready()) {
                    room -= positions;
                    chunks.push(chunk);
                }
            }
            chunks
        }
    };
    chunks.sort_by_key(|chunk| chunk.slot);
    let positions: u32 = chunks.iter().map(|chunk| chunk.upto - chunk.from).sum();
    // Prompts alone, lone positions of theirs go with the streams; and only a stream that is there waits.
    let of_a_prompt = |chunk: &Chunk| prompts.iter().any(|job| job.slot == chunk.slot);
    let alone = chunks.iter().all(of_a_prompt) && chunks.iter().any(|chunk| chunk.upto - chunk.from > 1);
    let since_step = if beside && alone { since_step.saturating_add(positions) } else { 0 };
    Plan { chunks, since_step }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        profile: Profile::Exact,
        batch: 512,
        prefill_beside_streams: 64,
        streams: 512,
        streams_away: false,
        prompts_away: false,
    };

    /// A job in words: `p3/10` is prefilling, 3 of 10 done and all granted; `p3/10<5` is granted below 5;
    /// `s12` decodes position 12; `s12!` waits for a grant.
    fn job(slot: usize, text: &str) -> Progress {
        let slot = u32::try_from(slot).unwrap();
        if let Some(rest) = text.strip_prefix('s') {
            let at = rest.trim_end_matches('!').parse().unwrap();
            return Progress { slot, at, prompt: at - 1, upto: at + u32::from(!rest.ends_with('!')), served: 0 };
        }
        let (at, rest) = text.strip_prefix('p').unwrap().split_once('/').unwrap();
        let (prompt, upto) = rest.split_once('<').unwrap_or((rest, rest));
        Progress {
            slot,
            at: at.parse().unwrap(),
            prompt: prompt.parse().unwrap(),
            upto: upto.parse().unwrap(),
            served: 0,
        }
    }

    fn jobs_of(texts: &[&str]) -> Vec<Progress> {
        texts.iter().enumerate().map(|(slot, text)| job(slot, text)).collect()
    }

    fn words(chunks: &[Chunk]) -> String {
        let words: Vec<String> = chunks.iter().map(|c| format!("{}:{}..{}", c.slot, c.from, c.upto)).collect();
        words.join(" ")
    }

    fn rows(chunks: &[Chunk]) -> u32 {
        chunks.iter().map(|c| c.upto - c.from).sum()
    }

    fn check(profile: Profile, jobs: &[&str], since_step: u32, expect: &str) {
        let limits = Limits { profile, batch: 512, ..LIMITS };
        let Plan { chunks, .. } = plan_batch(&jobs_of(jobs), &limits, since_step);
        assert_eq!(words(&chunks), expect, "{jobs:?}");
        assert!(rows(&chunks) <= limits.batch);
        if profile == Profile::Exact {
            assert!(chunks.len() <= 1 || chunks.iter().all(|c| c.upto - c.from == 1), "not an exact batch: {chunks:?}");
        }
    }

    #[test]
    fn exact_batches_are_one_row_of_many_or_many_of_one() {
        let exact = |jobs: &[&str], since_step, expect| check(Profile::Exact, jobs, since_step, expect);
        exact(&[], 0, "");
        exact(&["s5!", "p0/10<0"], 0, "");
        exact(&["s5", "s9", "s7!"], 0, "0:5..6 1:9..10");
        exact(&["p0/2000"], 0, "0:0..512");
        exact(&["p0/2000"], 64, "0:0..512");
        exact(&["p1536/2000<1600"], 0, "0:1536..1600");
        // A stream beside a long prompt: chunk, step, chunk, step, and small chunks.
        exact(&["s5", "p0/2000"], 0, "1:0..64");
        exact(&["s5", "p64/2000"], 64, "0:5..6");
        exact(&["s5", "p60/2000"], 60, "0:5..6");
        // Short prompts share what is allowed between two steps.
        exact(&["s5", "p0/32", "p0/32"], 0, "1:0..32");
        exact(&["s5", "s33", "p0/32"], 32, "2:0..32");
        exact(&["s5", "s33", "p0/62"], 32, "2:0..32");
        // A lone position joins the streams.
        exact(&["s5", "p9/10", "p3/10<4"], 0, "0:5..6 1:9..10 2:3..4");
        exact(&["p9/10", "p0/10"], 0, "1:0..10");
        exact(&["p9/10", "p0/10"], 512, "0:9..10");
    }

    #[test]
    fn steps_go_in_groups_where_several_are_under_way() {
        let check = |jobs: &[&str], served: &[u64], limits: Limits, since_step, expect: &str| {
            let mut jobs = jobs_of(jobs);
            jobs.iter_mut().zip(served).for_each(|(job, served)| job.served = *served);
            assert_eq!(words(&plan_batch(&jobs, &limits, since_step).chunks), expect, "{jobs:?}");
        };
        let two = Limits { streams: 2, ..LIMITS };
        check(&["s5", "s6", "s7"], &[0, 0, 0], two, 0, "0:5..6 1:6..7");
        // Who was served longest ago goes first.
        check(&["s5", "s6", "s7"], &[4, 3, 2], two, 0, "1:6..7 2:7..8");
        // Streams that are away are streams: a prompt gets no more than what is allowed beside them, once.
        let away = Limits { streams_away: true, ..two };
        check(&["p0/2000"], &[0], away, 0, "0:0..64");
        check(&["p64/2000"], &[0], away, 64, "");
        check(&["p0/2000"], &[0], Limits { prompts_away: true, ..away }, 0, "");
        check(&["p0/2000"], &[0], Limits { prompts_away: true, ..two }, 0, "0:0..512");
    }

    #[test]
    fn fast_batches_mix_streams_and_prompts() {
        let fast = |jobs: &[&str], expect| check(Profile::Fast, jobs, 0, expect);
        fast(&[], "");
        fast(&["s5", "p0/2000", "s9"], "0:5..6 1:0..64 2:9..10");
        fast(&["p0/300", "p0/300", "p0/10<0"], "0:0..300 1:0..212");
        fast(&["s5", "p0/10<5", "p0/200"], "0:5..6 1:0..5 2:0..59");
        // A short rest goes first, a sliver not at all.
        fast(&["s5", "p0/300", "p297/300"], "0:5..6 1:0..61 2:297..300");
        fast(&["p0/500", "p0/300"], "0:0..500");
        fast(&["s5", "p0/60", "p0/300"], "0:5..6 1:0..60");
    }

    #[test]
    fn fast_reads_several_pieces_between_two_steps_where_they_are_quick() {
        let quick = Limits { profile: Profile::Fast, prefill_beside_streams: 1300, ..LIMITS };
        let check = |jobs: &[&str], since_step, expect: &str| {
            let plan = plan_batch(&jobs_of(jobs), &quick, since_step);
            assert_eq!(words(&plan.chunks), expect, "{jobs:?}");
            plan.since_step
        };
        assert_eq!(check(&["s5", "p0/400", "p0/400", "p0/2000"], 0, "1:0..400 2:0..112"), 512);
        assert_eq!(check(&["s5", "s401", "p112/400", "p0/2000"], 512, "2:112..400 3:0..224"), 1024);
        // The last piece takes the steps along, and what it leaves is the next one's.
        assert_eq!(check(&["s5", "s401", "s401", "p224/2000"], 1024, "0:5..6 1:401..402 2:401..402 3:224..500"), 0);
        assert_eq!(check(&["s6", "s402", "s402", "p500/2000"], 0, "3:500..1012"), 512);
        // Nobody waits for a batch that is not full.
        assert_eq!(check(&["s5", "p0/300"], 0, "0:5..6 1:0..300"), 0);
        assert_eq!(check(&["s5", "p0/2000"], 1300, "0:5..6"), 0);
    }

    #[test]
    fn prompts_take_turns() {
        let limits = Limits { batch: 100, prefill_beside_streams: 10, ..LIMITS };
        let mut jobs: Vec<Progress> = (0..3).map(|slot| job(slot, "p0/250")).collect();
        let mut order = Vec::new();
        for number in 1.. {
            let plan = plan_batch(&jobs, &limits, 0);
            let Some(chunk) = plan.chunks.first() else { break };
            order.push(chunk.slot);
            jobs[chunk.slot as usize].at = chunk.upto;
            jobs[chunk.slot as usize].served = number;
        }
        assert_eq!(order, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    }

    /// Whatever the mix, no stream waits for more than the allowed positions, and every granted position is computed.
    #[test]
    fn streams_are_never_starved() {
        for profile in [Profile::Exact, Profile::Fast] {
            for beside in [64, 1300] {
                let limits = Limits { profile, prefill_beside_streams: beside, ..LIMITS };
                let mut jobs = vec![job(0, "s10"), job(1, "p0/1000"), job(2, "p0/1700"), job(3, "s20")];
                let mut waited = 0;
                for number in 1..200 {
                    let plan = plan_batch(&jobs, &limits, waited);
                    waited = if plan.chunks.iter().any(|c| c.slot == 0) { 0 } else { waited + rows(&plan.chunks) };
                    assert_eq!(plan.since_step, waited, "{profile:?}: what the plan counts at batch {number}");
                    assert!(waited <= beside, "{profile:?}: the stream waits at batch {number}");
                    for chunk in plan.chunks {
                        let job = &mut jobs[chunk.slot as usize];
                        assert_eq!(job.at, chunk.from);
                        job.at = chunk.upto;
                        if job.at > job.prompt {
                            job.upto = job.at + 1;
                        } else {
                            job.served = number;
                        }
                    }
                }
                assert!(jobs.iter().all(|job| job.at >= job.prompt), "{profile:?}: {jobs:?}");
            }
        }
    }
}
