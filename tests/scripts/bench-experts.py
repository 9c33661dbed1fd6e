#!/usr/bin/env python3
"""What a split by experts costs: a lead and three paid workers beside one machine with the whole model, in one run. Streams over
the consumer's endpoint; links with a delay; bytes on the links counted by the proxy that delays them.

    bench-experts.py [--rtt 0.1,0.5,1,5] [--batch 1,8,32] [--rounds N] [--tokens N] [--width N] [--expert-width N] [--out FILE.json]

All nodes share this machine's cores, solo has them to itself: ratios compare whole systems, not engines.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from expert_market import ExpertMarket, Packs, engines, memory
from ring_market import Stream, fail, folder, run, run_script, say, together

split = importlib.import_module("bench-split")
WORKERS = 3
# Figures are on the disk after this.
KEPT_WITHIN_S = 3


def estimates(market, lead):
    """What `satgrid market why` says at the lead: tokens a second by batch, each worker's part, and what was counted."""
    why = json.loads(run("--config", lead.config, "--format", "json", "market", "why", market.name))
    by = {way["way"]: way["tokens_per_s"] for way in why["ways"]}
    return by, [one["share_permille"] / 1000 for one in why["considered"] if one["verdict"] == "serves"], why


def law(shape, shares):
    """Bytes of one row up for each owner and the chosen experts' rows down, on the mean over what the router chose."""
    owners = sum(1 - (1 - share) ** shape["used"] for share in shares)
    return 4 * shape["width"] * (owners + shape["used"])


def measure(args, market, links, shape, results):
    lead, solo = market.leads[0], market.solo
    for node in (solo, lead):
        Stream(market, node, split.body(1, 8))  # sessions, slices, tokenizer, hops
    for turn, r in enumerate(args.rtt):
        links.rtt(r)
        # The planner measures these links, with other prompts and other batches than those of the table.
        for n, batch in enumerate((1, 4, 16)):
            together(market, lead, [split.body(50_000 + 1_000 * turn + 100 * n + at, args.tokens // 2) for at in range(batch)])
        time.sleep(KEPT_WITHIN_S)
        planned, shares, _ = estimates(market, lead)
        for batch in args.batch:
            rows = {"solo": [], "lead": [], "bytes": [], "load": []}
            for n in range(args.rounds):
                rows["load"].append(split.load())
                # Prompts of many streams are read one after another: answers are to be longer than that takes.
                for attempt in range(4):
                    tokens = args.tokens << attempt
                    first = 100_000 * (turn + 1) + 1_000 * batch + 100 * n + 10_000 * attempt
                    # Random weights end an answer when they will: that token is barred.
                    asked = [split.body(first + at, tokens, logit_bias={split.END: -100}) for at in range(batch)]
                    before = links.sent()
                    solo_streams = together(market, solo, asked)
                    middle = links.sent()
                    lead_streams = together(market, lead, asked)
                    after = links.sent()
                    alone, over = split.rate(solo_streams), split.rate(lead_streams)
                    if alone and over:
                        break
                else:
                    fail(f"{batch} streams never ran at the same time: longer answers are needed")
                for a, b in zip(solo_streams, lead_streams):
                    if a.text != b.text:
                        fail(f"the workers' text is not the machine's:\n{a.text!r}\n{b.text!r}")
                rows["solo"].append(alone)
                rows["lead"].append(over)
                # A prompt's rows go through the last layer only where they are drawn from; the last token goes through none.
                passes = sum((s.tokens + s.usage["prompt_tokens"] - 1) * (shape["layers"] - 1) + s.tokens for s in lead_streams)
                # Beside the customer's own stream, which solo has too.
                rows["bytes"].append((after[0] - 2 * middle[0] + before[0]) / passes)
            mid = {name: statistics.median(values) for name, values in rows.items()}
            over_us = 1e6 * (batch / mid["lead"] - batch / mid["solo"]) / shape["layers"]
            estimate = planned["experts"].get(str(batch))
            row = {"rtt_ms": r, "batch": batch, "solo_tok_s": mid["solo"], "lead_tok_s": mid["lead"], "ratio": mid["lead"] / mid["solo"],
                   "us_per_layer_and_step": over_us, "estimate_tok_s": estimate, "bytes_per_token_and_layer": mid["bytes"],
                   "law_bytes": law(shape, shares), "load": mid["load"], "all": rows}
            results["rows"].append(row)
            says = f", estimated {estimate:.1f} ({estimate / mid['lead']:.2f})" if estimate else ""
            say(f"r = {r} ms, {batch} streams: solo {mid['solo']:.1f}, workers {mid['lead']:.1f} tok/s ({row['ratio']:.2f}){says}, {over_us:.0f} us a layer and step, {mid['bytes']:.0f} bytes a token and layer (law {row['law_bytes']:.0f}); load {mid['load']:.1f}")


def held(market):
    """What each node's engine holds in memory of its own, against its file."""
    rows = []
    for node, path in [*((w, pack["path"]) for w, pack in zip(market.workers, market.held)), (market.leads[0], market.parts.trunk["path"]), (market.solo, market.parts.model)]:
        size = os.path.getsize(path)
        mine = sum(memory(pid) for pid in engines(node))
        rows.append({"node": node.name, "file_bytes": size, "engine_bytes": mine, "ratio": mine / size})
    return rows


def table(results):
    out = [f"Model: {results['shape']}, F32; {results['workers']} workers, {results['threads']} thread(s) each, {results['cpus']} cores; {results['tokens']} tokens, {results['rounds']} round(s).", "",
           "| round trip, ms | streams | solo, tok/s | lead and workers, tok/s | ratio | estimate, tok/s | of measured | us a layer and step beyond solo | bytes a token and layer | of the law | load |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        estimate = row["estimate_tok_s"]
        told = f"{estimate:.1f} | {estimate / row['lead_tok_s']:.2f}" if estimate else "- | -"
        out.append(f"| {row['rtt_ms']} | {row['batch']} | {row['solo_tok_s']:.1f} | {row['lead_tok_s']:.1f} | {row['ratio']:.2f} | {told} | {row['us_per_layer_and_step']:.0f} | {row['bytes_per_token_and_layer']:.0f} | {row['bytes_per_token_and_layer'] / row['law_bytes']:.2f} | {row['load']:.1f} |")
    out += ["", "| node | file, MB | its engine's own memory, MB | ratio |", "|---|---|---|---|"]
    for row in results["memory"]:
        out.append(f"| {row['node']} | {row['file_bytes'] / 1e6:.1f} | {row['engine_bytes'] / 1e6:.1f} | {row['ratio']:.2f} |")
    return "\n".join(out)


def main():
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rtt", type=numbers(float), default=[0.1, 0.5, 1, 5])
    parser.add_argument("--batch", type=numbers(int), default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--used", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--direct", action="store_true", help="no proxy between the nodes: a round trip of 0, bytes not counted")
    parser.add_argument("--dir", default=".bench-experts")
    parser.add_argument("--out")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-bench-experts")
    model = os.path.join(dir, "moe.gguf")
    shape = {"layers": args.layers, "width": args.width, "expert-width": args.expert_width, "experts": args.experts, "used": args.used}
    run("devnet", "tiny-moe", model, *(f"--{key}={value}" for key, value in shape.items()))
    links = split.Links(dir, args.direct)
    args.rtt = [0.0] if args.direct else args.rtt
    # A tenth of the demo's prices: slices are paid, and are not what is measured.
    market = ExpertMarket(dir, Packs(model, dir, WORKERS), [100_000] * WORKERS, slots=max(16, *args.batch), threads=args.threads, door=links.door)
    links.start()
    market.start()
    results = {"shape": shape, "workers": WORKERS, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads, "cpus": os.cpu_count(), "rows": []}
    results["memory"] = held(market)
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
