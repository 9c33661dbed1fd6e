-- Keys of API clients. `hash` is the SHA-256 of the secret; the secret itself is nowhere. Amounts in msat.
-- `reserved` is the sum over open calls, `spent` the sum over ended ones, of this key and of every key below it.
CREATE TABLE api_keys (
    id                  INTEGER PRIMARY KEY AUTOINCREMENT,
    hash                BLOB    NOT NULL UNIQUE,
    name                TEXT    NOT NULL,
    kind                TEXT    NOT NULL CHECK (kind IN ('infer', 'manage', 'prepaid')),
    parent              INTEGER REFERENCES api_keys (id),
    created_at          INTEGER NOT NULL,
    revoked_at          INTEGER,
    expires_at          INTEGER,
    per_request         INTEGER,
    per_day             INTEGER,
    total               INTEGER,
    requests_per_minute INTEGER,
    models              TEXT    NOT NULL DEFAULT '',
    spent               INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved            INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    paid_in             INTEGER NOT NULL DEFAULT 0 CHECK (paid_in >= 0),
    paid_out            INTEGER NOT NULL DEFAULT 0 CHECK (paid_out >= 0),
    requests            INTEGER NOT NULL DEFAULT 0,
    CHECK (kind <> 'prepaid' OR paid_in - paid_out - spent - reserved >= 0)
) STRICT;
CREATE INDEX api_keys_parent ON api_keys (parent);

-- What each key's calls of one day (days since 1970-01-01, UTC) have cost.
CREATE TABLE api_key_days (
    key   INTEGER NOT NULL REFERENCES api_keys (id),
    day   INTEGER NOT NULL,
    spent INTEGER NOT NULL CHECK (spent >= 0),
    PRIMARY KEY (key, day)
) STRICT, WITHOUT ROWID;

-- One row for each call: what it reserved while it ran, what it cost, and `detail` (JSON without any text of the caller's:
-- counts, providers, receipts, the exchange rate of the moment). `part` counts the calls of one API request.
CREATE TABLE api_calls (
    id       BLOB    NOT NULL,
    part     INTEGER NOT NULL,
    key      INTEGER REFERENCES api_keys (id),
    caller   TEXT,
    model    TEXT    NOT NULL,
    at       INTEGER NOT NULL,
    day      INTEGER NOT NULL,
    reserved INTEGER NOT NULL CHECK (reserved >= 0),
    state    TEXT    NOT NULL CHECK (state IN ('open', 'done', 'failed')),
    ended_at INTEGER,
    cost     INTEGER NOT NULL DEFAULT 0 CHECK (cost >= 0),
    charged  INTEGER NOT NULL DEFAULT 0 CHECK (charged >= 0),
    detail   TEXT,
    PRIMARY KEY (id, part)
) STRICT;
CREATE INDEX api_calls_open ON api_calls (state) WHERE state = 'open';
CREATE INDEX api_calls_key ON api_calls (key);

-- The requests to providers that a call was made of, written before any token of them is passed on: after a crash the
-- journal says what each has cost.
CREATE TABLE api_call_legs (
    request BLOB    NOT NULL PRIMARY KEY,
    id      BLOB    NOT NULL,
    part    INTEGER NOT NULL,
    FOREIGN KEY (id, part) REFERENCES api_calls (id, part)
) STRICT, WITHOUT ROWID;
CREATE INDEX api_call_legs_call ON api_call_legs (id, part);
