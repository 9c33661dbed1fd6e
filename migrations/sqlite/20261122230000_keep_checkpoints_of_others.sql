-- Checkpoints of other nodes' logs as they were heard: what a node compares, so that a second history is found.
CREATE TABLE witnessed (
    node     BLOB    NOT NULL,
    size     INTEGER NOT NULL,
    note     TEXT    NOT NULL,
    heard_at INTEGER NOT NULL,
    PRIMARY KEY (node, size)
) STRICT, WITHOUT ROWID;

-- Set where an entry's body was pruned: the leaf hash of the bytes that were there. `bytes` then holds the same entry
-- without its evidence, and `opening` nothing.
ALTER TABLE entries ADD COLUMN leaf BLOB;
