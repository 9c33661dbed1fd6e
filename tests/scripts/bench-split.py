#!/usr/bin/env python3
"""What a split by layers costs in speed: the paid ring (everything that a customer's request goes through: gateway, slices,
acknowledgements, tickets, QUIC hops) beside one machine, llama.cpp's own RPC backend on the same model and links, and the law
that the nearest peer publishes for itself.

    bench-split.py [--workers 1,2,3] [--rtt 0,5,20,50] [--rounds N] [--tokens N] [--layers N] [--wire TYPE] [--out FILE.json] [--dir DIR]

Round-trip time is made by a proxy (tests/interop/split/delay_proxy.cpp) in front of every node's QUIC port and of every RPC
server: what goes through it waits r/2. So all hops of the ring wait, and the customer's link, for solo too. Lightning, chain,
relay and the local API do not. (netem is not in every kernel; the proxy is the same everywhere.)
Prints a table in Markdown, and JSON with --out.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ring_market import CHILDREN, SAT, Market, Parts, Stream, fail, folder, free_port, run, run_script, say, stop_all, together

HERE = os.path.dirname(os.path.abspath(__file__))
PEER_P_MS = 5.0
# The end of an answer in the vocabulary of random models.
END = "2"


class Links:
    """Doors with a delay, each a port of the proxy. `direct` leaves it out, and with it the count of bytes: a proxy of our own
    takes a core its part of each datagram."""

    def __init__(self, dir, direct=False):
        self.direct = direct
        if direct:
            return
        self.binary, self.child, self.rules = os.path.join(dir, "delay_proxy"), None, []
        source = os.path.join(HERE, "../interop/split/delay_proxy.cpp")
        subprocess.run(["g++", "-O2", "-std=c++17", source, "-o", self.binary], check=True)

    def door(self, port, kind="udp"):
        if self.direct:
            return port
        here = free_port()
        self.rules += [kind, str(here), str(port)]
        return here

    def start(self):
        if self.direct:
            return
        self.child = subprocess.Popen([self.binary, *self.rules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        CHILDREN.append(self.child)
        self.rules = []
        if self.child.stdout.readline().strip() != "ready":
            fail("the proxy did not start")

    def ask(self, line):
        if self.direct:
            return 0, 0
        self.child.stdin.write(f"{line}\n")
        self.child.stdin.flush()
        sent, packets = self.child.stdout.readline().split()
        return int(sent), int(packets)

    def rtt(self, ms):
        self.ask(f"delay {ms / 2}")

    def sent(self):
        """Bytes and datagrams of UDP so far."""
        return self.ask("sent")


def build_rpc(dir):
    """llama.cpp's RPC backend from the vendored sources, linked with the libraries that cargo built; None where it cannot be."""
    home = os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo"))
    sources = sorted(glob.glob(f"{home}/registry/src/*/llama-cpp-sys-2-*/llama.cpp"))
    libraries = sorted(glob.glob(os.path.join(os.path.dirname(SAT), "build/llama-cpp-sys-2-*/out/lib/libllama.a")), key=os.path.getmtime)
    if not sources or not libraries:
        return None
    source, lib = sources[-1], os.path.dirname(libraries[-1])
    out = os.path.join(dir, "rpc_bench")
    rpc = f"{source}/ggml/src/ggml-rpc"
    done = subprocess.run(
        ["g++", "-O2", "-std=c++17", *(f"-I{source}/{at}" for at in ["ggml/include", "include", "ggml/src", "ggml/src/ggml-rpc"]),
         os.path.join(HERE, "../interop/split/rpc_bench.cpp"), f"{rpc}/ggml-rpc.cpp", f"{rpc}/transport.cpp",
         f"-L{lib}", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base", "-fopenmp", "-lpthread", "-ldl", "-o", out],
        capture_output=True, text=True)
    if done.returncode:
        say(f"the RPC backend was not built: {done.stderr[-400:]}")
        return None
    return out


class Rpc:
    """llama.cpp over its own RPC servers. Loads once; each line on its standard input is one measurement."""

    def __init__(self, binary, model, layers, ports, doors, tokens, threads):
        serve = lambda port: [binary, "serve", f"127.0.0.1:{port}", str(threads)]
        self.children = [subprocess.Popen(serve(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for port in ports]
        ends = [f"127.0.0.1:{door}" for door in doors]
        time.sleep(1)
        self.child = subprocess.Popen([binary, "run", model, str(threads), str(layers - 1), str(tokens), *ends], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.children.append(self.child)
        CHILDREN.extend(self.children)
        if self.child.stdout.readline().strip() != "ready":
            fail("the RPC client did not load")

    def measure(self):
        self.child.stdin.write("go\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())["mean_ms"]

    def stop(self):
        for child in self.children:
            child.kill()
            child.wait()


def words(seed, count):
    """A text without much repetition."""
    state, out = seed * 2_654_435_761 % 2**32, []
    for _ in range(count):
        state = (state * 1_664_525 + 1_013_904_223) % 2**32
        out.append("".join(chr(97 + (state >> shift) % 26) for shift in (3, 9, 15, 21)))
    return " ".join(out)


def body(seed, tokens, **more):
    return {"messages": [{"role": "user", "content": words(seed, 12)}], "max_tokens": tokens, "temperature": 0.8, "seed": seed} | more


def many(market, node, bodies):
    """Streams side by side: tokens a second over all while all of them run, from the last to begin to the first to end. How
    long a stream takes to begin (orders, slices, a prompt) is no part of that."""
    out = together(market, node, bodies)
    found = rate(out)
    if found is None:
        fail(f"{len(bodies)} streams never ran at the same time: longer answers are needed")
    return found, out


def rate(out):
    """The figure of these streams; None where they never all ran."""
    if any(not s.times for s in out):
        return None
    begin, end = max(s.times[0] for s in out), min(s.times[-1] for s in out)
    said = sum(s.tokens / len(s.times) * sum(begin < at <= end for at in s.times) for s in out)
    return said / (end - begin) if end > begin else None


def load():
    with open("/proc/loadavg") as file:
        return float(file.read().split()[0])


def measure(args, links, workers, rpc_binary, results):
    dir = folder(os.path.join(args.dir, f"workers-{workers}"), "satgrid-bench-split")
    parts = Parts(args.model, dir, workers)
    # A tenth of the demo's prices: slices are paid, and are not what is measured.
    market = Market(dir, parts, [200_000] * workers, slots=8, threads=args.threads, asks=(1_000_000, 4_000_000), door=links.door,
                    leads={"lead": f'speculate = false\nwire = "{args.wire}"\n'} | ({"lead-guessing": "speculate = true\n"} if args.guess else {}))
    ports = [free_port() for _ in range(workers)] if rpc_binary else []
    doors = [links.door(port, "tcp") for port in ports]
    links.start()
    market.start()
    rpc = Rpc(rpc_binary, args.model, args.layers, ports, doors, args.tokens, args.threads) if rpc_binary else None
    bare = Rpc(rpc_binary, args.model, args.layers, [], [], args.tokens, args.threads) if rpc_binary else None
    lead = market.leads[0]
    for node in [market.solo, *market.leads]:
        Stream(market, node, body(1, 8))  # sessions, slices, tokenizer, hops
    for r in args.rtt:
        links.rtt(r)
        rows = {"solo": [], "ring": [], "rpc": [], "bare": [], "first": [], "wire": [], "packets": [], "load": []}
        for n in range(args.rounds):
            asked = body(100 + n, args.tokens)
            rows["load"].append(load())
            at = links.sent()
            solo = Stream(market, market.solo, asked)
            middle = links.sent()
            ring = Stream(market, lead, asked)
            after = links.sent()
            if args.wire == "f32" and ring.text != solo.text:
                fail(f"the ring's text is not the machine's:\n{solo.text!r}\n{ring.text!r}")
            rows["solo"].append(solo.token_ms())
            rows["ring"].append(ring.token_ms())
            rows["first"].append(ring.first_ms())
            hops = (workers + 1) * ring.tokens
            rows["wire"].append((after[0] - 2 * middle[0] + at[0]) / hops)
            rows["packets"].append((after[1] - 2 * middle[1] + at[1]) / hops)
            if rpc:
                rows["rpc"].append(rpc.measure())
                rows["bare"].append(bare.measure())
        mid = {name: statistics.median(values) if values else None for name, values in rows.items()}
        c, hops = mid["solo"], workers + 1
        own = 1.05 * (c + hops * r / 2) + 2 * hops
        # Machines: the lead and its workers.
        law = c + workers * (2 * r + PEER_P_MS)
        row = {"workers": workers, "rtt_ms": r, "solo_ms": c, "ring_ms": mid["ring"], "allowed_ms": own, "rpc_ms": mid["rpc"], "bare_ms": mid["bare"], "law_ms": law,
               "first_ms": mid["first"], "wire_bytes": mid["wire"], "packets": mid["packets"], "load": mid["load"], "all": rows}
        results["links"].append(row)
        say(f"{workers} workers, r = {r} ms: solo {c:.1f}, ring {mid['ring']:.1f} (allowed {own:.1f}), rpc {mid['rpc'] or 0:.1f}, law {law:.1f} ms a token; load {mid['load']:.1f}")
    if workers == 2 and 20 in args.rtt:
        links.rtt(20)
        streams(args, market, lead, results)
        if args.guess:
            guesses(args, market, results)
    if rpc:
        rpc.stop()
        bare.stop()
    if not market.verify():
        fail("a ledger is not clean")
    stop_all()


def streams(args, market, lead, results):
    ratios = []
    for n in range(args.rounds):
        # Random weights end an answer when they will: that token is barred.
        asked = lambda at: body(310 + 10 * n + at, args.stream_tokens, logit_bias={END: -100})
        one, _ = many(market, lead, [asked(9)])
        eight, answers = many(market, lead, [asked(at) for at in range(8)])
        alone, _ = many(market, market.solo, [asked(9)])
        beside, _ = many(market, market.solo, [asked(at) for at in range(8)])
        ratios.append((one, eight, alone, beside))
        again = Stream(market, market.solo, asked(3))
        if args.wire == "f32" and again.text != answers[3].text:
            fail("one of eight streams is not what one machine says")
    one, eight, alone, beside = (statistics.median(side) for side in zip(*ratios))
    results["streams"] = {"one": one, "eight": eight, "ratio": eight / one, "solo_one": alone, "solo_eight": beside, "all": ratios}
    say(f"8 streams over 3 nodes at 20 ms: {eight:.1f} tokens/s, one {one:.1f}: {eight / one:.2f} times; on one machine {beside:.1f} and {alone:.1f}: {beside / alone:.2f} times")


def guesses(args, market, results):
    plain, guessing = market.leads
    # Random weights copy nothing by themselves: a schema makes the answer repeat a sentence, letter by letter.
    schema = lambda n: {"type": "array", "items": {"type": "string", "enum": [words(700 + n, 8)]}, "minItems": 6, "maxItems": 6}
    rows = []
    for n in range(args.rounds):
        copying = {"response_format": {"type": "json_schema", "json_schema": {"name": "copies", "strict": True, "schema": schema(n)}}}
        asked = body(500 + n, 400, **copying)
        without, with_ = Stream(market, plain, asked), Stream(market, guessing, asked)
        if without.text != with_.text:
            fail("guessing changed the text")
        sampled = body(600 + n, args.tokens)
        other, same = Stream(market, plain, sampled), Stream(market, guessing, sampled)
        if other.text != same.text:
            fail("guessing changed a sampled text")
        rows.append((without.token_ms(), with_.token_ms(), other.token_ms(), same.token_ms()))
    a, b, c, d = (statistics.median(side) for side in zip(*rows))
    results["guesses"] = {"copying_without_ms": a, "copying_with_ms": b, "ratio": a / b, "sampled_without_ms": c, "sampled_with_ms": d, "all": rows}
    say(f"repeating text at 20 ms: {a:.1f} ms a token without guesses, {b:.1f} with: {a / b:.2f} times; sampled text {c:.1f} and {d:.1f}")


def table(results):
    out = ["| workers | r, ms | solo, ms/token (C) | ring | allowed | ring / solo | llama.cpp RPC | llama.cpp alone | the peer's law | law / ring |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in results["links"]:
        rpc = f"{row['rpc_ms']:.1f} | {row['bare_ms']:.1f}" if row["rpc_ms"] else "- | -"
        out.append(f"| {row['workers']} | {row['rtt_ms']} | {row['solo_ms']:.1f} | {row['ring_ms']:.1f} | {row['allowed_ms']:.1f} | {row['solo_ms'] / row['ring_ms']:.2f} | {rpc} | {row['law_ms']:.1f} | {row['law_ms'] / row['ring_ms']:.2f} |")
    return "\n".join(out)


def main():
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=numbers, default=[1, 2, 3])
    parser.add_argument("--rtt", type=numbers, default=[0, 5, 20, 50])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=192, help="tokens of each of eight streams")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wire", default="f32", help="f32, bf16 or q8_0: only f32 is compared with one machine's text")
    parser.add_argument("--no-guess", dest="guess", action="store_false", help="leave speculation out")
    parser.add_argument("--no-rpc", dest="rpc", action="store_false", help="leave llama.cpp's RPC backend out")
    parser.add_argument("--direct", action="store_true", help="no proxy between the nodes: a round trip of 0, bytes not counted")
    parser.add_argument("--dir", default=".bench-split")
    parser.add_argument("--out")
    args = parser.parse_args()
    try:
        # Where it may: latencies of a busy machine's scheduler are not what is measured.
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except PermissionError:
        pass
    args.dir = folder(args.dir, "satgrid-bench-split")
    args.model = os.path.join(args.dir, "deep.gguf")
    run("models", "random", "llama-deep", "--layers", args.layers, "--out", args.model)
    rpc_binary = build_rpc(args.dir) if args.rpc else None
    results = {"tokens": args.tokens, "rounds": args.rounds, "layers": args.layers, "threads": args.threads, "cpus": os.cpu_count(), "links": []}
    links = Links(args.dir, args.direct)
    args.rtt = [0] if args.direct else args.rtt
    for workers in args.workers:
        measure(args, links, workers, rpc_binary, results)
    print(table(results))
    for name in ("streams", "guesses"):
        if name in results:
            print(json.dumps({name: {key: value for key, value in results[name].items() if key != "all"}}))
    if args.out:
        with open(args.out, "w") as out:
            json.dump(results, out, indent=1)
    return 0


if __name__ == "__main__":
    run_script(main)
