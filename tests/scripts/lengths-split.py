#!/usr/bin/env python3
"""Prompts of many lengths through the paid ring, eight sessions at once, each held against one machine's text to the bit: a
lead, workers and everybody else are processes of the shipped binary. With --kill a worker is killed while eight answer, with
--kill-engine the process that computes for it alone.

    lengths-split.py [--dir DIR] [--lengths 1,2,...,2000] [--tokens N] [--workers N] [--kill | --kill-engine]

Exit 0: every answer is the one of one machine, and every ledger is clean.
"""

import argparse
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ring_market import Market, Parts, engines, folder, run, run_script, say, together

AT_ONCE = 8
# The end of an answer in the vocabulary of random models.
END = "2"
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 127, 129, 255, 256, 257, 400, 511, 512, 513, 700, 1000, 1500, 1999, 2000]


def ids(seed, length):
    """Token ids without much repetition, none of them a control token or a byte of a random model's vocabulary."""
    state, out = seed * 2_654_435_761 % 2**32, []
    for _ in range(length):
        state = (state * 1_664_525 + 1_013_904_223) % 2**32
        out.append(300 + (state >> 9) % 1_700)
    return out


def asked(number, length, tokens):
    """Raw prompts of exactly so many tokens; every other answer is drawn greedily, and none may end early."""
    return {"prompt": ids(number, length), "logit_bias": {END: -100}, "max_tokens": tokens, "temperature": 0.0 if number % 2 else 0.9, "seed": number}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", default=".lengths-split")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kill", action="store_true", help="kill the second worker while eight answers are under way")
    parser.add_argument("--kill-engine", action="store_true", help="the same with its engine's process alone: the worker itself gives its receipts")
    args = parser.parse_args()
    args.kill |= args.kill_engine
    dir = folder(args.dir, "satgrid-lengths-split")
    model = os.path.join(dir, "deep.gguf")
    run("models", "random", "llama-deep", "--layers", args.layers, "--out", model)
    context = max(args.lengths) + args.tokens + 64
    prices = [1_000_000, 1_100_000, 1_200_000][: args.workers]
    market = Market(dir, Parts(model, dir, args.workers), prices, spare=1 if args.kill else None, slots=AT_ONCE, context=context, asks=(1_000_000, 4_000_000))
    market.start()
    lead = market.leads[0]
    bodies = [asked(number, length, args.tokens) for number, length in enumerate(args.lengths)]
    while len(bodies) < AT_ONCE:
        bodies.append(asked(len(bodies), args.lengths[len(bodies) % len(args.lengths)], args.tokens))
    same, counted, struck, noticed = True, [], [], None
    for from_ in range(0, len(bodies), AT_ONCE):
        group = bodies[from_ : from_ + AT_ONCE]
        last = from_ + AT_ONCE >= len(bodies)
        pieces = []

        def heard(_):
            pieces.append(1)
            # Eight streams are answering.
            if args.kill and last and len(pieces) == AT_ONCE * 2 and not struck:
                struck.append(time.time())
                kill.killed = not args.kill_engine
                for pid in engines(kill) if args.kill_engine else [kill.child.pid]:
                    os.kill(pid, signal.SIGKILL)
                what = ", its engine alone," if args.kill_engine else ""
                say(f"{kill.name}{what} killed (SIGKILL)")

        if args.kill:
            with open(lead.log) as log:
                planned = next(line for line in log if "the ring is planned" in line)
            kill = next(worker for worker in [market.workers[1], market.workers[-1]] if worker.status["node_key"][:8] in planned)
        ring = together(market, lead, group, heard)
        solo = together(market, market.solo, group)
        for asked_, a, b in zip(group, ring, solo):
            counted.append(a.usage["prompt_tokens"])
            if (a.text, a.usage["prompt_tokens"], a.tokens) != (b.text, b.usage["prompt_tokens"], b.tokens):
                same = False
                say(f"DIFFERENT for a prompt of {len(asked_['prompt'])}:\n{a.text!r}\n{b.text!r}")
        say(f"{len(group)} at once: prompts of {counted[-len(group):]} tokens, {'the same as one machine' if same else 'DIFFERENT'}")
    again = computed = 0
    with open(lead.log) as log:
        for line in log:
            again += "rows that were kept are sent again" in line
            computed += "they are computed again" in line
    if struck:
        noticed = lead.noticed("a worker was lost") - struck[0]
        say(f"noticed after {noticed:.2f} s; {again} rebuilds from kept rows, {computed} of them late")
    time.sleep(2)
    clean = market.verify()
    print(json.dumps({"same": same, "clean": clean, "prompts": counted, "noticed_s": noticed, "rebuilds": again, "late": computed}))
    return 0 if same and clean and (not struck or again > computed) else 1


if __name__ == "__main__":
    run_script(main)
