-- What a lead measured of those whose layers it buys: a token's time through them as it was listed then, and as it was, in
-- microseconds; and in how many measurements in a row the listing was far from the truth. The newest of each worker's part.
CREATE TABLE stage_paces (
    model       BLOB    NOT NULL,
    node        BLOB    NOT NULL,
    first       INTEGER NOT NULL,
    beyond      INTEGER NOT NULL,
    listed_us   INTEGER NOT NULL CHECK (listed_us >= 0),
    measured_us INTEGER NOT NULL CHECK (measured_us >= 0),
    lies        INTEGER NOT NULL CHECK (lies >= 0),
    at          INTEGER NOT NULL,
    PRIMARY KEY (model, node, first, beyond)
) STRICT, WITHOUT ROWID;
