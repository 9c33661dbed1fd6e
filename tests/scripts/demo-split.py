#!/usr/bin/env python3
"""A model over several machines, paid: three workers that sell layers, a lead that buys them and sells answers, a consumer,
and a node that sells the whole model, for comparison. Each is a process of its own, started from the shipped binary.

    demo-split.py [--model FILE] [--dir DIR] [--kill [--then-engine]] [--slow] [--draft FILE] [--tokens N]

Exit 0: the answer of the ring is the answer of one machine, and every ledger is clean.
"""

import argparse
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ring_market import Market, Parts, Slowed, Stream, dies, fail, folder, run, run_script, say

PROMPT = "The history of money is a history of trust. At first people traded goods for goods. Later they"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", default=".demo-split")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of the answer")
    parser.add_argument("--then-engine", action="store_true", help="with --kill: then, under another answer, the engine of who took over, alone with its layers by then")
    parser.add_argument("--slow", action="store_true", help="first make a worker much slower than it lists: it is measured, told and replaced")
    parser.add_argument("--draft", metavar="FILE", help="a small model of the same vocabulary that guesses for the lead")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-demo-split")
    parts = Parts(args.model, dir, 3)
    prices = [2_000_000, 1_500_000, 3_000_000]
    leads = {"lead": f'draft = "{os.path.abspath(args.draft)}"\n'} if args.draft else None
    market = Market(dir, parts, prices, spare=1 if args.kill or args.slow else None, leads=leads)
    market.start()
    lead, workers = market.leads[0], market.workers
    plan(lead, workers, parts.ranges, prices, parts.layers)
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": args.tokens, "temperature": 0.7, "seed": 42}

    struck = []

    def answer(node, kill=None):
        say(f"the answer of {node.name}:")

        def heard(pieces):
            if kill and pieces >= args.tokens // 3 and not struck:
                struck.append(time.time())
                kill.killed = True
                kill.child.send_signal(signal.SIGKILL)
                say(f"{kill.name} killed (SIGKILL) after {pieces} pieces")

        stream = Stream(market, node, body, heard)
        print(f"    {PROMPT}{stream.text}\n", file=sys.stderr)
        say(f"{stream.tokens} tokens, longest pause {stream.longest_gap_s():.1f} s, {stream.usage['cost_msat']} msat")
        return stream

    alone = answer(market.solo)
    # The second of the three that the lead has chosen: the spare may be the faster one.
    with open(lead.log) as log:
        planned = next(line for line in log if "the ring is planned" in line)
    second = next(worker for worker in [workers[1], workers[-1]] if worker.status["node_key"][:8] in planned)
    slow = None
    if args.slow:
        slow = measured(market, lead, second, answer)
        second = next(worker for worker in [workers[1], workers[-1]] if worker is not second)
    split = answer(lead, second if args.kill else None)
    if slow and (not slow["same"](alone) or lead.noticed("a slow worker gives way") == float("inf")):
        fail(f"the slow worker kept its place, or changed the text: {slow}")
    died = None
    if args.kill and args.then_engine:
        # Who took over is alone with its layers now.
        heir = next(worker for worker in [workers[1], workers[-1]] if worker is not second)
        told = dies(heir, lambda heard: Stream(market, lead, body, heard), args.tokens // 3)
        with open(lead.log) as log:
            lost = [line for line in log if "rows were lost under way" in line]
        died = {"told": told, "accounted": len(lost)}
    time.sleep(2)
    clean = market.verify()
    same = alone.text == split.text
    say("the ring and the single machine gave the same text" if same else f"DIFFERENT TEXTS:\n{alone.text!r}\n{split.text!r}")
    noticed = lead.noticed("a worker was lost") - struck[0] if struck else None
    if struck:
        say(f"the loss was noticed after {noticed:.2f} s; the stream's longest pause was {split.longest_gap_s():.2f} s")
    found = {"same": same, "clean": clean, "noticed_s": noticed, "longest_pause_s": split.longest_gap_s()}
    found |= {"died": died} if died else {}
    found |= {"slow": {"told": slow["told"], "next": slow["next"]}} if slow else {}
    print(json.dumps(found | {"text": split.text, "usage": split.usage, "root": parts.root, "dir": dir}, indent=2))
    return 0 if same and clean else 1


def measured(market, lead, worker, answer):
    """An answer with a worker that is far slower than it lists, and what the lead says of it then."""
    asked = lambda: json.loads(run("--config", lead.config, "--format", "json", "market", "why", market.name))
    # A pause at each millisecond of its own: its layers take several of them, and so much longer than the whole plan.
    slowed = Slowed(worker, max(0.03, asked()["plan"]["token_us"] / 1e6))
    say(f"{worker.name} is much slower than it lists from now on")
    try:
        # A busy machine lists less and is measured at more: a ring listens again every five seconds, and takes a word back. The
        # longest round takes two answers and a half, and half a minute lies between two: there is time for a second one.
        for _ in range(10):
            text = answer(lead).text
            time.sleep(1)  # figures are on the disk
            why = asked()
            told = next(one for one in why["considered"] if one["worker"] == worker.status["node_key"])
            noticed = told["measured"] and told["measured"]["token_us"] > 2 * told["listed_us"]
            others = {one["worker"]: one["measured"] for one in why["considered"] if one is not told and one["measured"]}
            honest = not any(one["lies"] for one in others.values())
            if noticed and honest:
                break
    finally:
        slowed.end()
    if not noticed:
        fail(f"nobody noticed that {worker.name} is slower than it lists: {told}")
    say(f"market why: {told['verdict']}: {told['why']}")
    if told["verdict"].startswith("worker"):
        fail(f"a plan made now would still take {worker.name}")
    if not honest:
        fail(f"an honest worker was taken for slow: {others}")
    return {"told": told["why"], "next": why["plan"], "same": lambda alone: alone.text == text}


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
    run_script(main)
