-- Invoices of the front door: each, when paid, fills a prepaid key, or makes the one whose secret hashes to `key_hash`.
-- `asker`: the address that asked, until it is paid. The journal has a deposit before its key does.
CREATE TABLE door_invoices (
    hash       BLOB    NOT NULL PRIMARY KEY,
    key        INTEGER REFERENCES api_keys (id),
    key_hash   BLOB,
    name       TEXT    NOT NULL,
    asker      TEXT,
    amount     INTEGER NOT NULL CHECK (amount > 0),
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    paid_at    INTEGER,
    received   INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX door_invoices_open ON door_invoices (expires_at) WHERE paid_at IS NULL;
CREATE INDEX door_invoices_key ON door_invoices (key) WHERE paid_at IS NULL;

-- What clients have asked back. The key's `paid_out` holds amount and fee limit from the asking on; what is not needed
-- returns. `hash` is the payment that was attempted last; there is never a second one before it has failed for good.
CREATE TABLE door_refunds (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    key         INTEGER NOT NULL REFERENCES api_keys (id),
    amount      INTEGER NOT NULL CHECK (amount > 0),
    max_fee     INTEGER NOT NULL CHECK (max_fee >= 0),
    destination TEXT    NOT NULL,
    state       TEXT    NOT NULL CHECK (state IN ('waiting', 'attempted', 'settled', 'failed')),
    tries       INTEGER NOT NULL DEFAULT 0,
    next_at     INTEGER NOT NULL,
    created_at  INTEGER NOT NULL,
    hash        BLOB,
    bolt11      TEXT,
    fee         INTEGER,
    reason      TEXT
) STRICT;
CREATE INDEX door_refunds_open ON door_refunds (state);
CREATE INDEX door_refunds_key ON door_refunds (key);
CREATE INDEX door_refunds_hash ON door_refunds (hash);

-- Slices that the house of this node has paid to it, inside the process.
CREATE TABLE door_house (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    hash     BLOB    NOT NULL UNIQUE,
    amount   INTEGER NOT NULL CHECK (amount > 0),
    preimage BLOB    NOT NULL,
    at       INTEGER NOT NULL
) STRICT;
