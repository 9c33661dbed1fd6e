#!/usr/bin/env python3
"""The figures of docs/benchmarks/gpu.md, all from one run: bench-gpu.py FOLDER [--shape llama-8b] [--device CUDA0]

FOLDER is what `make build-gpu` made. Needs no network, no Rust and nothing but Python's own library. The model has random
weights of a real shape and is written on the spot. Everything paid goes through the OpenAI API of a whole market on this
machine (chain, relay, two providers, gateway: `satgrid devnet demo`), with slices over real channels; the yardstick is the
same engine with nothing around it, on the same card and file, in the same run, before and after.
"""
import argparse
import http.client
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 128
PORT = 8402
# One engine's rounds, one after another, as the paid ones are; the median counts.
BARE_ROUNDS = 3


def say(text):
    print(text, flush=True)


def devices(satgrid):
    out = subprocess.run([satgrid, "engine-worker", "--devices", "list"], capture_output=True, text=True, check=True)
    return [line.split("\t") for line in out.stdout.splitlines()]


def bare(satgrid, args, streams, prompt, output, turns=BARE_ROUNDS):
    command = [satgrid, "engine-worker", "--bare-streams", streams, "--bare-prompt", prompt, "--bare-output", output,
               "--model", args.model, "--profile", "fast", "--threads", args.threads, "--slots", max(streams, 1),
               "--context", 2048, "--device", args.device, "--bare-rounds", turns]
    begin = time.monotonic()
    # Large pages, as the node gives its engine.
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    wall = time.monotonic() - begin
    if done.returncode:
        sys.exit(f"the bare engine failed: {done.stderr[-2000:]}")
    rounds = []
    for line in done.stdout.splitlines():
        if line.startswith("bare "):
            total, decode, _, *first = (float(part) for part in line.split()[1:])
            rounds.append((total, decode, statistics.median(first)))
    total, decode, first = (statistics.median(column) for column in zip(*rounds))
    return {"tokens_per_s": total, "decode_per_s": decode, "first_ms": first, "process_s": wall}


def stream(model, nth, result):
    """One paid completion; a prompt of its own, so that no prefix is shared."""
    text = f"{nth:04d}" + "".join(chr(33 + (i * 7 + nth * 13) % 90) for i in range(PROMPT_TOKENS - 6))
    body = json.dumps({"model": model, "stream": True, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
                       "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": text}]})
    link = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    begin = time.monotonic()
    link.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = link.getresponse()
    if response.status != 200:
        result.append(("error", response.status, response.read()[:500]))
        return
    first, usage = None, None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("error"):
            result.append(("error", 200, json.dumps(event["error"])))
            return
        usage = event.get("usage") or usage
        if first is None and event.get("choices"):
            # The first chunk with text; the one before it only names the role.
            delta = event["choices"][0].get("delta", {})
            first = time.monotonic() if delta.get("content") else None
    result.append(("ok", begin, first, time.monotonic(), usage))


def paid(model, streams, base):
    result, threads = [], []
    for nth in range(streams):
        threads.append(threading.Thread(target=stream, args=(model, base + nth, result)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [one for one in result if one[0] == "error"]
    if failed:
        sys.exit(f"{len(failed)} of {streams} paid streams failed, the first: {failed[0]}")
    begin, end = min(one[1] for one in result), max(one[3] for one in result)
    tokens = sum(one[4]["completion_tokens"] for one in result)
    prompts = [one[4]["prompt_tokens"] for one in result]
    first = sorted((one[2] - one[1]) * 1000 for one in result if one[2])
    # Two providers on one card share it: figures of such a round are of something else.
    sellers = {one["provider"] for done in result for one in done[4]["cost_details"]["providers"]}
    return {"tokens_per_s": tokens / (end - begin), "first_ms": statistics.median(first) if first else float("nan"),
            "tokens": tokens, "prompt": prompts[0], "cost_msat": sum(one[4]["cost_msat"] for one in result),
            "sellers": len(sellers)}


def show(what, streams, run):
    figures = "  ".join(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in run.items())
    say(f"{what:7} {streams:3} streams  {figures}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--device", default="CUDA0")
    parser.add_argument("--threads", default=str(min(8, os.cpu_count() or 1)))
    parser.add_argument("--streams", default="1,32")
    parser.add_argument("--price", type=int, default=1_000_000, help="msat per million tokens read; four times that written")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    satgrid = str(args.folder / "satgrid")
    work = pathlib.Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    args.model = str(work / f"{args.shape}.gguf")
    for device in devices(satgrid):
        say(f"device  {device[0]} ({device[1]}): {device[5]}, {int(device[3]) >> 20} of {int(device[4]) >> 20} MiB free")
    begin = time.monotonic()
    subprocess.run([satgrid, "models", "random", args.shape, "--out", args.model], check=True, stderr=subprocess.DEVNULL)
    say(f"model   {os.path.getsize(args.model) / 1e9:.2f} GB of random weights in {time.monotonic() - begin:.1f} s")
    start = bare(satgrid, args, 1, 1, 1, turns=1)
    say(f"start   a process from nothing to its first token: {start['process_s']:.1f} s")

    counts = [int(n) for n in args.streams.split(",")]
    yard = {n: [bare(satgrid, args, n, PROMPT_TOKENS, OUTPUT_TOKENS)] for n in counts}
    for n in counts:
        show("bare", n, yard[n][0])

    log = open(work / "demo.log", "w")
    demo = subprocess.Popen([satgrid, "devnet", "demo", "--keep", "--model", args.model, "--profile", "fast", "--default-acks", "--input-price", str(args.price),
                             "--output-price", str(4 * args.price), "--slots",
                             str(max(counts)), "--dir", str(work / "demo"), "--port", str(PORT)], stderr=log, stdout=log)
    try:
        begin = time.monotonic()
        while "left running" not in (work / "demo.log").read_text():
            if demo.poll() is not None or time.monotonic() - begin > 240:
                sys.exit("the market did not come up:\n" + (work / "demo.log").read_text()[-3000:])
            time.sleep(0.2)
        say(f"market  up in {time.monotonic() - begin:.1f} s")
        smi = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
        try:
            say("memory  " + subprocess.run(smi, capture_output=True, text=True).stdout.replace("\n", "; "))
        except FileNotFoundError:
            say("memory  (no nvidia-smi here)")
        paid(args.shape, 1, 9000)  # opens the session
        for n in counts:
            runs = [paid(args.shape, n, 100 * (i + 1) + n) for i in range(args.rounds)]
            for run in runs:
                show("paid", n, run)
            yard[n].append(bare(satgrid, args, n, PROMPT_TOKENS, OUTPUT_TOKENS))
            show("bare", n, yard[n][1])
            rate, first = (statistics.median(run[key] for run in runs) for key in ("tokens_per_s", "first_ms"))
            mark, mark_first = (statistics.mean(one[key] for one in yard[n]) for key in ("tokens_per_s", "first_ms"))
            say(f"RATIO   {n:3} streams  paid/bare tokens/s {rate / mark:.3f}, first token {first - mark_first:+.1f} ms")
    finally:
        demo.send_signal(signal.SIGINT)
        try:
            demo.wait(60)
        except subprocess.TimeoutExpired:
            demo.kill()
        out = os.environ.get("OUT")
        if out:
            (pathlib.Path(out) / "demo.log").write_text((work / "demo.log").read_text())


if __name__ == "__main__":
    main()
