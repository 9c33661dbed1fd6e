#!/usr/bin/env python3
"""A mixture of experts over several machines, paid: workers that sell experts, a lead that has the trunk, buys them and sells
answers, a consumer, and a node that sells the whole model, for comparison. Each is a process of its own, started from the
shipped binary, with its own wallet and ledger.

    demo-experts.py [--dir DIR] [--kill] [--tokens N] [--wire f32|bf16|q8_0] [--model FILE]

The model is a tiny random one, made here, where no other is named: what it says means nothing, and every bit of it counts.
Exit 0: the answer over the workers is the answer of one machine, and every ledger is clean.
"""

import argparse
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from expert_market import ExpertMarket, Packs
from ring_market import Stream, fail, folder, run, run_script, say

PROMPT = "The history of money is a history of trust. At first people traded goods for goods. Later they"
# In msat per million expert rows.
PRICES = [1_000_000, 1_500_000, 800_000]
# Pieces of the answer after which a worker is killed.
KILL_AFTER = 12


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--dir", default=".demo-experts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--wire", default="f32")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of the answer")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-demo-experts")
    model = args.model or os.path.join(dir, "tiny-moe.gguf")
    if not args.model:
        run("devnet", "tiny-moe", model)
    market = ExpertMarket(dir, Packs(model, dir, len(PRICES)), PRICES, spare=1 if args.kill else None, wire=args.wire)
    market.show_map()
    market.start()
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": args.tokens, "temperature": 0.7, "seed": 42}
    victim = market.workers[1]

    def strike(pieces):
        if pieces >= KILL_AFTER and not victim.killed:
            victim.killed = True
            victim.child.send_signal(signal.SIGKILL)
            say(f"{victim.name} killed (SIGKILL) after {pieces} pieces of the answer")

    def answer(node, heard=None):
        say(f"the answer of {node.name}:")
        stream = Stream(market, node, body, heard)
        print(f"    {stream.text!r}\n", file=sys.stderr)
        cost = stream.usage["cost_msat"]
        say(f"{stream.tokens} tokens, {stream.token_ms():.1f} ms each, longest gap {stream.longest_gap_s():.1f} s, {cost} msat")
        return stream

    alone = answer(market.solo)
    over = answer(market.leads[0], strike if args.kill else None)
    if args.kill and not victim.killed:
        fail("the answer was over before the worker was killed: ask for more --tokens")
    # Workers' receipts come before the lead's own, and everything is in the ledgers a moment later.
    time.sleep(2)
    earned, clean = market.earned(), market.verify()
    same = alone.text == over.text
    if same:
        say("the workers together and the single machine gave the same text")
    else:
        say(f"DIFFERENT TEXTS:\n{alone.text!r}\n{over.text!r}")
    if args.wire != "f32":
        say(f"rows travelled as {args.wire}, which is not exact: texts may differ")
    print(json.dumps({"same": same, "clean": clean, "text": over.text, "usage": over.usage, "workers": earned, "root": market.parts.root, "dir": dir}, indent=2))
    return 0 if clean and (same or args.wire != "f32") else 1


if __name__ == "__main__":
    run_script(main)
