-- The journal: entries are appended and never changed. `bytes` is the canonical entry, a leaf of the Merkle log;
-- `opening` is kept beside it and may be pruned; `at` repeats the entry's time for queries by time.
CREATE TABLE entries (
    seq     INTEGER PRIMARY KEY,
    at      INTEGER NOT NULL,
    bytes   BLOB    NOT NULL,
    opening BLOB
) STRICT;

-- The Merkle log over the entries, as tiles of up to 256 hashes of 32 bytes (level 0: leaf hashes).
CREATE TABLE tiles (
    level  INTEGER NOT NULL,
    idx    INTEGER NOT NULL,
    hashes BLOB    NOT NULL,
    PRIMARY KEY (level, idx)
) STRICT, WITHOUT ROWID;

-- Signed tree heads that this node has made, by the number of entries that they cover.
CREATE TABLE checkpoints (
    size INTEGER PRIMARY KEY,
    note TEXT    NOT NULL
) STRICT;
