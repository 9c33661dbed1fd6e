"""A market whose model runs over several machines: what demo-split.py and bench-split.py share. Workers that sell layers,
a lead that buys them and sells answers, a node that sells the whole model for comparison, a consumer; each a process of its
own, started from the shipped binary. It does only what an operator could do by hand: writes configurations, mines, opens
channels, asks the gateway, exports ledgers and verifies them.
"""

import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection

SAT = os.environ.get("SATGRID_BIN") or os.path.join(os.path.dirname(__file__), "../../target/debug/satgrid")
NOBODY = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
BEGAN = time.time()
CHILDREN = []


def say(text):
    print(f"[{time.time() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def fail(text):
    say(f"FAILED: {text}")
    sys.exit(1)


GIVEN = set()


def free_port():
    """Free for TCP and UDP a moment ago, given once, and none that the system gives to connections on their way out."""
    while True:
        port = random.randrange(16_384, 32_768)
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in GIVEN:
            GIVEN.add(port)
            return port


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
        """`world["door"]` may put something between this node and those who connect to it."""
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
            door = world["door"](self.quic) if "door" in world else self.quic
            text += f'[provider]\nrequests_per_peer = 64\nquic_listen = "127.0.0.1:{self.quic}"\npublic_addresses = ["127.0.0.1:{door}"]\n{tables}\n'
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

    def noticed(self, words):
        """When the node's log first said so, as a time of this machine's clock."""
        with open(self.log) as log:
            for line in log:
                if words in line:
                    stamp = re.search(r"(\d{4}-\d\d-\d\dT[\d:.]+)Z", line)[1]
                    return datetime.datetime.fromisoformat(f"{stamp[:26]}+00:00").timestamp()
        return float("inf")

    def tail(self, lines=25):
        with open(self.log) as log:
            return "".join(log.readlines()[-lines:])


def engines(node):
    """The processes that compute for a node."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as line:
                if int(stat.read().rsplit(")", 1)[1].split()[1]) == node.child.pid and "engine-worker" in line.read():
                    found.append(int(pid))
        except (OSError, IndexError, ValueError):
            continue
    return found


def dies(node, asks, pieces):
    """An answer under which the process that computes for a node dies, in the middle of a batch: what its client is told."""
    struck = []

    def heard(heard_pieces):
        if heard_pieces < pieces or struck:
            return
        struck.extend(engines(node))
        for pid in struck:
            os.kill(pid, signal.SIGSTOP)
        # Rows reach it by now, and stay there.
        time.sleep(0.5)
        for pid in struck:
            os.kill(pid, signal.SIGKILL)
        say(f"the engine of {node.name} killed (SIGKILL) under a batch, after {heard_pieces} pieces: nobody else has its part")

    try:
        stream = asks(heard)
    except RuntimeError as error:
        if not struck:
            raise
        say(f"the client is told: {error}")
        return str(error)
    fail(f"the answer came to its end: {stream.text!r}" if struck else "the answer was over before the engine was killed")


class Slowed:
    """A worker that has become much slower than it lists: its engine's process gets a millisecond at a time, with pauses between
    them, as on a machine that is sold twice."""

    def __init__(self, node, pause_s):
        self.pids, self.pause_s, self.over = engines(node), pause_s, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.over.is_set():
            for pid in self.pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(self.pause_s)
            for pid in self.pids:
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.001)

    def end(self):
        self.over.set()
        self.thread.join()


def folder(dir, mark):
    """An empty folder, unless it holds what is not ours."""
    dir = os.path.abspath(dir)
    if os.path.isdir(dir):
        if not os.path.exists(os.path.join(dir, mark)):
            fail(f"{dir} holds something else")
        shutil.rmtree(dir)
    os.makedirs(dir, mode=0o700)
    open(os.path.join(dir, mark), "w").close()
    return dir


class Parts:
    """A model cut for a lead with its two ends and so many workers."""

    def __init__(self, model, dir, workers):
        self.model, self.dir = os.path.abspath(model), dir
        self.shown = json.loads(run("--format", "json", "models", "show", model))
        whole = self.cut("0..1", "head.gguf")
        self.layers, self.root = whole["layers"], whole["model_root"]
        middle = self.layers - 2
        cuts = [1 + middle * n // workers for n in range(workers + 1)]
        self.ranges = [(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]
        self.files = [os.path.join(dir, f"layers-{a}-{b}.gguf") for a, b in self.ranges]
        for (a, b), part in zip(self.ranges, self.files):
            self.cut(f"{a}..{b}", part)
        self.cut(f"{self.layers - 1}..{self.layers}", "tail.gguf")
        say(f"model {self.root[:16]} of {self.layers} layers is cut: the first and the last for the lead, {self.ranges} for workers")

    def cut(self, layers, out):
        out = os.path.join(self.dir, out)
        return json.loads(run("--format", "json", "models", "split", self.model, "--layers", layers, "--out", out))


class Market:
    """Chain, relay, workers, leads, the whole model's seller and a consumer, up and with channels."""

    # Sellers of layers that buy experts themselves, between the leads and the workers.
    stages = []

    def __init__(self, dir, parts, prices, spare=None, leads=None, slots=4, context=1024, threads=1, asks=(100_000_000, 400_000_000), door=None, place=lambda worker: ""):
        """`place` gives more lines of configuration for the n-th worker's layers, or with None for those of lead and solo."""
        self.dir, self.parts = dir, parts
        self.name = os.path.splitext(os.path.basename(parts.model))[0].lower()
        world = {"models": os.path.join(dir, "models")} | ({"door": door} if door else {})
        world["chain"] = serve(dir, "chain", "devnet", "chain")
        world["relay"] = serve(dir, "relay", "devnet", "relay")
        self.chain = world["chain"]
        self.rpc("generatetoaddress", 1, NOBODY)
        shape = f"slots = {slots}\ncontext = {context}\nthreads = {threads}\n"
        sells = f"price_in_msat_per_mtok = {asks[0]}\nprice_out_msat_per_mtok = {asks[1]}\n"

        def worker(name, part, price, more=""):
            tables = f'[[provider.stages]]\npath = "{part}"\nalias = "{name}"\nprice_msat_per_million_position_layers = {price}\n{shape}{more}'
            return Node(dir, name, world, ["provider"], tables=tables)

        self.workers = [worker(f"worker-{n + 1}", part, price, place(n)) for n, (part, price) in enumerate(zip(parts.files, prices))]
        if spare is not None:
            # The same layers as another worker's, dearer: who takes over.
            self.workers.append(worker("worker-spare", parts.files[spare], 2 * prices[spare]))
        self.leads = []
        for name, extra in (leads or {"lead": ""}).items():
            self.leads.append(Node(dir, name, world, ["provider", "consumer"], tables=(
                f'[[provider.leads]]\nhead = "{dir}/head.gguf"\ntail = "{dir}/tail.gguf"\nalias = "{self.name}"\n{sells}{shape}{place(None)}{extra}')))
        self.solo = Node(dir, "solo", world, ["provider"], tables=(
            f'[[provider.models]]\npath = "{parts.model}"\nalias = "{self.name}"\n{sells}{shape}{place(None)}'))
        catalogue = os.path.join(dir, "catalogue.toml")
        with open(catalogue, "w") as out:
            out.write(f'[[model]]\nname = "{self.name}"\nquantisation = "{parts.shown["quantisation"]}"\nroot = "{parts.root}"\ntokenizer = "{parts.shown["tokenizer"]}"\n')
        self.consumer = Node(dir, "consumer", world, ["consumer"], extra=f'catalogue = "{catalogue}"')

    def rpc(self, method, *params):
        return http(self.chain, {"jsonrpc": "1.0", "id": "demo", "method": method, "params": list(params)})["result"]

    def start(self):
        for node in NODES.values():
            node.start()
        for node in [*self.workers, self.solo, self.consumer, *self.stages, *self.leads]:
            node.up()
        # Coins and channels: consumer to leads and solo, leads to every stage if there are any, these or the leads to every worker.
        edges = [(self.consumer, seller) for seller in [*self.leads, self.solo]]
        edges += [(lead, stage) for lead in self.leads for stage in self.stages]
        edges += [(buyer, worker) for buyer in self.stages or self.leads for worker in self.workers]
        for node in NODES.values():
            rewards = max(1, sum(a is node for a, _ in edges))
            self.rpc("generatetoaddress", rewards, node.ask("wallet/address", {})["address"])
        self.rpc("generatetoaddress", 100, NOBODY)
        for node in NODES.values():
            node.ask("wallet/sync", {})
        for n, (payer, payee) in enumerate(edges):
            payer.ask("wallet/open", {"node": payee.status["lightning_node"], "addr": payee.status["lightning_listen"], "capacity_sat": 100_000, "push_msat": 5_000_000})
            until("a funding transaction", lambda: len(self.rpc("getrawmempool")) > n)
            payer.ask("wallet/sync", {})
        deadline, blocks = time.time() + 60, 6
        while True:
            self.rpc("generatetoaddress", blocks, NOBODY)
            blocks = 1
            for node in NODES.values():
                node.ask("wallet/sync", {})
            time.sleep(1)
            usable = lambda node: sum(c["usable"] for c in node.ask("wallet")["channels"])
            if all(usable(node) >= sum(node in edge for edge in edges) for node in NODES.values()):
                break
            if time.time() > deadline:
                fail("the channels are not usable")
        say(f"{len(edges)} channels, usable")
        sellers = len(self.workers) + len(self.stages) + len(self.leads) + 1
        until("the listings", lambda: self.consumer.ask("status")["listings"] >= sellers)

    def only(self, node, body):
        """The request, for this seller alone."""
        return {"model": self.name, "provider": {"only": [node.status["node_key"]], "allow_fallbacks": False}} | body

    def url(self):
        return f"http://127.0.0.1:{self.consumer.api}/v1/chat/completions"

    def verify(self):
        """Every ledger, exported and verified."""
        clean = True
        for node in NODES.values():
            bundle = os.path.join(self.dir, f"{node.name}.bundle")
            run("ledger", "export", "--db", os.path.join(node.dir, "ledger.sqlite"), "--out", bundle)
            done = subprocess.run([SAT, "ledger", "verify", bundle], capture_output=True, text=True)
            clean &= done.returncode == 0
            say(f"{node.name}: {'clean' if done.returncode == 0 else done.stdout}")
        return clean


class Stream:
    """One streamed answer: when each piece came, and what it was."""

    def __init__(self, market, node, body, heard=None):
        """`heard` is called with the number of pieces so far."""
        asked = market.only(node, {"stream": True, "stream_options": {"include_usage": True}} | body)
        began = time.perf_counter()
        link = HTTPConnection("127.0.0.1", market.consumer.api, timeout=600)
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        link.request("POST", path, json.dumps(asked), {"content-type": "application/json"})
        answer = link.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read().decode()[:400])
        self.times, self.text, self.usage, self.finish = [], "", None, None
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices", []):
                self.finish = choice.get("finish_reason") or self.finish
                if piece := choice.get("text") or choice.get("delta", {}).get("content"):
                    self.times.append(now)
                    self.text += piece
                    if heard:
                        heard(len(self.times))
        self.began = began
        self.tokens = self.usage["completion_tokens"]

    def longest_gap_s(self):
        return max((b - a for a, b in zip(self.times, self.times[1:])), default=0)

    def first_ms(self):
        return 1000 * (self.times[0] - self.began)

    def token_ms(self):
        return 1000 * (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)


def together(market, node, bodies, heard=None):
    """Streams side by side, in the order of `bodies`; fails where one does not come to its end. No node: whoever is there."""
    out = [None] * len(bodies)

    def one(at, asked):
        try:
            out[at] = Stream(market, node, asked, heard)
        except (RuntimeError, OSError, ValueError, IndexError, TypeError, KeyError) as error:
            out[at] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in out:
        if isinstance(stream, Exception):
            fail(f"one of {len(bodies)} streams at {node.name if node else 'any seller'}: {stream!r}")
    return out


def stop_all():
    for child in reversed(CHILDREN):
        if child.poll() is None:
            child.terminate()
    for child in reversed(CHILDREN):
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
    CHILDREN.clear()
    NODES.clear()


def run_script(main):
    """Runs a script's `main` to its exit status, and leaves no process behind however it ends."""
    code = 1
    try:
        code = main()
    finally:
        stop_all()
    sys.exit(code)
