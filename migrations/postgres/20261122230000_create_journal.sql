-- The journal: entries are appended and never changed. `bytes` is the canonical entry, a leaf of the Merkle log;
-- `opening` is kept beside it and may be pruned; `at` repeats the entry's time for queries by time; `leaf` is set where
-- the body was pruned.
CREATE TABLE entries (
    seq     BIGINT PRIMARY KEY,
    at      BIGINT NOT NULL,
    bytes   BYTEA  NOT NULL,
    opening BYTEA,
    leaf    BYTEA
);

-- The Merkle log over the entries, as tiles of up to 256 hashes of 32 bytes (level 0: leaf hashes).
CREATE TABLE tiles (
    level  BIGINT NOT NULL,
    idx    BIGINT NOT NULL,
    hashes BYTEA  NOT NULL,
    PRIMARY KEY (level, idx)
);

-- Signed tree heads that this node has made, by the number of entries that they cover.
CREATE TABLE checkpoints (
    size BIGINT PRIMARY KEY,
    note TEXT   NOT NULL
);

-- Checkpoints of other nodes' logs as they were heard: what a node compares, so that a second history is found.
CREATE TABLE witnessed (
    node     BYTEA  NOT NULL,
    size     BIGINT NOT NULL,
    note     TEXT   NOT NULL,
    heard_at BIGINT NOT NULL,
    PRIMARY KEY (node, size)
);
