//! How many threads to compute with on a machine that others use too.
//!
//! llama.cpp's threads wait for each other after every matrix product, and they wait spinning. When the system takes one off
//! its core, the others burn theirs until it is back: on two cores with one other busy process, two threads decode a quarter
//! slower than one, with two such processes five times slower. So the engine looks at how long its threads stood in
//! the run queue, computes with fewer while that is long, and tries more again later. In the exact profile the number of
//! threads changes no bit.
//!
//! Long is what costs more than the threads that would go: of `n` threads that stand still together for the part `q` of the
//! time, `n (1 - q)` work, and `n - step` do without the wait. A node beside the engine, which takes a core for a millisecond
//! or two at each token, is no crowd.
//!
//! | threads | leaves with                                                                             |
//! |---------|-----------------------------------------------------------------------------------------|
//! | all     | two crowded samples in a row: fewer                                                     |
//! | fewer   | two crowded samples in a row: fewer still; a calm time: more, and the next calm time must be twice as long if that fails at once |

use std::time::Duration;

/// Batch time between two looks.
pub(crate) const SAMPLE: Duration = Duration::from_millis(50);
/// Time in the run queue, of all threads together, that makes a sample crowded: so many quarters of the part of the threads
/// that would go. Below all four, since those that stay work better alone.
const CROWDED_QUARTERS: u32 = 3;
/// And what is calm: no more than this part of the sample.
const CALM_PART: u32 = 8;
/// Crowded samples in a row that take threads away; a batch of so many samples' length counts for all of them.
const CROWDED_IN_ROW: u32 = 2;
const LONG_BATCH: u32 = 4;
/// Calm time before more threads are tried.
const FIRST_CALM: Duration = Duration::from_millis(500);
const LONGEST_CALM: Duration = Duration::from_secs(16);
/// More threads that went well for this long have proved themselves.
const PROVED: Duration = Duration::from_secs(2);

/// Decides by samples; knows neither clock nor system.
#[derive(Debug)]
pub(crate) struct Governor {
    most: u32,
    threads: u32,
    crowded_in_row: u32,
    /// Batch time since the last change.
    since: Duration,
    calm_wanted: Duration,
}

impl Governor {
    pub(crate) fn new(most: u32) -> Self {
        let most = most.max(1);
        Self { most, threads: most, crowded_in_row: 0, since: Duration::ZERO, calm_wanted: FIRST_CALM }
    }

    pub(crate) fn threads(&self) -> u32 {
        self.threads
    }

    /// Takes a sample: batch time, and the time that this process's threads stood in the run queue meanwhile.
    pub(crate) fn sample(&mut self, batch_time: Duration, queued: Duration) {
        self.since += batch_time;
        // A long batch is many samples' worth: it decides alone.
        let weight = if batch_time >= SAMPLE * LONG_BATCH { CROWDED_IN_ROW } else { 1 };
        let crowded = queued * self.threads * 4 > batch_time * step(self.threads) * CROWDED_QUARTERS;
        let calm = queued <= batch_time / CALM_PART;
        self.crowded_in_row = if crowded { self.crowded_in_row + weight } else { 0 };
        if self.crowded_in_row >= CROWDED_IN_ROW && self.threads > 1 {
            // A raise that fails at once makes the next one wait; one that went well does not.
            self.calm_wanted = if self.since < PROVED { (self.calm_wanted * 2).min(LONGEST_CALM) } else { FIRST_CALM };
            self.change(self.threads - step(self.threads));
        } else if self.threads < self.most && calm && self.since >= self.calm_wanted {
            self.change((self.threads + step(self.threads + 1)).min(self.most));
        }
    }

    fn change(&mut self, threads: u32) {
        self.threads = threads.max(1);
        self.since = Duration::ZERO;
        self.crowded_in_row = 0;
    }
}

/// A quarter at a time, at least one.
fn step(threads: u32) -> u32 {
    (threads / 4).max(1)
}

/// The time that the threads of this process have stood in the run queue since they began; `None` where the system does not tell.
pub(crate) fn time_in_run_queue() -> Option<Duration> {
    let mut nanos = 0_u64;
    for task in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
        // A thread may end while we look.
        let Ok(line) = std::fs::read_to_string(task.path().join("schedstat")) else { continue };
        nanos += line.split_whitespace().nth(1)?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A script of `c`rowded and `.` calm samples; gives the threads after each.
    fn check(most: u32, script: &str, expect: &[u32]) {
        let mut governor = Governor::new(most);
        let threads: Vec<u32> = script
            .chars()
            .map(|sample| {
                governor.sample(SAMPLE, if sample == 'c' { SAMPLE / 2 } else { SAMPLE / 50 });
                governor.threads()
            })
            .collect();
        assert_eq!(threads, expect, "{script}");
    }

    #[test]
    fn crowds_take_threads_away_and_calm_gives_them_back() {
        check(2, "....", &[2, 2, 2, 2]);
        check(2, "c.c.", &[2, 2, 2, 2]);
        check(2, "cccc", &[2, 1, 1, 1]);
        check(1, "cccc", &[1, 1, 1, 1]);
        check(8, "cccccc", &[8, 6, 6, 5, 5, 4]);
        let mut governor = Governor::new(2);
        governor.sample(SAMPLE * LONG_BATCH, SAMPLE * 2);
        assert_eq!(governor.threads(), 1, "one long batch is enough");
    }

    #[test]
    fn a_wait_that_costs_less_than_a_thread_takes_none_away() {
        #[track_caller]
        fn check(threads: u32, queued_percent: u32, stay: bool) {
            let mut governor = Governor::new(threads);
            for _ in 0..10 {
                governor.sample(SAMPLE, SAMPLE * queued_percent / 100);
            }
            assert_eq!(governor.threads() == threads, stay, "{threads} threads, {queued_percent} % in the queue");
        }
        // One of two threads is half of the work, a quarter of many is a quarter.
        check(2, 30, true);
        check(2, 45, false);
        check(16, 15, true);
        check(16, 25, false);
        // One busy process beside two threads on two cores: each of three waits a third of the time.
        check(2, 67, false);
    }

    #[test]
    fn each_failed_try_makes_the_next_one_wait_longer() {
        let mut governor = Governor::new(2);
        let (mut tries, mut since) = (Vec::new(), 0);
        for _ in 0..1000 {
            // Calm with one thread, crowded with two.
            let queued = if governor.threads() == 2 { SAMPLE } else { Duration::ZERO };
            let before = governor.threads();
            governor.sample(SAMPLE, queued);
            since += 1;
            if governor.threads() > before {
                tries.push(since);
                since = 0;
            }
        }
        assert_eq!(tries, [22, 42, 82, 162, 322, 322]);
    }

    #[test]
    fn all_threads_come_back_for_good() {
        let mut governor = Governor::new(16);
        for _ in 0..20 {
            governor.sample(SAMPLE, SAMPLE);
        }
        assert_eq!(governor.threads(), 1);
        for _ in 0..40_000 {
            governor.sample(SAMPLE, Duration::ZERO);
        }
        assert_eq!(governor.threads(), 16);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_run_queue_can_be_read() {
        let first = time_in_run_queue().unwrap();
        assert!(time_in_run_queue().unwrap() >= first);
    }
}
