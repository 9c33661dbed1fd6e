-- What a lead counted while it served a mixture of experts: rows that the router sent to each expert, in sums. They say nothing
-- of whose rows they were. The sums of a model are halved as they grow, so that what is new counts most.
CREATE TABLE expert_rows (
    model  BLOB    NOT NULL,
    layer  INTEGER NOT NULL,
    expert INTEGER NOT NULL,
    rows   INTEGER NOT NULL CHECK (rows >= 0),
    PRIMARY KEY (model, layer, expert)
) STRICT, WITHOUT ROWID;

-- What it measured: of a worker its link and its work, of itself the trunk and the wait for experts; each as the sums of a line
-- through the newest measurements (weights, x, y, x squared, x times y).
CREATE TABLE expert_costs (
    model BLOB    NOT NULL,
    node  BLOB    NOT NULL,
    what  TEXT    NOT NULL CHECK (what IN ('link', 'work', 'trunk', 'wait')),
    at    INTEGER NOT NULL,
    w     REAL    NOT NULL,
    x     REAL    NOT NULL,
    y     REAL    NOT NULL,
    xx    REAL    NOT NULL,
    xy    REAL    NOT NULL,
    PRIMARY KEY (model, node, what)
) STRICT, WITHOUT ROWID;
