"""Verifies satgrid bundles offline. A second implementation, written from docs/ledger-format.md; the numbers in comments are its sections.

    verify.py FILE [OTHER]     one bundle or claim, or both parties' exports of one history, or a claim and its answer: exit 0 clean, 1 findings, 2 unreadable
    verify.py --vectors DIR    all golden vectors: prints `N passed, N failed`
"""

import json
import re
import sys
from base64 import b64decode, b64encode
from collections import defaultdict
from dataclasses import dataclass, field

import cbor2
import claims
from primitives import (
    Refused, charge, decode, ed25519, included, invoice, leaf_hash, message, numerators, recover, root_of, schnorr, sha,
)

LIMITS = {"quote": 2048, "session-open": 4096, "request-open": 1024, "ack": 512, "receipt": 40960, "session-close": 4096,
          "credit-note": 512, "inclusion-promise": 256, "credit-transfer": 256, "succession": 256}  # fmt: skip
MAX_ITEM, MAX_ENTRY, MAX_OPENING, HOUR, SKEW = 231_616, 196_608, 32_768, 3_600_000, 300_000
LIGHTNING, PREPAID, INCOME, ASSET, EXPENSE, FEES, DUE, DUST, WORKER, EXTERNAL, CLIENTS, MINERS = range(12)
DEBIT_NORMAL, NEVER_NEGATIVE = {LIGHTNING, ASSET, EXPENSE, FEES, MINERS}, {PREPAID, ASSET, DUE, WORKER, CLIENTS}
OWED = {PREPAID, DUE, WORKER, CLIENTS}


class Unreadable(Exception):
    """Not a bundle: nothing more is judged (11)."""


def party(rule: str) -> str:
    """Whom a finding in one file names (12). Alone only where the party's own signatures prove it."""
    of, _ = rule.split("/")
    if rule in ("log/two-histories", "quote/dearer", "quote/terms", "promise/broken", "expert/work"):
        return "provider"
    if rule in ("open/quote", "open/twice", "request/invalid", "close/remainder"):
        return "exporter-or-consumer"
    own = rule in ("invoice/reuse", "receipt/opening", "stage/orphan")
    theirs = of in ("invoice", "ack", "receipt", "stage", "expert", "credit-note") or rule == "request/unknown"
    return "exporter-or-provider" if theirs and not own else "exporter"


def statement(kind: str, signed: dict, *keys: bytes) -> dict:
    """The body, if every key signed it (2). Raises Refused with the rule."""
    try:
        body = decode(kind, signed[0], LIMITS[kind])
    except Refused as error:
        raise Refused("statement/canonical", error) from None
    if not all(ed25519(key, message(kind, signed[0]), signed[1 + n]) for n, key in enumerate(keys)):
        raise Refused("statement/signature", kind)
    return body


def peek(kind: str, signed: dict) -> dict:
    return statement(kind, signed)


def checkpoint(note: str):
    """Node, size and root of a signed note (10); the one spelling is rebuilt and compared."""
    found = re.fullmatch(r"(satgrid/([0-9a-f]{64})\n(0|[1-9][0-9]{0,19})\n(\S+)\n)\n\u2014 satgrid/(\S+) (\S+)\n", note)
    try:
        text, node, size, root, _, blob = found.groups()
        root, blob, key = b64decode(root, validate=True), b64decode(blob, validate=True), bytes.fromhex(node)
        rebuilt = f"{text}\n\u2014 satgrid/{node} {b64encode(blob).decode()}\n"
        key_hash = sha(f"satgrid/{node}\n\1".encode(), key)[:4]
        right = rebuilt == note and b64encode(root).decode() in text and len(root) == 32 and len(blob) == 68
        if right and blob[:4] == key_hash and int(size) < 2**64 and len(note.encode()) <= 512 and ed25519(key, text.encode(), blob[4:]):
            return key, int(size), root
    except (AttributeError, ValueError):
        pass
    raise Refused("log/checkpoint")


def listing(text: str) -> tuple:
    """Id and content of a listing event (6)."""
    try:
        event = json.loads(text)
        key, tags, made, raw = event["pubkey"], event["tags"], event["created_at"], event["content"]
        whole = json.dumps([0, key, made, event["kind"], tags, raw], ensure_ascii=False, separators=(",", ":"))
        identity, said = sha(whole.encode()), json.loads(raw)
        tagged = lambda name: [tag[1] for tag in tags if tag and tag[0] == name]
        (expiration,), (d,) = tagged("expiration"), tagged("d")
        part = said["part"]
        kind, value = (part, None) if part == "whole" else next(iter(part.items()))
        word = f"layers {value['start']}-{value['end']}" if kind == "layers" else kind
        expect = {"expiration": [str(said["expires_at"])], "m": [said["model"]], "q": [said["quantisation"]], "k": [kind],
                  "l": [word[7:]] if kind == "layers" else [], "u": said["addresses"], "g": [said["region"]] if said.get("region") else []}  # fmt: skip
        texts = [said["model"], said["quantisation"], said["instruction_set"], *expect["g"], *said["addresses"]]
        node = bytes.fromhex(said["node_key"])
        letters = ["ybndrfg8ejkmcpqxot1uwisza345h769".index(c) for c in said["bindings"]["lightning"]]
        signature = int("1" + "".join(f"{n:05b}" for n in letters), 2).to_bytes(66, "big")[1:]
        digest = sha(sha(b"Lightning Signed Message:satgrid-node-key-v1:" + said["node_key"].encode()))
        good = (
            event["kind"] == 38521 and identity.hex() == event["id"] and len(text.encode()) <= 131_072
            and len(raw.encode()) <= 65_536 and len(tags) <= 64 and 0 < int(expiration) - made <= 3600
            and said["version"] == 1 and said["model"] and said["context_length"] > 0 and 1 <= len(said["profiles"]) <= 2
            and set(said["profiles"]) <= {"exact", "fast"} and len(said["addresses"]) <= 8 and all(len(t.encode()) <= 128 for t in texts)
            and {"slots", "speed", "memory_bytes", "tokenizer", "build"} <= said.keys() and all(type(n) is int for n in said["rates"].values())
            and (kind == "whole" or kind == "layers" and value["start"] < value["end"] or kind == "experts" and value and value == sorted(map(list, set(map(tuple, value)))))
            and (said.get("embeds") is None or type(said["embeds"]) is int and 0 < said["embeds"] <= 16_384 and kind == "whole")
            and len(said.get("links", [])) <= 64
            and d == f"{said['model_root'][:16]}:{word}" and all(tagged(name) == values for name, values in expect.items())
            and schnorr(bytes.fromhex(key), identity, bytes.fromhex(event["sig"]))
            and ed25519(node, b"satgrid-binding-v1\0" + bytes.fromhex(key) + d.encode(), bytes.fromhex(said["bindings"]["node"]))
            and len(letters) == 104 and recover(digest, signature[0] - 31, signature[1:]).hex() == said["lightning_node"]
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise Refused("listing/invalid", error) from None
    if not good:
        raise Refused("listing/invalid")
    return identity, said


LISTINGS: dict = {}


def cached_listing(text: str) -> tuple:
    """The same listing stands in many files; three curve operations each."""
    if text not in LISTINGS:
        LISTINGS[text] = listing(text)
    return LISTINGS[text]


class Books:
    """Double entry with two-phase transfers (8)."""

    def __init__(self):
        self.sums, self.holds, self.known = defaultdict(lambda: [0, 0, 0, 0]), {}, {}

    def balance(self, account, outgoing=False) -> int:
        debits, credits, debits_pending, credits_pending = self.sums[account]
        if account[0] in DEBIT_NORMAL:
            return debits - credits - (credits_pending if outgoing else 0)
        return credits - debits - (debits_pending if outgoing else 0)

    def owed(self) -> int:
        return sum(self.balance(account) for account in list(self.sums) if account[0] in OWED)

    def apply(self, at: int, transfers: list):
        """The net movements, holds opened and holds ended; or the rule that is broken, and nothing is done."""
        saved = {a: list(s) for a, s in self.sums.items()}, dict(self.holds), dict(self.known)
        try:
            if len(transfers) > 1024:
                raise Refused("transfer/malformed")
            flows = self.take(at, transfers)
            shared = next((h[4] for h in (*flows[1].values(), *(e[1] for e in flows[2])) if h[4]), None)
            shared = shared or next((i for a in flows[0] for i in a[1:]), None)
            for ident in flows[1].keys() & self.holds.keys():
                self.holds[ident] = (*self.holds[ident][:4], self.holds[ident][4] or shared, at)
            touched = {a for a, s in self.sums.items() if saved[0].get(a) != s}
            if any(a[0] in NEVER_NEGATIVE and self.balance(a, True) < 0 for a in touched):
                raise Refused("transfer/overdrawn")
            return flows, None
        except Refused as error:
            self.sums, self.holds, self.known = defaultdict(lambda: [0, 0, 0, 0], saved[0]), *saved[1:]
            return self.lenient(at, transfers), error.args[0]

    def lenient(self, at, transfers):
        """What refused transfers would have done: judged against the evidence all the same."""
        copy = Books()
        copy.holds, copy.known = dict(self.holds), dict(self.known)
        return copy.take(at, transfers, strict=False)

    def take(self, at, transfers, strict=True):
        net, opened, ended = defaultdict(int), {}, []

        def refuse(rule):
            if strict:
                raise Refused(rule)

        for transfer in transfers:
            ident, (kind, op) = transfer[0], transfer[1]
            if ident in self.known:
                if self.known[ident] != transfer:
                    refuse("transfer/malformed")
                continue
            self.known[ident] = transfer
            if kind < 2:
                debit, credit, amount = (op[0][0], *op[0][1]), (op[1][0], *op[1][1]), op[2]
                if not amount or debit == credit:
                    refuse("transfer/malformed")
                if kind == 0:
                    self.post(net, debit, credit, amount)
                else:
                    self.holds[ident] = opened[ident] = debit, credit, amount, op.get(3), (*debit[1:], *credit[1:], None)[0], at
                    self.sums[debit][2] += amount
                    self.sums[credit][3] += amount
                continue
            hold = self.holds.pop(op[0], None)
            if hold is None:
                refuse("transfer/two-phase")
                continue
            debit, credit, amount, expires, *_ = hold
            self.sums[debit][2] -= amount
            self.sums[credit][3] -= amount
            ended.append((op[0], hold, kind))
            if kind == 2:
                if op[1] == 0:
                    refuse("transfer/malformed")
                if op[1] > amount:
                    refuse("transfer/two-phase")
                self.post(net, debit, credit, op[1])
            if kind == 4 and (expires is None or expires > at):
                refuse("transfer/two-phase")
        return {a: n for a, n in net.items() if n}, opened, ended

    def post(self, net, debit, credit, amount):
        net[debit] += amount
        net[credit] -= amount
        self.sums[debit][0] += amount
        self.sums[credit][1] += amount


@dataclass
class Session:
    ident: bytes
    open: dict
    quotes: dict
    as_provider: bool
    slices: dict = field(default_factory=dict)  # k: [payment hash, amount, status, in a receipt, replaced invoices]
    requests: dict = field(default_factory=dict)  # id: [request-open, last ack id, last ack, holds]
    ended: set = field(default_factory=set)
    numerators: int = 0
    charged: int = 0
    paid: int = 0
    refunded: int = 0
    credited: int = 0  # by notes of other sessions
    spent: int = 0  # by this session's note in another
    note: bytes | None = None
    note_until: int | None = None
    refunds: int = 0
    receipted: int = 0
    receipts: list = field(default_factory=list)  # (id, index, leaf)
    promised: list = field(default_factory=list)
    abandoned: dict = field(default_factory=dict)
    notes: set = field(default_factory=set)  # ids of credit notes
    asked: set = field(default_factory=set)  # ids of requests
    invoices: set = field(default_factory=set)  # payment hashes
    tokens: list = field(default_factory=lambda: [0, 0])
    refund: tuple | None = None
    closed: bool = False
    close_invoices: frozenset = frozenset()

    def remainder(self) -> int:
        return max(0, self.paid + self.credited - self.charged - self.refunded - self.spent)

    def last(self):
        return self.receipts[-1][0] if self.receipts else None

    def summary(self):
        """What both parties must agree on (12.7)."""
        paid = {k: (s[0], s[1]) for k, s in self.slices.items() if s[2] == "paid"}
        owed = {request: acked for request, acked in self.abandoned.items() if acked[0]}
        return (len(self.receipts), self.last(), paid, owed, self.tokens, self.numerators, self.paid, self.charged, self.refunds,
                self.credited, self.spent)  # fmt: skip


class Audit:
    """The fold of section 12."""

    def __init__(self, data: bytes):
        self.findings, self.sessions, self.over = [], {}, {}
        self.listings, self.quotes, self.by_key, self.payments, self.books = {}, {}, {}, {}, Books()
        self.network, self.legs, self.expert_legs, self.accounted = None, {}, {}, set()
        self.keys = []
        items = read_items(data)
        head = next(items, (None, None))
        if head[0] == 4:
            self.fraud(head[1][0], list(items))
            return
        if head[0] != 0 or head[1][0][0] != "satgrid-bundle" or head[1][0][1] != 1:
            raise Unreadable("not a bundle of version 1")
        self.node, self.filter = head[1][0][2], head[1][0][3]
        self.whole = self.filter[0] == 0
        number, fields = next(items, (None, None))
        if number != 1:
            raise Unreadable("no checkpoint")
        try:
            self.checkpoint = checkpoint(fields[0])
            self.require(self.checkpoint[0] == self.node, "log/checkpoint")
            self.checkpoint = self.checkpoint if self.checkpoint[0] == self.node else None
        except Refused:
            self.checkpoint = self.find("log/checkpoint")
        self.leaves, self.last, count = [], None, None
        for number, fields in items:
            if count is not None or number not in (2, 3):
                raise Unreadable("an item out of its place")
            if number == 3:
                count = fields[0]
            else:
                self.entry(fields[0])
        if count != len(self.leaves):
            raise Unreadable("the end mark is missing or does not count right")
        self.finish()

    def find(self, rule: str, detail="", named=None):
        self.findings.append((rule, len(getattr(self, "leaves", [])) - 1, str(detail), named or party(rule)))

    def require(self, holds, rule: str, detail="", named=None) -> bool:
        if not holds:
            self.find(rule, detail, named)
        return bool(holds)

    def fraud(self, proof, more):
        try:
            one, other = checkpoint(proof[0]), checkpoint(proof[1])
        except Refused:
            one = other = (None,) * 3
        if more or one[:2] != other[:2] or one[2] == other[2]:
            raise Unreadable("this proves nothing")
        self.node = one[0]
        self.find("log/two-histories", self.node.hex())

    # 12.1

    def entry(self, item: dict):
        leaf = leaf_hash(item[0])
        self.leaves.append(leaf)
        try:
            entry = decode("entry", item[0], MAX_ENTRY)
        except Refused as error:
            return self.find("entry/canonical", error)
        seq, at, prev = entry[0], entry[1], entry[2]
        follows = seq == 0 if self.last is None else seq == self.last[0] + 1 if self.whole else seq > self.last[0]
        self.require(follows, "entry/sequence", seq)
        expected = (0, bytes(32), 0) if self.last is None else (self.last[0] + 1, self.last[1], self.last[2])
        self.require(seq != expected[0] or prev == expected[1], "entry/chain")
        self.require(at >= expected[2], "entry/clock")
        self.last = seq, leaf, at
        proof = item.get(2)
        if self.whole or proof is None or self.checkpoint:
            fits = proof is None if self.whole else proof is not None and included(leaf, seq, self.checkpoint[1], proof, self.checkpoint[2])
            self.require(fits, "log/inclusion")
        kind, fields = entry.get(3, (None, {}))
        opening = None
        if 1 in item:
            try:
                opening = decode("receipt-opening", item[1], MAX_OPENING)
                self.require(kind == 11, "receipt/opening")
            except Refused as error:
                self.find("receipt/opening", error)
        self.require((seq == 0) == (kind == 0), "entry/genesis")
        flows, broken = self.books.apply(at, entry[4])
        self.now, self.seq, self.leaf, self.flows = at, seq, leaf, flows
        session, backing, self.spent_from = None, ("nothing",), None
        try:
            session, backing = self.evidence(kind, fields, opening)
        except Refused as error:
            self.find(*error.args)
            backing = None
        self.judge(kind, session, backing)
        if broken:
            self.find(broken)
        elif kind in (6, 7, 8, 16) and session and any(self.of(h, session) and h[1][0] == LIGHTNING for h in self.books.holds.values()):
            self.find("transfer/two-phase", "the payment is over, its reservation is not")
        for session in filter(None, (session, self.spent_from)):
            if session.ident in self.sessions and self.is_over(session):
                self.over[session.ident] = self.sessions.pop(session.ident)
                self.by_key.pop(session.open[2])
                for s in session.slices.values():
                    self.payments |= {h: None for h in (s[0], *s[4]) if h in self.payments}

    def of(self, hold, session) -> bool:
        return session.ident == hold[4]

    def is_over(self, s) -> bool:
        settled = all(self.books.balance((a, s.ident)) == 0 for a in (PREPAID, ASSET, DUE))
        pending = any(self.of(hold, s) for hold in self.books.holds.values())
        return s.closed and not s.requests and not s.refund and not s.remainder() and settled and not pending

    # 12.2 to 12.5: each gives the session and what its transfers may do

    def session(self, ident: bytes) -> Session:
        if ident not in self.sessions:
            raise Refused("statement/session")
        return self.sessions[ident]

    def evidence(self, kind, f, opening):
        handler = {0: self.genesis, 1: self.listing, 2: self.quote, 3: self.opened, 4: self.invoice, 5: self.attempted, 6: self.settled,
                   7: self.failed, 8: self.received, 9: self.request, 10: self.ack, 12: self.abandon, 13: self.close, 14: self.credit_note,
                   15: self.refund_attempted, 16: self.refund_settled, 17: self.refund_received, 20: self.snapshot, 21: self.own_note,
                   22: self.promise, 23: self.credit_transfer, 24: self.own_payment, 25: self.on_chain,
                   26: self.succession}.get(kind)  # fmt: skip
        if kind == 11:
            return self.receipt(f, opening)
        if handler:
            return handler(f)
        idents = [hold[4] for hold in self.flows[1].values() if hold[4]]
        return self.sessions.get(idents[0]) if idents and kind is None else None, ("alone",) if kind is None else ("nothing",)

    def own_payment(self, f):
        self.claim(f[0], None)
        self.require(4 not in f or sha(f[4]) == f[0], "payment/preimage")
        out = -f[2] if f[1] else f[2]
        return None, ("exactly", {(EXTERNAL,): out, (FEES,): f[3], (LIGHTNING,): -out - f[3]})

    def on_chain(self, f):
        return None, ("miners", f[3])

    def genesis(self, f):
        self.keys = [f[0]]
        self.network = f[3] if f[3] in ("mainnet", "testnet", "signet", "regtest") else None
        return None, ("nothing",)

    def ours(self, key: bytes) -> bool:
        return key == self.node or key in self.keys

    def succession(self, f):
        """The node's key gave way (3.11)."""
        said = peek("succession", f[0])
        self.version(said)
        old, new = said[1], said.get(2)
        if not (2 in said) == (4 in said) == (2 in f[0]) or old == new:
            raise Refused("statement/signature")
        statement("succession", f[0], *[key for key in (old, new) if key])
        follows = self.keys and old == self.keys[-1] and new not in self.keys
        if self.require(follows, "bundle/node") and new:
            self.keys.append(new)
        return None, ("nothing",)

    def listing(self, f):
        ident, said = cached_listing(f[0])
        self.listings[ident] = said
        return None, ("nothing",)

    def version(self, value):
        self.require(value[0] == 1, "statement/version")

    def quote(self, f):
        q = statement("quote", f[0], peek("quote", f[0])[1])
        self.version(q)
        said = self.listings.get(q[4])
        if self.require(said, "quote/listing"):
            r = said["rates"]
            rates = enumerate(("input", "cached_input", "output", "per_request", "position_layer", "expert_row"))
            self.require(all(q[12].get(n, 0) <= r.get(k, 0) for n, k in rates), "quote/dearer")
            same = [q[1].hex(), q[2].hex(), q[5].hex(), q[6].hex(), q[7], q[9].hex()]
            listed = [said[k] for k in ("node_key", "lightning_node", "model_root", "tokenizer", "quantisation", "build")]
            self.require(same == listed and ("exact", "fast")[q[8]] in said["profiles"] and q[14] // 1000 <= said["expires_at"], "quote/terms")
        ident = sha(message("quote", f[0][0]))
        session = self.sessions.get(self.by_key.get(q[3]))
        if session:
            if self.require(session.open[1] == q[1], "open/quote", named="exporter"):
                session.quotes[ident] = q
        else:
            self.quotes.setdefault(q[3], {})[ident] = q
        return session, ("nothing",)

    def opened(self, f):
        o = statement("session-open", f[0], peek("session-open", f[0])[2])
        self.version(o)
        ident = sha(message("session-open", f[0][0]))
        if not self.require(ident not in self.sessions and ident not in self.over and o[2] not in self.by_key, "open/twice"):
            return self.sessions.get(ident), ("nothing",)
        quotes = self.quotes.pop(o[2], {})
        accepted = quotes.get(o[3])
        self.require(accepted and accepted[1] == o[1] and o[6] <= accepted[15] + SKEW, "open/quote")
        self.sessions[ident] = Session(ident, o, quotes, self.ours(o[1]))
        self.by_key[o[2]] = ident
        return self.sessions[ident], ("nothing",)

    def invoice(self, f):
        s, k, d = self.session(f[0]), f[1], f[3]
        self.version(d)
        try:
            facts = invoice(f[2])
        except Refused as error:
            self.find("invoice/signature", error)
            return s, None
        self.require(self.network in (None, facts["network"]), "invoice/signature")
        quote = s.quotes.get(d[4])
        self.require(quote and (d[1], d[2], d[5], d[6]) == (s.ident, k, s.open[1], s.open[2]), "invoice/descriptor")
        self.require(not quote or facts["payee"] == quote[2], "invoice/payee")
        self.require(facts["terms"] == sha(encoded(d)), "invoice/terms")
        self.require(facts["amount"] == d[3], "invoice/amount")
        old = s.slices.get(k)
        if self.require(k <= max(s.slices, default=-1) + 1 and (not old or old[2] in ("invoiced", "failed")), "invoice/sequence"):
            replaced = {**old[4], old[0]: old[1]} if old else {}
            s.slices[k] = [facts["payment_hash"], d[3], "invoiced", False, replaced]
        s.invoices.add(facts["payment_hash"])
        self.claim(facts["payment_hash"], (s.ident, k))
        return s, ("nothing",)

    def claim(self, payment_hash, what):
        if self.require(payment_hash not in self.payments, "invoice/reuse"):
            self.payments[payment_hash] = what

    def slice(self, payment_hash, take=False):
        what = self.payments.get(payment_hash)
        if not what or what[1] == "refund":
            raise Refused("payment/unknown")
        s = self.session(what[0])
        held = s.slices.get(what[1])
        return s, held if held and (self.taken_up(held, payment_hash) if take else held[0] == payment_hash) else None

    def taken_up(self, held, payment_hash) -> bool:
        """An invoice that was replaced can be paid until its slice is."""
        if held[0] != payment_hash and held[2] != "paid" and payment_hash in held[4]:
            held[4][held[0]] = held[1]
            held[:2] = payment_hash, held[4].pop(payment_hash)
        return held[0] == payment_hash

    def attempted(self, f):
        s = self.session(f[0])
        self.require(not s.as_provider, "payment/unknown")
        held = s.slices.get(f[1])
        self.require(all(other[2] != "attempted" for other in s.slices.values()), "payment/in-flight")
        if not self.require(held and self.taken_up(held, f[2]), "payment/unknown"):
            return s, None
        self.require(held[2] not in ("paid", "attempted"), "payment/twice")
        held[2] = "attempted"
        return s, ("pay", (ASSET, s.ident), held[1], held[1], f[3])

    def settled(self, f):
        s, held = self.slice(f[0])
        self.require(not s.as_provider, "payment/unknown")
        self.require(sha(f[1]) == f[0], "payment/preimage")
        if not self.require(held, "payment/unknown"):
            return s, None
        if held[2] != "attempted":
            self.find("payment/twice" if held[2] == "paid" else "payment/unknown")
        self.require(f[2] == held[1], "payment/amount")
        held[2] = "paid"
        s.paid += held[1]
        self.require(s.paid <= s.open[5], "open/spend-cap")
        return s, ("exactly", {(ASSET, s.ident): held[1], (FEES,): f[3], (LIGHTNING,): -held[1] - f[3]})

    def received(self, f):
        s, held = self.slice(f[0], take=True)
        self.require(s.as_provider, "payment/unknown")
        if not self.require(held, "payment/unknown") or not self.require(held[2] != "paid", "payment/twice"):
            return s, None
        held[2] = "paid"
        s.paid += held[1]
        arrived = min(f[1], held[1])
        return s, ("exactly", {(LIGHTNING,): arrived, (FEES,): held[1] - arrived, (PREPAID, s.ident): -held[1]})

    def failed(self, f):
        what = self.payments.get(f[0])
        if what and what[1] == "refund":
            s = self.session(what[0])
            s.refund = None
            return s, ("nothing",)
        s, held = self.slice(f[0])
        if self.require(held, "payment/unknown") and self.require(held[2] != "paid", "payment/twice"):
            held[2] = "failed"
        return s, ("nothing",)

    def request(self, f):
        s = self.session(peek("request-open", f[0])[1])
        r = statement("request-open", f[0], s.open[2])
        self.version(r)
        fresh = r[2] not in s.requests and r[2] not in s.ended
        self.require(fresh and r[3] in s.quotes and not s.closed, "request/invalid")
        s.asked.add(r[2])
        if fresh:
            s.requests[r[2]] = [r, None, None, set(self.flows[1])]
            if s.as_provider:
                self.accounted.discard(r[2])
        return s, ("work",)

    def usage_fits(self, usage, request, before) -> bool:
        part, earlier = usage.get(4), before.get(4)
        grows = all(usage[n] >= before[n] for n in range(4)) and (not earlier or part and all(part[n] >= earlier[n] for n in range(6)))
        return grows and usage[1] <= usage[0] <= request[4] and usage[3] <= usage[2] <= request[5]

    def work_fits(self, usage, request) -> bool:
        """Part work is counted where it was ordered, and as it was ordered (3.9)."""
        order, part = request.get(8), usage.get(4)
        if part is None:
            return True
        if order is None:
            return False
        positions = sum(part[n] for n in range(4))
        if 0 not in order:
            return positions == part[4] == 0 and part[5] <= order[4]
        width = max(0, order[0][1] - order[0][0])
        return part[4] == positions * width and part[5] == 0 and positions <= order[4]

    def counts_fit(self, counts) -> bool:
        """Counters of expert rows: each (layer, expert) once, rising, none of no rows."""
        places = [(layer, expert) for layer, expert, _ in counts]
        return places == sorted(set(places)) and len(counts) <= 2048 and all(rows for *_, rows in counts)

    def expert_work(self, r):
        """A worker's counters are what it charges for (3.9)."""
        work, counts = r.get(35), r.get(37)
        if work is None or 0 in work[0]:
            return self.require(counts is None, "expert/work")
        charged = r[15].get(4, {5: 0})[5]
        self.require(self.counts_fit(counts or []) and sum(c[2] for c in counts or []) == charged, "expert/work")

    def experts(self, r):
        """Our receipt, to a customer or for a stage, against those of the workers that hold experts (3.9)."""
        legs, split = self.expert_legs.pop(r[4], []), r.get(38)
        ids = sorted(ident for ident, _ in legs if ident)
        if split is None:
            self.require(not ids, "expert/root")
            return
        self.accounted.add(r[4])
        self.require(r.get(33) == root_of([leaf_hash(ident) for ident in ids]), "expert/root")
        chosen, layers, own, again = split[0], split[1], split[2], split[3] or [0] * len(split[1])
        sound = chosen and len(layers) <= 512 and len(again) == len(layers) and self.counts_fit(own)
        counts = own + [count for _, given in legs for count in given or []]
        if not sound or any(layer >= len(layers) for layer, *_ in counts):
            return self.find("expert/conservation")
        sold = r[35][0].get(0) if r.get(35) else None
        if sold and any(rows and not sold[0] <= layer < sold[1] for layer, rows in enumerate(layers)):
            return self.find("expert/conservation")
        vanished = any(given is None for _, given in legs)
        for layer, rows in enumerate(layers):
            done, due = sum(c[2] for c in counts if c[0] == layer), rows * chosen + again[layer]
            if not (done <= due if vanished else done == due):
                return self.find("expert/conservation", layer)

    def leg(self, s, order, usage, ident, rows, counts=None):
        """One worker's part in a request of ours ended."""
        if not self.whole or s.as_provider:
            return
        self.require(self.ours(order[1]), "stage/work", named="exporter")
        if order[2] in self.accounted:
            return self.find("stage/orphan")
        if 0 not in order:
            return self.expert_legs.setdefault(order[2], []).append((ident, counts))
        self.legs.setdefault(order[2], []).append((order, usage.get(4, dict.fromkeys(range(6), 0)), ident, rows))

    def split(self, r):
        """Our receipt to a customer against those of the workers (3.9)."""
        self.experts(r)
        legs, split = self.legs.pop(r[4], []), r.get(36)
        if split is None:
            self.require(not any(ident for _, _, ident, _ in legs), "stage/root")
            return
        self.accounted.add(r[4])
        ids = sorted((order[0][0] if 0 in order else 0, ident) for order, _, ident, _ in legs if ident)
        self.require(r.get(32) == root_of([leaf_hash(ident) for _, ident in ids]), "stage/root")
        layers, own = split[0], [(a[0], a[1]) for a in split[1]]
        bought = [(leg[0][0][0], leg[0][0][1]) for leg in legs if 0 in leg[0]]
        ends = any(a == 0 for a, _ in own) and any(b == layers for _, b in own)
        if not (ends and layers and len(own) <= 8 and all(b <= layers for _, b in own + bought)):
            return self.find("stage/tiling")
        chain = sorted((leg for leg in legs if 0 in leg[0]), key=lambda leg: leg[0][0][0])
        twice = len(set(bought)) < len(bought)
        told = split.get(5, {0: 0, 1: 0, 2: 0})
        # What a layer evaluated no later one does more of, unless somebody took over and began anew.
        passed = None if twice or not all(leg[3] for leg in legs) else 2**64
        for layer in sorted({0, *(n for pair in own + bought for n in pair)}):
            if layer >= layers:
                continue
            mine = sum(a <= layer < b for a, b in own)
            theirs = [u for order, u, _, _ in legs if 0 in order and order[0][0] <= layer < order[0][1]]
            if (mine, bool(theirs)) not in ((1, False), (0, True)):
                return self.find("stage/tiling", layer)
            first, every = (sum(u[n] for u in theirs for n in range(k)) for k in (3, 4))
            lost = any(not leg[3] for leg in legs if 0 in leg[0] and leg[0][0][0] <= layer < leg[0][0][1])
            conserved = split[2] <= first <= split[2] + told[0] if all(leg[3] for leg in legs) else lost or every >= split[2]
            if theirs and not (conserved and (passed is None or first <= passed)):
                return self.find("stage/conservation", layer)
            passed = first if theirs and passed is not None else passed
        if all(leg[3] for leg in chain) and chain and not twice:
            hops = [(split[3], told[1]), *(end for leg in chain for end in ((leg[3][0], leg[3][2]), (leg[3][1], leg[3][3]))), (split[4], told[2])]
            for (sent, out), (came, into) in zip(hops[::2], hops[1::2]):
                # Where rows were lost, fewer bytes came than went; then the hashes say nothing.
                if sent != came and not (5 in split and into < out):
                    return self.find("stage/rows")
        sold = r[15][0] - r[15][1] + r[15][2]
        self.require(5 not in split or split[2] + 1 >= sold, "stage/conservation")

    def ack(self, f):
        s = self.session(peek("ack", f[0])[1])
        a = statement("ack", f[0], s.open[1], s.open[2])
        self.version(a)
        if not self.require(a[2] in s.requests, "request/unknown"):
            return s, None
        live = s.requests[a[2]]
        before = live[2] or {3: 0, 4: dict.fromkeys(range(4), 0)}
        self.require(a[3] > before[3], "ack/sequence")
        self.require(self.usage_fits(a[4], live[0], before[4]), "ack/usage")
        self.require(self.work_fits(a[4], live[0]), "stage/work")
        if quote := s.quotes.get(live[0][3]):
            self.require(numerators(a[4], quote[12]) == a[5] and a[6] == charge(a[5]), "ack/cost")
        live[1:3] = sha(message("ack", f[0][0])), a
        live[3] |= set(self.flows[1])
        return s, ("work",)

    def charge(self, s, added: int) -> int:
        cost = charge(s.numerators + added) - charge(s.numerators)
        s.numerators, s.charged = s.numerators + added, s.charged + cost
        return cost

    def charged(self, s, cost: int):
        ours = {(PREPAID, s.ident): cost, (INCOME,): -cost} if s.as_provider else {(EXPENSE,): cost, (ASSET, s.ident): -cost}
        return s, ("exactly", ours)

    def receipt(self, f, opening):
        s = self.session(peek("receipt", f[0])[1])
        r = statement("receipt", f[0], s.open[1], s.open[2])
        self.version(r)
        self.require(r[2] == len(s.receipts) and r.get(3) == s.last(), "receipt/chain")
        live = s.requests.pop(r[4], None)
        s.ended.add(r[4])
        if self.require(live, "request/unknown"):
            request, last_id, last = live[:3]
            self.require(r.get(28) == last_id, "receipt/last-ack")
            self.require(self.usage_fits(r[15], request, last[4] if last else dict.fromkeys(range(4), 0)), "receipt/usage")
            work = r.get(35)
            self.require(request.get(8) == (work[0] if work else None) and self.work_fits(r[15], request), "stage/work")
            self.require((32 in r) == (36 in r), "stage/root")
            self.require((33 in r) == (38 in r), "expert/root")
            self.expert_work(r)
            if work:
                self.leg(s, work[0], r[15], sha(message("receipt", f[0][0])), (work[1], work[2], work[3], work[4]), r.get(37, []))
            if opening and last and last[4][2] == r[15][2]:
                self.require(opening[1][1] == last[7], "receipt/usage")
        if opening:
            self.require(sha(opening[0], encoded(opening[1])) == r[27], "receipt/opening")
        if quote := s.quotes.get(r[5]):
            self.require(numerators(r[15], quote[12]) == r[17], "receipt/cost")
            said = [r[n] for n in (6, 8, 9, 10, 12, 13, 14, 16, 30, 31)]
            true = [quote[n] for n in (4, 5, 6, 7, 8, 9, 10, 12)] + [s.open[1], s.open[2]]
            self.require(said == true and (not live or live[0][3] == r[5]), "receipt/terms")
        else:
            self.find("receipt/terms")
        cost = self.charge(s, r[17])
        self.require(cost == r[18], "receipt/cost")
        self.require((r[19], r[20]) == (s.numerators, s.charged), "receipt/cumulative")
        ks = [paid[0] for paid in r[22]]
        self.require(ks == sorted(set(ks)) and len(ks) <= 64, "receipt/slices")
        for paid in r[22]:
            held = s.slices.get(paid[0])
            moved = held and held[2] in (("paid",) if s.as_provider else ("paid", "attempted"))
            self.require(moved and held[:2] == [paid[1], paid[2]] and not held[3], "receipt/slices")
            if held:
                held[3] = True
        s.receipted += sum(paid[2] for paid in r[22])
        self.require(r[21] == s.receipted, "receipt/cumulative")
        s.receipts.append((sha(message("receipt", f[0][0])), self.seq, self.leaf))
        s.tokens = [s.tokens[0] + r[15][0], s.tokens[1] + r[15][2]]
        if self.whole and s.as_provider:
            self.split(r)
        return self.charged(s, cost)

    def abandon(self, f):
        s = self.session(f[0])
        if not self.require(f[1] in s.requests, "request/unknown", named="exporter"):
            return s, None
        opened, last_id, last, _ = s.requests.pop(f[1])
        s.ended.add(f[1])
        if opened.get(8):
            self.leg(s, opened[8], last[4] if last else {}, last_id, None)
        if s.as_provider:
            self.legs.pop(f[1], None)
            self.expert_legs.pop(f[1], None)
        owed = last[5] if last else 0
        self.require((f.get(2), f[3]) == (last_id, owed), "abandoned/charge")
        s.abandoned[f[1]] = last_id, owed
        s.tokens = [s.tokens[0] + (last[4][0] if last else 0), s.tokens[1] + (last[4][2] if last else 0)]
        return self.charged(s, self.charge(s, owed))

    def close(self, f):
        s = self.session(peek("session-close", f[0])[1])
        c = statement("session-close", f[0], s.open[2])
        self.version(c)
        self.require(c[3] == s.remainder() and c.get(2) == s.last(), "close/remainder")
        self.require(c.get(4) not in s.close_invoices, "close/twice")
        s.close_invoices = s.close_invoices | {c.get(4)}
        s.closed = True
        return s, ("remainder",) if s.as_provider else ("nothing",)

    def credit_note(self, f):
        s = self.session(peek("credit-note", f[0])[1])
        c = statement("credit-note", f[0], s.open[1])
        self.version(c)
        s.note, s.note_until = sha(message("credit-note", f[0][0])), c[7]
        s.notes.add(s.note)
        self.require(c[4] == s.remainder() and (c[2], c[3]) == (s.open[1], s.open[2]), "credit-note/amount")
        return s, ("remainder",) if s.as_provider else ("nothing",)

    def credit_transfer(self, f):
        t = peek("credit-transfer", f[0])
        if t[2] in self.over:
            self.find("credit-note/spent", "what it was owed is paid, or spent before")
            return self.sessions.get(t[4]), None
        a, b = self.session(t[2]), self.session(t[4])
        t = statement("credit-transfer", f[0], a.open[1], t[3])
        self.version(t)
        owed = a.closed and not a.refund and a.note == t[5] and t[6] == a.remainder() > 0
        parties = t[1] == a.open[1] == b.open[1] and t[3] == a.open[2]
        if not self.require(owed and parties and a is not b and not b.closed, "credit-note/spent"):
            return b, None
        a.spent, b.credited, self.spent_from = a.spent + t[6], b.credited + t[6], a
        nets = {(DUE, a.ident): t[6], (PREPAID, b.ident): -t[6]} if b.as_provider else {(ASSET, b.ident): t[6], (ASSET, a.ident): -t[6]}
        return b, ("exactly", nets)

    def refund_attempted(self, f):
        s = self.session(f[0])
        if self.payments.get(f[1]) != (s.ident, "refund"):
            self.claim(f[1], (s.ident, "refund"))
        self.require(f[2] <= s.remainder() and s.as_provider, "refund/invalid")
        self.require(not s.refund, "payment/in-flight")
        s.refund = f[1], f[2]
        return s, ("pay", (DUE, s.ident), f[2], f[2] + f[3], f[3])

    def refund_settled(self, f):
        s = self.session(f[0])
        self.require(4 not in f or sha(f[4]) == f[1], "payment/preimage")
        self.require(s.refund == (f[1], f[2]), "refund/invalid")
        s.refund, taken = None, max(0, self.flows[0].get((DUE, s.ident), 0))
        self.require(taken <= s.remainder(), "refund/invalid")
        s.refunded, s.refunds = s.refunded + taken, s.refunds + f[2]
        return s, ("refund out", f[2], f[3])

    def refund_received(self, f):
        s = self.session(f[0])
        self.claim(f[1], (s.ident, "refund"))
        booked, left = max(0, -self.flows[0].get((ASSET, s.ident), 0)), s.remainder()
        self.require(not s.as_provider and booked <= left, "refund/invalid")
        s.refunded, s.refunds = s.refunded + booked, s.refunds + f[2]
        return s, ("refund in", min(f[2], left), max((q[13][9] for q in s.quotes.values()), default=0))

    def snapshot(self, f):
        self.require(not self.whole or f[0] + f[1] >= self.books.owed(), "wallet/insolvent")
        return None, ("nothing",)

    def own_note(self, f):
        node, size, root = checkpoint(f[0])
        other = self.whole and size == self.seq and root != root_of(self.leaves[:-1])
        self.require(self.ours(node) and size <= self.seq and not other, "log/checkpoint")
        return None, ("nothing",)

    def promise(self, f):
        ident = peek("inclusion-promise", f[0])[2]
        if ident in self.over:
            p = statement("inclusion-promise", f[0], peek("inclusion-promise", f[0])[1])
            self.version(p)
            if p[1] == self.over[ident].open[1]:
                self.over[ident].promised.append((p[3], p[5], p[4]))
            return None, ("nothing",)
        s = self.session(ident)
        p = statement("inclusion-promise", f[0], s.open[1])
        self.version(p)
        self.require(p[1] == s.open[1], "promise/broken")
        s.promised.append((p[3], p[5], p[4]))
        return s, ("nothing",)

    # 12.6

    def judge(self, kind, s, backing):
        net, opened, ended = self.flows
        by_wallet = kind in (6, 7, 8, 16)
        if backing is not None:
            self.require(self.justified(net, s, *backing), "transfer/unbacked", net)
            self.require(self.reserved(list(opened.values()), s, *backing), "transfer/unbacked", "a reservation")
        if not by_wallet and any(hold[1][0] == LIGHTNING and hold[0][0] != CLIENTS for _, hold, _ in ended):
            self.find("transfer/unbacked", "a payment's reservation ended without the wallet's word")
        live = {hold for session in self.sessions.values() for request in session.requests.values() for hold in request[3]}
        self.require(not any(how == 4 and ident in live for ident, _, how in ended), "transfer/two-phase", "expired under an open request")

    def justified(self, net, s, what, *args) -> bool:
        only = lambda *accounts: set(net) <= set(accounts)
        amount = lambda *account: net.get(account, 0)
        moved = lambda a, b: only(a, b) and net.get(a, 0) > 0
        if what == "exactly":
            return net == {account: n for account, n in args[0].items() if n}
        if what == "miners":  # older journals have it among the routing fees
            return any(net == ({(kept,): args[0], (EXTERNAL,): -args[0]} if args[0] else {}) for kept in (MINERS, FEES))
        if what == "refund out":
            taken, total = amount(DUE, s.ident), args[0] + args[1]
            return (only((LIGHTNING,), (DUE, s.ident), (FEES,)) and amount(LIGHTNING) == -total and taken >= args[0]
                    and amount(FEES) == total - taken >= 0)  # fmt: skip
        if what == "refund in":
            lost = amount(FEES) + amount(EXPENSE)
            return min(amount(FEES), amount(EXPENSE)) >= 0 and only((LIGHTNING,), (ASSET, s.ident), (FEES,), (EXPENSE,)) and amount(LIGHTNING) == args[0] and 0 <= lost <= args[1]
        if not net or what == "nothing" or what == "work":
            return not net
        idents = {ident for account in net for ident in account[1:]} if what == "alone" else {s.ident}
        remainder = any(moved((PREPAID, i), (DUE, i)) for i in idents)
        if what == "remainder" or what == "pay" and args[0][0] == DUE:
            return remainder
        charged = any(moved((CLIENTS,), to) for to in ((INCOME,), (EXTERNAL,)))
        clients = only((LIGHTNING,), (CLIENTS,)) or charged
        return what == "alone" and (remainder or clients or only((LIGHTNING,), (EXTERNAL,)) or any(moved((DUE, i), (DUST,)) and self.ran_out(i) for i in idents))

    def ran_out(self, ident: bytes) -> bool:
        s = self.sessions.get(ident)
        return s is not None and s.note_until is not None and s.note_until <= self.now

    def reserved(self, opened, s, what, *args) -> bool:
        if what in ("work", "alone"):
            if what == "alone":
                opened = [h for h in opened if h[:2] != ((CLIENTS,), (LIGHTNING,))]
            pair = lambda h: h[0][0] == PREPAID and h[1][0] == INCOME or h[0][0] == EXPENSE and h[1][0] == ASSET
            return all(pair(hold) and (what == "alone" or self.of(hold, s)) for hold in opened)
        if what != "pay":
            return not opened
        account, least, most, max_fee = args
        payments = [h for h in opened if h[:2] == (account, (LIGHTNING,)) and least <= h[2] <= most]
        fees = [h for h in opened if h[:2] == ((FEES,), (LIGHTNING,)) and h[2] <= max_fee]
        return len(payments) == 1 and len(fees) <= 1 and len(opened) == len(payments) + len(fees)

    def finish(self):
        self.require(not self.keys or self.keys[-1] == self.node, "bundle/node")
        self.require(self.leaves, "entry/genesis", "no entries")
        if self.whole and self.checkpoint:
            if self.require(self.checkpoint[1] == len(self.leaves), "log/size"):
                self.require(self.checkpoint[2] == root_of(self.leaves), "log/root")
        sums = self.books.sums.values()
        self.require(sum(s[0] for s in sums) == sum(s[1] for s in sums), "transfer/trial")
        for _, _, _, expires, _, since in self.books.holds.values():
            self.require(expires is None or max(expires, since) + HOUR >= self.last[2], "transfer/overdue")
        chosen = {1: lambda s: s.ident == self.filter[1][0], 2: lambda s: self.filter[1][0] in (s.open[1], s.open[2])}.get(self.filter[0])
        self.sessions |= self.over
        linked = lambda s: s.credited or s.spent  # it comes with the session that it shares credit with
        self.require(not chosen or all(chosen(s) or linked(s) for s in self.sessions.values()), "bundle/filter")


def encoded(value) -> bytes:
    return cbor2.dumps(value, canonical=True)


def read_items(data: bytes):
    """Items of a file (11)."""
    at = 0
    while at < len(data):
        first, width = data[at], {24: 1, 25: 2, 26: 4, 27: 8}.get(data[at] & 31, 0)
        length = int.from_bytes(data[at + 1 : at + 1 + width], "big") if width else first & 31
        shortest = {0: 0, 1: 24, 2: 2**8, 4: 2**16, 8: 2**32}[width]
        start = at + 1 + width
        if first >> 5 != 2 or first & 31 > 27 or length < shortest or length > MAX_ITEM or start + length > len(data):
            raise Unreadable("not a byte string of a permitted length")
        try:
            yield decode("item", data[start : start + length], MAX_ITEM)
        except Refused as error:
            raise Unreadable(str(error)) from None
        at = start + length


def cross(a: Audit, b: Audit) -> set:
    """12.7."""
    rules, both = set(), a.whole and b.whole
    for one, other in ((a, b), (b, a)):
        for ident, s in one.sessions.items():
            if ident not in other.sessions:
                if both and not s.as_provider and other.ours(s.open[1]) and (s.paid or s.charged):
                    rules.add("cross/missing")
            elif s.as_provider == other.sessions[ident].as_provider:
                rules.add("cross/mismatch")
            elif s.as_provider:
                theirs = other.sessions[ident]
                held = (theirs.notes <= s.notes, theirs.invoices <= s.invoices, s.asked <= theirs.asked, set(theirs.quotes) <= set(s.quotes))
                if s.summary() != theirs.summary() or not all(held):
                    rules.add("cross/mismatch")
                if not set(theirs.promised) <= set(s.receipts):
                    rules.add("promise/broken")
    return rules


def judge(data: bytes):
    """A journal's audit, or a claim's."""
    items = read_items(data)
    try:
        number, fields = next(items, (None, None))
    except Unreadable:
        number = None
    if number != 5:
        return Audit(data)
    if fields[0][0] != "satgrid-claim" or fields[0][1] != 1:
        raise Unreadable("not a claim of version 1")
    pieces, ended = [], None
    for number, item in items:
        if ended is not None or number not in (3, 6):
            raise Unreadable("an item out of its place")
        if number == 3:
            ended = item[0]
        else:
            pieces.append(item[0])
    if ended != len(pieces):
        raise Unreadable("the end mark is missing or does not count right")
    return claims.Claim(fields[0], pieces, sys.modules[__name__])


def verify(paths: list) -> tuple:
    """Exit status, the rules that are broken, and by each file whom each names."""
    try:
        audits = []
        for path in paths:
            with open(path, "rb") as file:
                audits.append(judge(file.read()))
        judged = {isinstance(audit, claims.Claim) for audit in audits}
        if len(judged) > 1 or len(audits) > 1 and True in judged and audits[0].session != audits[1].session:
            raise Unreadable("these two say nothing about each other")
    except (Unreadable, OSError) as error:
        print(f"unreadable: {error}", file=sys.stderr)
        return 2, set(), set()
    parties = {(finding[0], finding[3]) for audit in audits for finding in audit.findings}
    rules = {finding[0] for audit in audits for finding in audit.findings}
    for audit in audits:
        for rule, entry, detail, named in audit.findings:
            print(f"{rule} at item {entry} ({named}): {detail}", file=sys.stderr)
    if len(audits) == 2:
        rules |= claims.cross(*audits)[1] if True in judged else cross(*audits)
    return int(bool(rules)), rules, parties


if __name__ == "__main__":
    if sys.argv[1:2] == ["--vectors"]:
        import vectors

        sys.exit(vectors.run(sys.argv[2]))
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    status, broken, _ = verify(sys.argv[1:])
    print("clean" if status == 0 else "findings: " + ", ".join(sorted(broken)) if status == 1 else "unreadable")
    sys.exit(status)
