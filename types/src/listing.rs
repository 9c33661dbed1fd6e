//! What a provider publishes. (The market room writes this file: see its brief.)
