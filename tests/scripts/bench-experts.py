#!/usr/bin/env python3
"""What a split by experts costs: a lead and three paid workers beside one machine with the whole model, in one run. Streams over
the consumer's endpoint; links with a delay; bytes on the links counted by the proxy that delays them.

    bench-experts.py [--rtt 0,1,5] [--batch 1,8] [--rounds N] [--tokens N]

All nodes share this machine's cores, solo has them to itself: ratios compare whole systems, not engines.
"""

import argparse
import importlib
import json
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from expert_market import ExpertMarket, Packs
from ring_market import Stream, fail, folder, run, run_script, say

split = importlib.import_module("bench-split")
WORKERS = 3


def measure(args, market, links, shape, results):
    lead, solo = market.leads[0], market.solo
    for node in (solo, lead):
        Stream(market, node, split.body(1, 8))  # sessions, slices, tokenizer, hops
    for turn, r in enumerate(args.rtt):
        links.rtt(r)
        for batch in args.batch:
            rows = {"solo": [], "lead": [], "bytes": [], "load": []}
            for n in range(args.rounds):
                asked = [split.body(100_000 * turn + 1_000 * batch + 100 * n + at, args.tokens) for at in range(batch)]
                rows["load"].append(split.load())
                before = links.sent()
                alone, solo_streams = split.many(market, solo, asked)
                middle = links.sent()
                over, lead_streams = split.many(market, lead, asked)
                after = links.sent()
                for a, b in zip(solo_streams, lead_streams):
                    if a.text != b.text:
                        fail(f"the workers' text is not the machine's:\n{a.text!r}\n{b.text!r}")
                rows["solo"].append(alone)
                rows["lead"].append(over)
                tokens = sum(stream.tokens + stream.usage["prompt_tokens"] for stream in lead_streams)
                # Beside the customer's own stream, which solo has too.
                rows["bytes"].append((after[0] - 2 * middle[0] + before[0]) / (tokens * shape["layers"]))
            mid = {name: statistics.median(values) for name, values in rows.items()}
            over_us = 1e6 * (batch / mid["lead"] - batch / mid["solo"]) / shape["layers"]
            row = {"rtt_ms": r, "batch": batch, "solo_tok_s": mid["solo"], "lead_tok_s": mid["lead"], "ratio": mid["lead"] / mid["solo"],
                   "us_per_layer_and_step": over_us, "bytes_per_token_and_layer": mid["bytes"], "load": mid["load"], "all": rows}
            results["rows"].append(row)
            say(f"r = {r} ms, {batch} streams: solo {mid['solo']:.1f}, workers {mid['lead']:.1f} tok/s ({row['ratio']:.2f}), {over_us:.0f} us a layer and step, {mid['bytes']:.0f} bytes a token and layer; load {mid['load']:.1f}")


def table(results):
    out = ["| round trip, ms | streams | solo, tok/s | lead and workers, tok/s | ratio | us a layer and step beyond solo | bytes a token and layer | load |", "|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        out.append(f"| {row['rtt_ms']} | {row['batch']} | {row['solo_tok_s']:.1f} | {row['lead_tok_s']:.1f} | {row['ratio']:.2f} | {row['us_per_layer_and_step']:.0f} | {row['bytes_per_token_and_layer']:.0f} | {row['load']:.1f} |")
    return "\n".join(out)


def main():
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rtt", type=numbers, default=[0, 1, 5])
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--expert-width", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--used", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", default=".bench-experts")
    parser.add_argument("--out")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-bench-experts")
    model = os.path.join(dir, "moe.gguf")
    shape = {"layers": args.layers, "width": args.width, "expert-width": args.expert_width, "experts": args.experts, "used": args.used}
    run("devnet", "tiny-moe", model, *(f"--{key}={value}" for key, value in shape.items()))
    links = split.Links(dir)
    # A tenth of the demo's prices: slices are paid, and are not what is measured.
    market = ExpertMarket(dir, Packs(model, dir, WORKERS), [100_000] * WORKERS, slots=max(8, *args.batch), threads=args.threads, door=links.door)
    links.start()
    market.start()
    results = {"shape": shape, "workers": WORKERS, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads, "cpus": os.cpu_count(), "rows": []}
    owners = min(WORKERS, args.used)
    say(f"one row up for each of at most {owners} owners and {args.used} rows down are {4 * args.width * (owners + args.used)} bytes")
    measure(args, market, links, shape, results)
    print(table(results))
    if not market.verify():
        fail("a ledger is not clean")
    if args.out:
        with open(args.out, "w") as out:
            json.dump(results, out, indent=1)
    return 0


if __name__ == "__main__":
    run_script(main)
