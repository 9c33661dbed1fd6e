"""What docs/ledger-format.md builds on: encoding, signatures, invoices, the log. Written from that page alone.

The grammar is not translated: the CDDL file itself is read and used to check shapes.
"""

import functools
import hashlib
import pathlib
import re

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

CDDL = pathlib.Path(__file__).resolve().parents[2] / "docs/ledger-format.cddl"


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


class Refused(Exception):
    """These bytes are not what they should be."""


# ---- 1: encoding


class Grammar:
    """The part of CDDL that our grammar uses: closed maps, arrays, choices, numbers, ranges, `.size`."""

    def __init__(self, text: str):
        text = re.sub(r";[^\n]*", "", text)
        self.tokens = re.findall(r"=>|\.\.|-?\d+|\.size|[a-z][a-z0-9-]*|[][{}=/?*+,]", text)
        self.at, self.rules = 0, {}
        while self.at < len(self.tokens):
            name = self.take()
            self.take("=")
            self.rules[name] = self.choice()

    def peek(self, ahead: int = 0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else None

    def take(self, want=None):
        token = self.peek()
        assert want in (None, token), (want, token)
        self.at += 1
        return token

    def skip(self, token) -> bool:
        hit = self.peek() == token
        self.at += hit
        return hit

    def choice(self):
        options = [self.one()]
        while self.skip("/"):
            options.append(self.one())
        return lambda v: any(option(v) for option in options)

    def one(self):
        token = self.take()
        if token == "{":
            fields, optional = {}, set()
            while not self.skip("}"):
                maybe = self.skip("?")
                key = int(self.take())
                self.take("=>")
                fields[key] = self.choice()
                optional |= {key} if maybe else set()
                self.skip(",")
            return lambda v: type(v) is dict and fields.keys() >= v.keys() >= fields.keys() - optional and all(fields[k](v[k]) for k in v)
        if token == "[":
            if self.peek() in ("*", "+"):
                least = 1 if self.take() == "+" else 0
                each = self.choice()
                self.take("]")
                return lambda v: type(v) is list and len(v) >= least and all(map(each, v))
            items = []
            while not self.skip("]"):
                items.append(self.choice())
                self.skip(",")
            return lambda v: type(v) is list and len(v) == len(items) and all(item(x) for item, x in zip(items, v))
        if re.fullmatch(r"-?\d+", token):
            low, high = int(token), int(self.take() if self.skip("..") else token)
            return lambda v: type(v) is int and low <= v <= high
        size = int(self.take()) if self.skip(".size") else None
        if token == "uint":
            return lambda v: type(v) is int and 0 <= v < 256 ** (size or 8)
        kind = {"bstr": bytes, "tstr": str, "bool": bool, "nil": type(None), "bytes": bytes}.get(token)
        if kind:
            return lambda v: type(v) is kind and (size is None or size == len(v))
        return lambda v: self.rules[token](v)


GRAMMAR = Grammar(CDDL.read_text())


def decode(rule: str, data: bytes, limit: int = 1 << 20):
    """The value, if these are the canonical bytes of one that fits the grammar's rule."""
    if len(data) > limit:
        raise Refused(f"{rule}: {len(data)} bytes")
    try:
        value = cbor2.loads(data)
        canonical = GRAMMAR.rules[rule](value) and cbor2.dumps(value, canonical=True) == data
    except Exception as error:  # cbor2 raises many kinds on hostile input: all of them mean the same here
        raise Refused(f"{rule}: {error!r}") from None
    if not canonical:
        raise Refused(f"{rule}: not canonical, or not of this shape")
    return value


# ---- 2: signing

P25519 = 2**255 - 19
SMALL = {
    bytes.fromhex(h)
    for y, signs in {
        "00" * 31: ("00", "80"),
        "01" + "00" * 30: ("00", "80"),
        "ec" + "ff" * 30: ("7f", "ff"),
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc": ("05", "85"),
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03": ("7a", "fa"),
    }.items()
    for h in (y + sign for sign in signs)
}


def ed25519(key: bytes, message: bytes, signature: bytes) -> bool:
    """The library checks S and the cofactorless equation; canonical and large-order points are ours to check."""
    for point in (key, signature[:32]):
        if point in SMALL or int.from_bytes(point, "little") % 2**255 >= P25519:
            return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
        return True
    except (InvalidSignature, ValueError):
        return False


def message(kind: str, body: bytes) -> bytes:
    return b"satgrid-" + kind.encode() + b"-v1\0" + body


# ---- secp256k1

P, N = 2**256 - 2**32 - 977, 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
G = (0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798, 0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8)


def lift(x: int, odd: int):
    y = pow(x**3 + 7, (P + 1) // 4, P)
    if x >= P or (y * y - x**3 - 7) % P:
        raise Refused("not on the curve")
    return x, y if y % 2 == odd else P - y


def add(a, b):
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    slope = (3 * a[0] * a[0] * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def mul(k: int, point):
    out = None
    for bit in bin(k)[2:]:
        out = add(add(out, out), point if bit == "1" else None)
    return out


@functools.lru_cache(4096)
def recover(digest: bytes, recovery: int, rs: bytes) -> bytes:
    """The compressed key that made an ECDSA signature."""
    r, s = int.from_bytes(rs[:32], "big"), int.from_bytes(rs[32:], "big")
    if not (0 < r < N and 0 < s < N and recovery < 4):
        raise Refused("not a signature")
    point = lift(r + N * (recovery >> 1), recovery & 1)
    inverse = pow(r, -1, N)
    key = add(mul(s * inverse % N, point), mul(-int.from_bytes(digest, "big") * inverse % N, G))
    if key is None:
        raise Refused("not a signature")
    return bytes([2 + key[1] % 2]) + key[0].to_bytes(32, "big")


def schnorr(key: bytes, digest: bytes, signature: bytes) -> bool:
    """BIP-340."""
    def tag(name, *parts):
        return int.from_bytes(sha(sha(name) * 2, *parts), "big") % N

    try:
        point = lift(int.from_bytes(key, "big"), 0)
    except Refused:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    challenge = tag(b"BIP0340/challenge", signature[:32], key, digest)
    out = add(mul(s, G), mul((N - challenge) % N, point)) if s < N and r < P else None
    return out is not None and out[1] % 2 == 0 and out[0] == r


# ---- 5: invoices

BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def to_bytes(groups, pad: bool) -> bytes:
    bits = "".join(f"{g:05b}" for g in groups)
    bits = bits + "0" * (-len(bits) % 8) if pad else bits[: len(bits) // 8 * 8]
    return int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:]


@functools.lru_cache(4096)
def invoice(text: str) -> dict:
    if len(text) > 2048 or not text.isascii() or text not in (text.lower(), text.upper()):
        raise Refused("too long, or of mixed case")
    prefix, one, tail = text.lower().rpartition("1")
    found = re.fullmatch(r"ln(bcrt|tbs|bc|tb|sb)(?:([0-9]+)([munp]?))?", prefix)
    if not one or not found or any(c not in BECH32 for c in tail):
        raise Refused("not an invoice")
    groups = [BECH32.index(c) for c in tail]
    check = 1
    for value in [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix] + groups:
        top, check = check >> 25, (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    if check != 1 or len(groups) < 7 + 104 + 6:
        raise Refused("the checksum does not hold")
    data, signature = groups[:-110], to_bytes(groups[-110:-6], False)
    fields, rest = [], data[7:]
    while rest:
        if len(rest) < 3 or len(rest) < 3 + (size := rest[1] * 32 + rest[2]):
            raise Refused("a field is cut short")
        fields.append((BECH32[rest[0]], rest[3 : 3 + size]))
        rest = rest[3 + size :]
    named = lambda letter, length: [to_bytes(g, False) for name, g in fields if name == letter and len(g) == length]
    hashes, terms, payees = named("p", 52), named("h", 52), named("n", 53)
    pico = None
    if found[2]:
        pico = int(found[2]) * {"": 10**12, "m": 10**9, "u": 10**6, "n": 10**3, "p": 1}[found[3]]
        if pico % 10:
            raise Refused("not whole msat")
    if len(hashes) != 1 or len(terms) > 1:
        raise Refused("not exactly one payment hash, or several description hashes")
    digest = sha(prefix.encode(), to_bytes(data, True))
    key = recover(digest, signature[64], signature[:64])
    if payees and (int.from_bytes(signature[32:64], "big") > N // 2 or payees[0] not in (key, recover(digest, signature[64] ^ 1, signature[:64]))):
        raise Refused("not signed by the payee that it names")
    return {
        "payee": payees[0] if payees else key,
        "payment_hash": hashes[0],
        "amount": None if pico is None else pico // 10,
        "terms": terms[0] if terms else None,
        "network": {"bc": "mainnet", "tb": "testnet", "tbs": "signet", "bcrt": "regtest", "sb": "simnet"}[found[1]],
    }


# ---- 7: pricing

U64 = 2**64


def numerators(usage: dict, rates: dict):
    """None where the usage has no price."""
    if usage[1] > usage[0] or usage[3] > usage[2]:
        return None
    part = usage.get(4, {})
    layers, experts = part.get(4, 0), part.get(5, 0)
    if (layers and 4 not in rates) or (experts and 5 not in rates):
        return None
    started = usage[0] > 0 or usage[2] > 0 or layers > 0 or experts > 0
    parts = [layers * rates.get(4, 0), experts * rates.get(5, 0)]
    parts += [(usage[0] - usage[1]) * rates[0], usage[1] * rates[1], usage[2] * rates[2], started * rates[3] * 1_000_000]
    return sum(parts) if sum(parts) < U64 else None


def charge(total: int) -> int:
    return -(-total // 1_000_000)


# ---- 10: the log


def leaf_hash(data: bytes) -> bytes:
    return sha(b"\0", data)


def root_of(leaves: list) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else sha()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return sha(b"\1", root_of(leaves[:half]), root_of(leaves[half:]))


def included(leaf: bytes, index: int, size: int, proof: list, root: bytes) -> bool:
    if index >= size or len(proof) > 64:
        return False
    node, last, value = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            value = sha(b"\1", sibling, value)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            value = sha(b"\1", value, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and value == root


def extends(old: int, size: int, old_root: bytes, root: bytes, proof: list) -> bool:
    if old == size or old == 0:
        return not proof and old_root == (root if old == size else sha())
    path = proof if old & (old - 1) else [old_root, *proof]
    if not path or len(path) > 65 or old > size:
        return False
    node, last = old - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    one = two = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            one, two = sha(b"\1", sibling, one), sha(b"\1", sibling, two)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            two = sha(b"\1", two, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and (one, two) == (old_root, root)
