#!/usr/bin/env python3
"""This node's API beside llama.cpp's own server, in one run: the same file, threads, slots, prompts and clients.

`make bench-api` runs it. Three servers stand side by side and are asked turn and turn about, so that a busy machine slows all
of them: llama.cpp's server (out of the wheel `xllamacpp`), a market whose providers ask nothing, and one that is paid. Each
figure is the median of the turns and a ratio to llama.cpp's. Nothing passes or fails by time; what is asserted is that every
stream came whole, and that the paid one was paid for.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "interop", "clients"))

from market import Market  # noqa: E402

SLOTS = 16
CONTEXT = 2_048
TOKENS = 64
TINY_SECONDS = 10
STREAMS = (1, 8, 16)
# About sixty tokens after a number that no other prompt begins with, so that no server finds it in a cache.
STORY = (
    "The history of money is a history of trust. At first people traded goods for goods, and later they found that one good "
    "in particular, which everybody wanted and nobody could make, was better kept than eaten. What did they do with it then?"
)
# Gemma's ends of text and of turn, and the tiny model's: every stream is to have its whole length.
NO_END = {"1": -100, "2": -100, "106": -100}

LLAMA = """
import sys, time, xllamacpp
path, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = slots, slots * context, 2048, 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cont_batching, params.kv_unified, params.port = True, False, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e9)
"""


class Refused(Exception):
    """An answer that is not 200."""


class Server:
    """One of the three: where it listens, what it calls its model, and which processes it is."""

    def __init__(self, name, host, port, model, pids):
        self.name, self.host, self.port, self.model, self.pids = name, host, port, model, pids

    async def ask(self, reader, writer, body):
        """Sends one request over a kept connection; gives the answer's stream of lines until its end."""
        data = json.dumps({**body, "model": self.model}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise Refused(status + await reader.read(2_000))
        length, chunked = 0, False
        while (line := await reader.readline()).strip():
            name, _, value = line.decode().lower().partition(":")
            length = int(value) if name == "content-length" else length
            chunked = chunked or (name == "transfer-encoding" and "chunked" in value)
        if not chunked:
            yield await reader.readexactly(length)
            return
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readline()

    async def stream(self, number):
        """One streamed reply on a connection of its own: seconds to the first text, to the end, tokens, usage."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        messages = [{"role": "user", "content": f"{number}. {STORY}"}]
        body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "logit_bias": NO_END, "stream": True}
        began, first, usage, text = time.monotonic(), None, None, b""
        async for piece in self.ask(reader, writer, {**body, "stream_options": {"include_usage": True}}):
            text += piece
            *lines, text = text.split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                    first = time.monotonic() - began
        writer.close()
        assert usage["completion_tokens"] == TOKENS, usage
        return first, time.monotonic() - began, usage

    def resident(self):
        """Proportional memory of its processes and their children, so that shared pages count once, in MB."""
        return sum(proportional(pid) for pid in family(self.pids)) / 1e6


def family(pids):
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in out.splitlines()]
    known = set(pids)
    while more := {pid for pid, parent in parents if parent in known} - known:
        known |= more
    return known


def proportional(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1_024
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0


async def turn(server, streams, numbers):
    began = time.monotonic()
    done = await asyncio.gather(*(server.stream(next(numbers)) for _ in range(streams)))
    return {
        "rate": streams * TOKENS / (time.monotonic() - began),
        "first": [first for first, _, _ in done],
        "cost": sum(usage.get("cost_msat", 0) for _, _, usage in done),
    }


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def side_by_side(servers, turns):
    numbers = iter(range(10_000, 10_000_000))
    for server in servers:
        await turn(server, 1, numbers)
    figures = {}
    for streams in STREAMS:
        for _ in range(turns):
            for server in servers:
                figures.setdefault((streams, server.name), []).append(await turn(server, streams, numbers))
    base = servers[0].name
    print(f"\n{'streams':>7}  {'server':<12} {'tokens/s':>9} {'ratio':>6}   {'first p50':>9} {'ratio':>6}   {'first p95':>9} {'ratio':>6}")
    for streams in STREAMS:
        for server in servers:
            row, against = figures[streams, server.name], figures[streams, base]
            rate, base_rate = (statistics.median(one["rate"] for one in which) for which in (row, against))
            firsts, base_firsts = ([ms for one in which for ms in one["first"]] for which in (row, against))
            cells = []
            for q in (0.5, 0.95):
                ms, base_ms = quantile(firsts, q) * 1e3, quantile(base_firsts, q) * 1e3
                cells.append(f"{ms:>7.0f}ms {ms / base_ms:>6.2f}")
            print(f"{streams:>7}  {server.name:<12} {rate:>9.1f} {rate / base_rate:>6.2f}   {'   '.join(cells)}")
            if server.name == "paid":
                assert all(one["cost"] > 0 for one in row), "a paid stream cost nothing"
    print("\nproportional memory, all processes of each, MB: " + ", ".join(f"{s.name} {s.resident():.0f}" for s in servers))


async def tiny_requests(server, rate, seconds):
    """Small whole replies at a fixed rate, whatever the server does; the time of each from when it was due."""
    idle, times, refused = asyncio.Queue(), [], []

    async def one(due):
        connection = idle.get_nowait() if not idle.empty() else await asyncio.open_connection(server.host, server.port)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
        try:
            async for _ in server.ask(*connection, body):
                pass
        except Refused as answer:
            refused.append(answer)
            connection[1].close()
            return
        times.append(time.monotonic() - due)
        idle.put_nowait(connection)

    tasks, began = [], time.monotonic()
    for number in range(rate * seconds):
        due = began + number / rate
        await asyncio.sleep(max(0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    shown = ", ".join(f"p{int(q * 100)} {quantile(times, q) * 1e3:.1f} ms" for q in (0.5, 0.95, 0.99))
    print(f"{rate} tiny completions/s for {seconds} s on {server.name}, a model of 0.7 MB in its engine: {shown}")
    if refused:
        # More than the machine could do: then the times of the others say little.
        print(f"  {len(refused)} of {rate * seconds} were refused, the first with: {refused[0].args[0][-300:].decode()}")


def market_server(name, market):
    host, _, port = market.api.removeprefix("http://").removesuffix("/v1").rpartition(":")
    pids = [market.nodes[node]["pid"] for node in ("consumer", "provider-a")]
    return Server(name, host, int(port), market.model, pids)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("model", help="a GGUF file: Gemma 3, or one of `satgrid devnet tiny-model` to try this program")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", default="fast", choices=["fast", "exact"], help="of our engines; llama.cpp's server knows none")
    parser.add_argument("--seconds", type=int, default=TINY_SECONDS, help="of tiny completions")
    args = parser.parse_args()
    print(f"profile {args.profile}, threads {args.threads}, slots {SLOTS}, load average {os.getloadavg()[0]:.1f} over {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", LLAMA, args.model, str(args.threads), str(SLOTS), str(CONTEXT)]
        llama = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        common = ["--slots", str(SLOTS), "--threads", str(args.threads), "--profile", args.profile]
        try:
            address = llama.stdout.readline().strip()
            host, _, port = address.removeprefix("http://").rpartition(":")
            free = [*common, "--input-price", "0", "--output-price", "0"]
            paid = [*common, "--input-price", "1000000", "--output-price", "4000000"]
            with Market(args.binary, args.model, f"{folder}/free", *free) as unpaid_market:
                with Market(args.binary, args.model, f"{folder}/paid", *paid) as paid_market:
                    servers = [Server("llama.cpp", host, int(port), "any", [llama.pid])]
                    servers += [market_server("unpaid", unpaid_market), market_server("paid", paid_market)]
                    asyncio.run(side_by_side(servers, args.turns))
            tiny = f"{folder}/tiny-random.gguf"
            subprocess.run([args.binary, "devnet", "tiny-model", tiny], check=True)
            for name, prices in (("unpaid", free), ("paid", paid)):
                with Market(args.binary, tiny, f"{folder}/tiny-{name}", *prices) as market:
                    asyncio.run(tiny_requests(market_server(name, market), 200, args.seconds))
        finally:
            llama.kill()
            llama.wait()
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
