"""Runs every golden vector against this implementation and counts."""

import contextlib
import io
import json
import pathlib

import verify
from primitives import GRAMMAR, Refused, charge, decode, ed25519, extends, included, invoice, leaf_hash, message, numerators, root_of, sha


class Count:
    passed = failed = 0

    def check(self, name: str, holds: bool):
        if holds:
            self.passed += 1
        else:
            self.failed += 1
            print(f"FAILED {name}")


def shown(value):
    """A decoded value as the vectors show it."""
    if isinstance(value, dict):
        return {str(key): shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    if isinstance(value, bytes):
        return f"h'{value.hex()}'"
    if type(value) is int and abs(value) > 2**53 - 1:
        return str(value)
    return value


def refused(call, *args):
    try:
        return call(*args), None
    except Refused as error:
        return None, str(error.args[0])


def statement(v) -> bool:
    """The body, keys and signatures give the verdict; a good one also its id and fields."""
    body, keys, signatures = bytes.fromhex(v["body"]), v["keys"], v["signatures"]
    order = [name for name in ("provider", "consumer") if name in keys]
    signed = dict(enumerate([body, *(bytes.fromhex(signatures[name]) for name in order)]))
    got, rule = refused(verify.statement, v["kind"], signed, *(bytes.fromhex(keys[name]) for name in order))
    if v["verdict"] != "valid":
        return rule == v["verdict"]
    return rule is None and shown(got) == v["fields"] and sha(message(v["kind"], body)).hex() == v["id"]


def signature(v) -> bool:
    return ed25519(*(bytes.fromhex(v[part]) for part in ("key", "message", "signature"))) == v["valid"]


def hashes(v) -> bool:
    salt, request = bytes.fromhex(v["salt"]), bytes.fromhex(v["request"])
    tokens = [token.to_bytes(4, "little") for token in v["tokens"]]
    running = [sha(salt, request)]
    for token in tokens:
        running.append(sha(running[-1], token))
    private, asked = bytes.fromhex(v["receipt_private"]), bytes.fromhex(v["request_private"])
    opening = decode("receipt-opening", bytes.fromhex(v["receipt_opening"]))
    return (
        sha(salt, *tokens).hex() == v["prompt_hash"]
        and [running[0].hex(), running[-1].hex()] == [v["running_hash_0"], v["running_hash"]]
        and sha(salt, private).hex() == v["receipt_private_hash"]
        and opening == {0: salt, 1: decode("receipt-private", private)}
        and opening[1][1] == running[-1]
        and sha(salt, asked).hex() == v["request_private_hash"]
        and shown(decode("request-private", asked)) == v["request_private_fields"]
    )


def descriptor(v) -> bool:
    data = bytes.fromhex(v["bytes"])
    return shown(decode("slice-descriptor", data)) == v["fields"] and sha(data).hex() == v["description_hash"]


def pricing(v) -> bool:
    rates = dict(enumerate(v["rates"][name] for name in ("input", "cached_input", "output", "per_request")))
    usage = lambda u: dict(enumerate(u[name] for name in ("prompt", "cached_prompt", "completion", "reasoning")))
    if "bad" in v:
        return numerators(usage(v["bad"]), rates) is None
    before, right = 0, True
    for step in v["requests"]:
        added = numerators(usage(step["usage"]), rates)
        cost, before = charge(before + added) - charge(before), before + added
        said = [step["numerators"], step["alone_msat"], step["cost_msat"], step["cumulative_numerators"], step["cumulative_cost_msat"]]
        right &= said == [str(added), charge(added), cost, str(before), charge(before)]
    return right


def transfer_id(v) -> bool:
    request = bytes.fromhex(v["request"]) if v["request"] else None
    hashed = verify.encoded([bytes.fromhex(v["session"]), request, v["number"], v["k"]])
    ident = sha(b"satgrid-transfer-v1\0", hashed)[:16]
    fits = GRAMMAR.rules["transfer-id-input"](verify.cbor2.loads(hashed))
    return fits and [hashed.hex(), ident.hex(), sha(b"satgrid-end-v1\0", ident)[:16].hex()] == [v["hashed"], v["id"], v["end_id"]]


def merkle(v) -> bool:
    raw = lambda names: [bytes.fromhex(h) for h in names]
    root = bytes.fromhex(v["root"])
    if "inclusion" in v:
        return included(bytes.fromhex(v["leaf"]), v["index"], v["size"], raw(v["inclusion"]), root) == v["valid"]
    if "consistency" in v:
        return extends(v["old"], v["size"], bytes.fromhex(v["old_root"]), root, raw(v["consistency"])) == v["valid"]
    return root_of([leaf_hash(n.to_bytes(8, "big")) for n in range(v["size"])]) == root


def checkpoint(v) -> bool:
    got, rule = refused(verify.checkpoint, v["note"])
    return (got[0].hex(), got[1], got[2].hex()) == (v["node"], v["size"], v["root"]) if v["valid"] and got else not v["valid"] and rule is not None


def fraud(v) -> bool:
    item = verify.encoded([4, [{0: v["one"], 1: v["other"]}]])
    try:
        return verify.Audit(verify.encoded(item)).node.hex() == v["guilty"]
    except verify.Unreadable:
        return v["guilty"] is None


def bolt11(v) -> bool:
    got, rule = refused(invoice, v["bolt11"])
    if not v["valid"]:
        return rule is not None
    said = [v["payee"], v["payment_hash"], v["amount_msat"], v["description_hash"], v["network"]]
    return rule is None and said == [got["payee"].hex(), got["payment_hash"].hex(), got["amount"], got["terms"].hex(), got["network"]]


def listing(v) -> bool:
    got, rule = refused(verify.listing, v["event"])
    if not v["valid"]:
        return rule is not None
    return rule is None and [got[0].hex(), got[1]["node_key"], got[1].get("embeds")] == [v["id"], v["node_key"], v.get("embeds")]


def entry(v) -> bool:
    data = bytes.fromhex(v["bytes"])
    got, rule = refused(decode, "entry", data)
    return shown(got) == v["fields"] and leaf_hash(data).hex() == v["leaf"] if v["verdict"] == "valid" else rule is not None


def run(folder: str) -> int:
    count, folder = Count(), pathlib.Path(folder)
    kinds = {"ed25519": signature, "hashes": hashes, "slice-descriptor": descriptor, "pricing": pricing, "transfer-id": transfer_id, "merkle": merkle,
             "checkpoint": checkpoint, "fraud": fraud, "bolt11": bolt11, "listing": listing, "entry": entry}  # fmt: skip
    differ = 0
    for path in sorted(folder.glob("*.json")):
        for vector in json.loads(path.read_text())["vectors"]:
            if path.stem != "bundles":
                count.check(f"{path.stem}: {vector.get('name', vector)}", bool(kinds.get(path.stem, statement)(vector)))
                continue
            with contextlib.redirect_stderr(io.StringIO()):
                status, rules, parties = verify.verify([folder / name for name in vector["files"]])
            named = {party for rule, party in parties if rule in vector["must"]}
            agrees = status == vector["exit"] and set(vector["must"]) <= rules and named == set(vector.get("parties", named))
            count.check(f"{vector['files']}: {status} {sorted(rules)}, expected {vector['exit']} {vector['rules']}", agrees)
            if agrees and rules != set(vector["rules"]):
                differ += 1
                print(f"note: {vector['files'][0]}: we name {sorted(rules)}, the other {vector['rules']}")
    print(f"{count.passed} passed, {count.failed} failed" + (f" ({differ} name further rules otherwise, which is permitted)" if differ else ""))
    return 1 if count.failed else 0
