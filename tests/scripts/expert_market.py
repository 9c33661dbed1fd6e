"""A market whose mixture of experts runs over several machines: workers that sell packs, a lead that has the trunk, buys the
experts and sells answers, a node that sells the whole model, a consumer. Each is a process of its own.
"""

import json
import os
import re
import sys

from ring_market import NOBODY, Market, Node, engines, run, say, serve

# What a stage that buys experts asks for its layers, in msat per million position-layers.
STAGE_PRICE = 2_000_000

SHAPE = "slots = {slots}\ncontext = {context}\nthreads = {threads}\n"
ASKS = "price_in_msat_per_mtok = 100000000\nprice_out_msat_per_mtok = 400000000\n"


class Packs:
    """A model cut into a trunk and so many packs. With a stage the lead has the first layer and the last as they are, the trunk is
    that of the layers between, and so are the packs."""

    def __init__(self, model, dir, workers, stage=False):
        self.model = os.path.abspath(model)
        self.shown = json.loads(run("--format", "json", "models", "show", model))
        self.dir, self.everything, self.ends = dir, None, None
        last = self.shown["layers"] - 1
        packs = ["--packs", workers]
        if stage:
            of = lambda n: ",".join(map(str, range(n, self.shown["experts"], workers)))
            packs = [arg for n in range(workers) for arg in ("--pack", f"1-{last - 1}:{of(n)}")]
        split = json.loads(run("--format", "json", "models", "split", model, "--experts", *packs, "--out", os.path.join(dir, "parts")))
        self.root, (self.trunk, *self.files) = split["root"], split["files"]
        if stage:
            cuts = [("0..1", "head.gguf"), (f"{last}..{last + 1}", "tail.gguf"), (f"1..{last}", "stage.gguf", "--trunk")]
            head, tail, trunk = (self.cut(*cut) for cut in cuts)
            self.ends = head["path"], tail["path"]
            self.trunk = trunk | {"holds": f"layers {trunk['start']} to {trunk['end'] - 1} without their experts, for a stage"}
        say(f"model {self.root[:16]} is cut: a trunk for {'a stage' if stage else 'the lead'}, {len(self.files)} packs for workers")

    def cut(self, layers, out, *more):
        out = os.path.join(self.dir, out)
        return json.loads(run("--format", "json", "models", "split", self.model, "--layers", layers, *more, "--out", out))

    def all(self):
        """A pack with every expert: what a lead may keep for itself."""
        if not self.everything:
            out = os.path.join(self.dir, "everything")
            self.everything = json.loads(run("--format", "json", "models", "split", self.model, "--experts", "--pack", "*:*", "--out", out))["files"][1]["path"]
        return self.everything


def memory(pid):
    """Bytes of a process's own memory: without the pages of files, the program's among them."""
    with open(f"/proc/{pid}/status") as status:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read())[1])


def weights(pid, pack):
    """Where weights of a pack are in the memory of the process that serves it, and what they are."""
    with open(pack, "rb") as file:
        data = file.read()
    # Pieces all over the file; such a piece is nowhere else in the process.
    step = max(64, len(data) // 512 // 64 * 64)
    pieces = [data[at:at + 32] for at in range(len(data) // 4, len(data) - 64, step)]
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in maps:
            span, rights, *_ = line.split()
            first, last = (int(part, 16) for part in span.split("-"))
            # All of them are in one piece of memory.
            if not rights.startswith("rw") or not len(data) // 2 < last - first < 4 << 30:
                continue
            try:
                mem.seek(first)
                held = mem.read(last - first)
            except OSError:
                continue
            found += [(first + at, piece) for piece in pieces if (at := held.find(piece)) >= 0]
    return found


def spoil(pid, found):
    """Changes these weights, as a cheat or a broken machine would: the shipped program proves every expert when it loads it, and has
    no way to be told to lie. The highest bits of the mantissa: other numbers, none of them infinite."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:
        for at, piece in found:
            mem.seek(at)
            mem.write(bytes(byte ^ 0x40 if n % 4 == 2 else byte for n, byte in enumerate(piece)))


class ExpertMarket(Market):
    def __init__(self, dir, parts, prices, spare=None, wire="f32", slots=4, context=1024, threads=1, door=None, asks=ASKS, place=lambda worker: "", witness=0, judge=None):
        """`place` as of a `Market`."""
        self.dir, self.parts, self.prices = dir, parts, list(prices)
        self.name = os.path.splitext(os.path.basename(parts.model))[0].lower()
        world = {"models": os.path.join(dir, "models")} | ({"door": door} if door else {})
        world["chain"] = serve(dir, "chain", "devnet", "chain")
        world["relay"] = serve(dir, "relay", "devnet", "relay")
        self.chain = world["chain"]
        self.rpc("generatetoaddress", 1, NOBODY)
        shape = SHAPE.format(slots=slots, context=context, threads=threads)

        def worker(name, pack, price, more=""):
            return Node(dir, name, world, ["provider"], tables=(
                f'[[provider.packs]]\npath = "{pack["path"]}"\nalias = "{name}"\n'
                f"price_msat_per_million_expert_rows = {price}\nslots = {slots}\nthreads = {threads}\n{more}"))

        self.held = list(parts.files)
        self.workers = [worker(f"worker-{n + 1}", pack, price, place(n)) for n, (pack, price) in enumerate(zip(parts.files, prices))]
        if spare is not None:
            # The same experts as another worker's: who takes over.
            self.workers.append(worker("worker-spare", parts.files[spare], prices[spare]))
            self.held.append(parts.files[spare])
            self.prices.append(prices[spare])
        buys = ("buy_experts = true\n" + f"witness_per_million = {witness}\n" + (f'spare_experts = "{judge}"\n' if judge else "") +
                f'wire = "{wire}"\nmax_price_msat_per_million_expert_rows = {2 * max(prices)}\n')
        both = ["provider", "consumer"]
        if parts.ends:
            self.stages = [Node(dir, "stage", world, both, tables=(
                f'[[provider.stages]]\npath = "{parts.trunk["path"]}"\nalias = "stage"\n'
                f"price_msat_per_million_position_layers = {STAGE_PRICE}\n{buys}{shape}{place(None)}"))]
            head, tail = parts.ends
            leads = f'[[provider.leads]]\nhead = "{head}"\ntail = "{tail}"\nmax_price_msat_per_million_position_layers = {2 * STAGE_PRICE}\n'
        else:
            leads = f'[[provider.models]]\npath = "{parts.trunk["path"]}"\n{buys}'
        self.leads = [Node(dir, "lead", world, both, tables=f'{leads}alias = "{self.name}"\n{asks}{shape}{place(None)}')]
        self.solo = Node(dir, "solo", world, ["provider"], tables=(
            f'[[provider.models]]\npath = "{parts.model}"\nalias = "{self.name}"\n{asks}{shape}{place(None)}'))
        catalogue = os.path.join(dir, "catalogue.toml")
        with open(catalogue, "w") as out:
            out.write(f'[[model]]\nname = "{self.name}"\nquantisation = "{parts.shown["quantisation"]}"\nroot = "{parts.root}"\ntokenizer = "{parts.shown["tokenizer"]}"\n')
        self.consumer = Node(dir, "consumer", world, ["consumer"], extra=f'catalogue = "{catalogue}"')

    def show_map(self):
        """Who holds what, and for how much."""
        print(f"\n    THE MAP OF EXPERTS, model root {self.parts.root[:16]}\n", file=sys.stderr)
        trunk = self.parts.trunk
        print(f"    {'stage' if self.stages else 'lead':<13} {trunk['bytes'] // 1000:>6} kB  {trunk['holds']}", file=sys.stderr)
        for node, pack, price in zip(self.workers, self.held, self.prices):
            print(f"    {node.name:<13} {pack['bytes'] // 1000:>6} kB  {price} msat per million expert rows", file=sys.stderr)
            for line in pack["holds"].removeprefix("experts ").split("; "):
                print(f"    {'':<24}{line}", file=sys.stderr)
        print(file=sys.stderr)

    def earned(self):
        """What the own ledger of each worker, and of a stage, says it did and was paid for."""
        earned = {}
        print(file=sys.stderr)
        for node, unit in [*((node, "expert rows") for node in self.workers), *((node, "position-layers") for node in self.stages)]:
            ledger = os.path.join(node.dir, "ledger.sqlite")
            shown = json.loads(run("ledger", "show", "--format", "json", "--db", ledger))
            found = [re.search(rf"(\d+) {unit}, (\d+) msat", entry["what"]) for entry in shown if entry["kind"] == "receipt"]
            found = [(int(one[1]), int(one[2])) for one in found if one]
            rows, cost = sum(rows for rows, _ in found), sum(cost for _, cost in found)
            earned[node.name] = {"receipts": len(found), unit.replace(" ", "_").replace("-", "_"): rows, "msat": cost}
            print(f"    {node.name:<13} {len(found)} receipts, {rows:>7} {unit}, {cost:>7} msat", file=sys.stderr)
        print(file=sys.stderr)
        return earned
