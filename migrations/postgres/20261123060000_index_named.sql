-- Payment hashes and transaction ids that entries name: what the journal explains of the wallet's list.
CREATE TABLE named (
    hash BYTEA PRIMARY KEY
);

-- How many entries are in it. Those of before this table are read once, when a node next opens the journal for writing.
CREATE TABLE named_upto (
    one BIGINT PRIMARY KEY CHECK (one = 1),
    len BIGINT NOT NULL
);
INSERT INTO named_upto (one, len) VALUES (1, 0);
