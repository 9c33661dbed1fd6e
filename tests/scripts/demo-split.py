#!/usr/bin/env python3
"""A model over several machines, paid: three workers that sell layers, a lead that buys them and sells answers, a consumer,
and a node that sells the whole model, for comparison. Each is a process of its own, started from the shipped binary.

    demo-split.py [--model FILE] [--dir DIR] [--kill] [--tokens N]

It does only what an operator could do by hand: writes configurations, mines, opens channels, asks the gateway, exports
ledgers and verifies them. Exit 0: the answer of the ring is the answer of one machine, and every ledger is clean.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

SAT = os.environ.get("SATGRID_BIN") or os.path.join(os.path.dirname(__file__), "../../target/debug/satgrid")
NOBODY = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
PROMPT = "The history of money is a history of trust. At first people traded goods for goods. Later they"
BEGAN = time.time()
CHILDREN = []


def say(text):
    print(f"[{time.time() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def fail(text):
    say(f"FAILED: {text}")
    sys.exit(1)


def free_port():
    """Free for TCP and UDP a moment ago."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return tcp.getsockname()[1]


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def http(url, body=None, token=None, method=None, within=60):
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method or ("GET" if data is None else "POST"))
    try:
        with OPENER.open(request, timeout=within) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code}: {error.read().decode()[:400]}") from None


def until(what, ask, within=60):
    deadline, last = time.time() + within, None
    while time.time() < deadline:
        for node in NODES.values():
            if node.child and node.child.poll() is not None and not node.killed:
                fail(f"{node.name} ended by itself:\n{node.tail()}")
        try:
            if found := ask():
                return found
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            last = error
        time.sleep(0.1)
    for node in NODES.values():
        say(f"--- {node.name}\n{node.tail(12)}")
    fail(f"{what} did not come within {within} s ({last})")


def run(*args):
    done = subprocess.run([SAT, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        fail(f"satgrid {' '.join(map(str, args))}: {done.stderr}")
    return done.stdout


def serve(dir, name, *args):
    log = open(os.path.join(dir, f"{name}.log"), "w")
    child = subprocess.Popen([SAT, *args], stdout=subprocess.PIPE, stderr=log, text=True)
    CHILDREN.append(child)
    return child.stdout.readline().strip()


NODES = {}


class Node:
    def __init__(self, dir, name, world, roles, extra="", tables=""):
        self.name, self.killed, self.child = name, False, None
        self.dir, self.log = os.path.join(dir, name), os.path.join(dir, f"{name}.log")
        self.admin, self.quic, self.api = (free_port() for _ in range(3))
        config = os.path.join(dir, f"{name}.toml")
        run("init", "--config", f"{config}.init", "--dir", self.dir, "--network", "regtest", "--hide-words")
        text = f"""
[node]
network = "regtest"
dir = "{self.dir}"
roles = {json.dumps(roles)}
[api]
listen = "127.0.0.1:{self.api}"
admin = "127.0.0.1:{self.admin}"
[session]
ack_tokens = 16
window_tokens = 64
refund_dust_sat = 1
[market]
relays = ["{world['relay']}"]
{extra}
[wallet]
chain = "esplora:{world['chain']}"
listen = "127.0.0.1:{free_port()}"
alias = "{name}"
seed = "file:{self.dir}/seed"
max_balance_sat = 2100000000000000
[models]
dir = "{world['models']}"
"""
        if "provider" in roles:
            text += f'[provider]\nquic_listen = "127.0.0.1:{self.quic}"\npublic_addresses = ["127.0.0.1:{self.quic}"]\n{tables}\n'
        with open(config, "w") as out:
            out.write(text)
        os.chmod(config, 0o600)
        self.config = config
        NODES[name] = self

    def start(self):
        self.killed = False
        self.child = subprocess.Popen([SAT, "up", "--config", self.config], stderr=open(self.log, "a"), stdout=subprocess.DEVNULL)
        CHILDREN.append(self.child)

    def ask(self, path, body=None, method=None):
        with open(os.path.join(self.dir, "admin-token")) as token:
            return http(f"http://127.0.0.1:{self.admin}/admin/v1/{path}", body, token.read().strip(), method)

    def up(self, within=120):
        self.status = until(f"{self.name}", lambda: self.ask("status"), within)
        say(f"{self.name} is up: process {self.child.pid}, node {self.status['node_key'][:8]}")

    def tail(self, lines=25):
        with open(self.log) as log:
            return "".join(log.readlines()[-lines:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", default=".demo-split")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of the answer")
    args = parser.parse_args()
    dir = os.path.abspath(args.dir)
    if os.path.isdir(dir):
        if not os.path.exists(os.path.join(dir, "satgrid-demo-split")):
            fail(f"{dir} holds something that is no demo's")
        shutil.rmtree(dir)
    os.makedirs(dir, mode=0o700)
    open(os.path.join(dir, "satgrid-demo-split"), "w").close()

    # The parts: a head and a tail for the lead, three between.
    shown = json.loads(run("--format", "json", "models", "show", args.model))
    whole = json.loads(run("--format", "json", "models", "split", args.model, "--layers", "0..1", "--out", os.path.join(dir, "head.gguf")))
    layers, root = whole["layers"], whole["model_root"]
    middle = layers - 2
    cuts = [1 + middle * n // 3 for n in range(4)]
    ranges = [(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]
    parts = [os.path.join(dir, f"layers-{a}-{b}.gguf") for a, b in ranges]
    for (a, b), part in zip(ranges, parts):
        run("models", "split", args.model, "--layers", f"{a}..{b}", "--out", part)
    run("models", "split", args.model, "--layers", f"{layers - 1}..{layers}", "--out", os.path.join(dir, "tail.gguf"))
    say(f"model {root[:16]} of {layers} layers is cut: 0-1 and {layers - 1}-{layers} for the lead, {ranges} for workers")

    world = {"models": os.path.join(dir, "models")}
    world["chain"] = serve(dir, "chain", "devnet", "chain")
    world["relay"] = serve(dir, "relay", "devnet", "relay")

    def rpc(method, *params):
        return http(world["chain"], {"jsonrpc": "1.0", "id": "demo", "method": method, "params": list(params)})["result"]

    rpc("generatetoaddress", 1, NOBODY)
    prices = [2_000_000, 1_500_000, 3_000_000]
    workers = []

    def worker(name, part, price):
        tables = f'[[provider.stages]]\npath = "{part}"\nalias = "{name}"\nprice_msat_per_million_position_layers = {price}\nslots = 4\ncontext = 1024\nthreads = 1\n'
        return Node(dir, name, world, ["provider"], tables=tables)

    for n, (part, price) in enumerate(zip(parts, prices)):
        workers.append(worker(f"worker-{n + 1}", part, price))
    if args.kill:
        # The same layers as the second worker's, dearer: who takes over.
        workers.append(worker("worker-spare", parts[1], 2 * prices[1]))
    name = os.path.splitext(os.path.basename(args.model))[0].lower()
    lead = Node(dir, "lead", world, ["provider", "consumer"], tables=(
        f'[[provider.leads]]\nhead = "{dir}/head.gguf"\ntail = "{dir}/tail.gguf"\nalias = "{name}"\n'
        "price_in_msat_per_mtok = 100000000\nprice_out_msat_per_mtok = 400000000\nslots = 4\ncontext = 1024\nthreads = 1\n"))
    solo = Node(dir, "solo", world, ["provider"], tables=(
        f'[[provider.models]]\npath = "{os.path.abspath(args.model)}"\nalias = "{name}"\n'
        "price_in_msat_per_mtok = 100000000\nprice_out_msat_per_mtok = 400000000\nslots = 4\ncontext = 1024\nthreads = 1\n"))
    catalogue = os.path.join(dir, "catalogue.toml")
    with open(catalogue, "w") as out:
        out.write(f'[[model]]\nname = "{name}"\nquantisation = "{shown["quantisation"]}"\nroot = "{root}"\ntokenizer = "{shown["tokenizer"]}"\n')
    consumer = Node(dir, "consumer", world, ["consumer"], extra=f'catalogue = "{catalogue}"')
    for node in NODES.values():
        node.start()
    for node in [*workers, solo, consumer, lead]:
        node.up()

    # Coins and channels: consumer to lead and solo, lead to every worker.
    edges = [(consumer, lead), (consumer, solo), *((lead, w) for w in workers)]
    for node in NODES.values():
        rewards = max(1, sum(a is node for a, _ in edges))
        rpc("generatetoaddress", rewards, node.ask("wallet/address", {})["address"])
    rpc("generatetoaddress", 100, NOBODY)
    for node in NODES.values():
        node.ask("wallet/sync", {})
    for n, (payer, payee) in enumerate(edges):
        payer.ask("wallet/open", {"node": payee.status["lightning_node"], "addr": payee.status["lightning_listen"], "capacity_sat": 100_000, "push_msat": 5_000_000})
        until("a funding transaction", lambda: len(rpc("getrawmempool")) > n)
        payer.ask("wallet/sync", {})
    deadline = time.time() + 60
    while True:
        rpc("generatetoaddress", 6 if time.time() + 60 >= deadline else 1, NOBODY)
        for node in NODES.values():
            node.ask("wallet/sync", {})
        time.sleep(1)
        usable = lambda node: sum(c["usable"] for c in node.ask("wallet")["channels"])
        if all(usable(node) >= sum(node in edge for edge in edges) for node in NODES.values()):
            break
        if time.time() > deadline:
            fail("the channels are not usable")
    say(f"{len(edges)} channels, usable")
    until("the listings", lambda: consumer.ask("status")["listings"] >= len(workers) + 2)

    plan(lead, workers, ranges, prices, layers)
    body = {
        "model": name, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": args.tokens,
        "temperature": 0.7, "seed": 42,
    }

    def answer(node, kill=None):
        say(f"the answer of {node.name}:")
        began = time.time()
        asked = body | {"provider": {"only": [node.status["node_key"]], "allow_fallbacks": False}}
        if kill:
            import threading

            def strike():
                time.sleep(args_kill_after)
                kill.killed = True
                kill.child.send_signal(signal.SIGKILL)
                say(f"{kill.name} killed (SIGKILL)")

            args_kill_after = 1.5
            threading.Thread(target=strike, daemon=True).start()
        reply = http(f"http://127.0.0.1:{consumer.api}/v1/chat/completions", asked, within=300)
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
        print(f"    {PROMPT}{text}\n", file=sys.stderr)
        say(f"{usage['completion_tokens']} tokens in {time.time() - began:.1f} s, {usage['cost_msat']} msat")
        return text, usage

    alone, _ = answer(solo)
    split, usage = answer(lead, workers[1] if args.kill else None)
    time.sleep(2)

    # Every ledger, exported and verified; the workers' receipts as the lead keeps them.
    clean = True
    for node in NODES.values():
        bundle = os.path.join(dir, f"{node.name}.bundle")
        run("ledger", "export", "--db", os.path.join(node.dir, "ledger.sqlite"), "--out", bundle)
        done = subprocess.run([SAT, "ledger", "verify", bundle], capture_output=True, text=True)
        clean &= done.returncode == 0
        say(f"{node.name}: {'clean' if done.returncode == 0 else done.stdout}")
    same = alone == split
    say("the ring and the single machine gave the same text" if same else f"DIFFERENT TEXTS:\n{alone!r}\n{split!r}")
    print(json.dumps({"same": same, "clean": clean, "text": split, "usage": usage, "root": root, "dir": dir}, indent=2))
    return 0 if same and clean else 1


def plan(lead, workers, ranges, prices, layers):
    """Who runs which layers, and for how much."""
    wide = 46
    print(file=sys.stderr)
    for node, a, b, price in [(lead, 0, 1, None), *((w, *r, p) for w, r, p in zip(workers, ranges, prices)), (lead, layers - 1, layers, None)]:
        left, right = wide * a // layers, max(wide * a // layers + 1, wide * b // layers)
        bar = " " * left + "#" * (right - left) + " " * (wide - right)
        cost = "its own" if price is None else f"{price} msat per million position-layers"
        print(f"    {node.name:<10} layers {a:>2}-{b:<3} |{bar}| {cost}", file=sys.stderr)
    print(file=sys.stderr)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    finally:
        for child in reversed(CHILDREN):
            if child.poll() is None:
                child.terminate()
        for child in reversed(CHILDREN):
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
    sys.exit(code)
