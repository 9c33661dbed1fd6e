"""Judges claims (section 12.8 of docs/ledger-format.md): what is owed on one session, from the evidence in one file."""

from primitives import Refused, charge, invoice, message, numerators, sha

MAX_PIECES = 65_536


class Claim:
    """The fold over a claim's pieces."""

    def __init__(self, header: dict, pieces, verify):
        self.verify, self.provider_made, self.network = verify, header[2] == 1, header[3]
        self.findings, self.count = [], 0
        self.session = self.provider = self.consumer = self.receipt = self.note = None
        self.quotes, self.invoices, self.requests, self.asked = {}, {}, {}, {}
        self.paid, self.acked, self.refunded = {}, {}, {}
        self.receipts = {}  # by number: whose request, and its numerators
        self.credited, self.spent = {}, {}  # by note: of other sessions here, of this one elsewhere
        for number, fields in pieces:
            self.count += 1
            if self.count > MAX_PIECES:
                self.require(self.count != MAX_PIECES + 1, "claim/piece")
                continue
            try:
                self.piece(number, fields)
            except Refused as error:
                self.find(error.args[0])
        self.finish()

    def find(self, rule: str, detail="", named=None):
        self.findings.append((rule, self.count - 1, detail, named or self.verify.party(rule)))

    def require(self, holds, rule: str, named=None) -> bool:
        if not holds:
            self.find(rule, named=named)
        return bool(holds)

    def statement(self, kind: str, signed: dict, *keys: bytes) -> dict:
        body = self.verify.statement(kind, signed, *keys)
        self.require(body[0] == 1, "statement/version")
        return body

    def piece(self, number: int, f: dict):
        handlers = {4: self.invoice, 6: self.settled, 8: self.received, 9: self.request, 10: self.ack, 11: self.last_receipt,
                    13: self.close, 14: self.credit_note, 16: self.refund_settled, 17: self.refund_received,
                    23: self.credit_transfer}  # fmt: skip
        if number == 2:
            q = self.statement("quote", f[0], self.verify.peek("quote", f[0])[1])
            if self.require(self.provider in (None, q[1]) and self.consumer in (None, q[3]), "open/quote", "exporter"):
                self.quotes[sha(message("quote", f[0][0]))] = q
        elif number == 3:
            o = self.statement("session-open", f[0], self.verify.peek("session-open", f[0])[2])
            if self.require(self.session is None, "open/twice", "exporter"):
                self.session, self.provider, self.consumer = sha(message("session-open", f[0][0])), o[1], o[2]
                self.quotes = {ident: q for ident, q in self.quotes.items() if (q[1], q[3]) == (o[1], o[2])}
                self.require(o[3] in self.quotes, "open/quote")
        elif self.session is None:
            self.find("statement/session")
        elif number in handlers:
            handlers[number](f)
        else:
            self.find("claim/piece")

    def invoice(self, f):
        d = f[3]
        self.require(d[0] == 1, "statement/version")
        try:
            facts = invoice(f[2])
        except Refused:
            return self.find("invoice/signature")
        quote = self.quotes.get(d[4])
        holds = [
            self.require(facts["network"] == self.network, "invoice/signature"),
            self.require((f[0], d[1], d[2], d[5], d[6]) == (self.session, self.session, f[1], self.provider, self.consumer), "invoice/descriptor"),
            self.require(quote and quote[2] == facts["payee"], "invoice/payee"),
            self.require(facts["terms"] == sha(self.verify.encoded(d)), "invoice/terms"),
            self.require(facts["amount"] == d[3], "invoice/amount"),
        ]  # fmt: skip
        if all(holds):
            self.require(facts["payment_hash"] not in self.invoices, "invoice/reuse")
            self.invoices[facts["payment_hash"]] = f[1], d[3]

    def settled(self, f):
        if self.require(sha(f[1]) == f[0], "payment/preimage"):
            self.pay(f[0])

    def received(self, f):
        if self.require(self.provider_made, "payment/preimage"):
            self.pay(f[0])

    def pay(self, payment_hash: bytes):
        if self.require(payment_hash in self.invoices, "payment/unknown"):
            k, amount = self.invoices[payment_hash]
            self.require(k not in self.paid, "payment/twice")
            self.paid[k] = amount

    def request(self, f):
        r = self.statement("request-open", f[0], self.consumer)
        if self.require(r[1] == self.session and r[3] in self.quotes, "request/invalid"):
            self.requests[r[2]] = r

    def ack(self, f):
        a = self.statement("ack", f[0], self.provider, self.consumer)
        if not self.require(a[1] == self.session and a[2] in self.requests, "request/unknown"):
            return
        request, usage = self.requests[a[2]], a[4]
        fits = usage[1] <= usage[0] <= request[4] and usage[3] <= usage[2] <= request[5]
        self.require(fits, "ack/usage")
        self.require(numerators(usage, self.quotes[request[3]][12]) == a[5] and a[6] == charge(a[5]), "ack/cost")
        self.acked[a[2]] = max(self.acked.get(a[2], (0, 0)), (a[3], a[5]))

    def last_receipt(self, f):
        r = self.statement("receipt", f[0], self.provider, self.consumer)
        if not self.require(r[1] == self.session, "statement/session"):
            return
        quote = self.quotes.get(r[5])
        self.require(quote and (quote[12], quote[5]) == (r[16], r[8]), "receipt/terms")
        self.require(numerators(r[15], r[16]) == r[17], "receipt/cost")
        self.require(r[20] == charge(r[19]) and r[19] >= r[17], "receipt/cumulative")
        self.receipts[r[2]] = r[4], r[17]
        if self.receipt is None or self.receipt[1][2] < r[2]:
            self.receipt = sha(message("receipt", f[0][0])), r

    def close(self, f):
        c = self.statement("session-close", f[0], self.consumer)
        self.require(c[1] == self.session, "statement/session")
        try:
            facts = invoice(c[4]) if 4 in c else {"amount": None}
            if facts["amount"] is not None:
                self.asked[facts["payment_hash"]] = facts["amount"]
        except Refused:
            pass

    def credit_note(self, f):
        n = self.statement("credit-note", f[0], self.provider)
        if self.require((n[1], n[2], n[3]) == (self.session, self.provider, self.consumer), "statement/session"):
            self.note = n[4]

    def refund_received(self, f):
        if self.require(not self.provider_made and f[0] == self.session, "claim/refund"):
            self.refunded[f[1]] = f[2]

    def refund_settled(self, f):
        if self.require(f[0] == self.session and f[1] in self.asked and 4 in f and sha(f[4]) == f[1], "claim/refund"):
            self.refunded[f[1]] = self.asked[f[1]]

    def credit_transfer(self, f):
        t = self.statement("credit-transfer", f[0], self.provider, self.verify.peek("credit-transfer", f[0])[3])
        own = t[2] == self.session and t[3] == self.consumer
        if self.require(t[1] == self.provider and t[2] != t[4] and (own or t[4] == self.session), "statement/session"):
            (self.spent if own else self.credited)[t[5]] = t[6]

    def numerators(self, by_provider: bool, receipts: dict, acked: dict) -> int:
        """Each request once: not at its acknowledgement where the last receipt's running total has it."""
        receipted = {request for request, _ in receipts.values()}
        added = sum(n for request, (_, n) in acked.items() if request not in receipted)
        if self.receipt is None:
            return added
        seq, total = self.receipt[1][2], self.receipt[1][19]
        chain = [n for number, (_, n) in receipts.items() if number <= seq]
        before = max(0, total - sum(chain)) if by_provider and len(chain) == seq + 1 else 0
        return total + max(0, added - before)

    def own(self, receipts: dict) -> int:
        return self.numerators(self.provider_made, receipts, self.acked)

    def fee_cap(self) -> int:
        return max((q[13][9] for q in self.quotes.values()), default=0)

    def finish(self):
        self.require(self.session is not None, "statement/session")
        self.owed = owed(self.paid, self.receipt, self.own(self.receipts), self.refunded, self.fee_cap(), self.credited, self.spent)
        if self.note is not None:
            back = sum(self.refunded.values()) + sum(self.spent.values())
            self.require(self.note <= self.owed + back, "credit-note/amount")
        self.require(self.provider_made or self.owed > 0, "claim/nothing-owed")


def owed(paid: dict, receipt, added: int, refunded: dict, fee_cap: int, credited: dict, spent: dict) -> int:
    total = max(sum(paid.values()), receipt[1][21] if receipt else 0) + sum(credited.values())
    left = max(0, max(0, total - charge(added)) - sum(refunded.values()) - sum(spent.values()))
    return max(0, left - fee_cap) if sum(refunded.values()) else left


def cross(one: Claim, other: Claim) -> tuple:
    """What both together say is owed, and the rules that are broken."""
    ids = [claim.receipt[0] if claim.receipt else None for claim in (one, other)]
    known = one.receipts | other.receipts
    added = max(one.own(known), other.own(known))
    if ids[0] == ids[1]:
        joined = dict(one.acked)
        for request, later in other.acked.items():
            joined[request] = max(joined.get(request, (0, 0)), later)
        added = max(added, one.numerators(True, known, joined))
    receipts = [claim.receipt for claim in (one, other) if claim.receipt]
    receipt = max(receipts, key=lambda r: r[1][2]) if receipts else None
    together = owed(other.paid | one.paid, receipt, added, other.refunded | one.refunded, max(one.fee_cap(), other.fee_cap()),
                    other.credited | one.credited, other.spent | one.spent)  # fmt: skip
    rules = {"claim/contradicted" for claim in (one, other) if not claim.provider_made and together < claim.owed}
    return together, rules
