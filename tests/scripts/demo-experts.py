#!/usr/bin/env python3
"""A mixture of experts over several machines, paid: workers that sell experts, a lead that has the trunk, buys them and sells
answers, a consumer, and a node that sells the whole model, for comparison. Each is a process of its own, started from the
shipped binary, with its own wallet and ledger.

    demo-experts.py [--dir DIR] [--kill [--then-engine] | --lie] [--stage] [--tokens N] [--wire f32|bf16|q8_0] [--model FILE]

The model is a tiny random one, made here, where no other is named: what it says means nothing, and every bit of it counts.
Exit 0: the answer over the workers is the answer of one machine, and every ledger is clean.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from expert_market import ExpertMarket, Packs, engines, spoil, weights
from ring_market import SAT, Stream, dies, fail, folder, run, run_script, say, until

PROMPT = "The history of money is a history of trust. At first people traded goods for goods. Later they"
# In msat per million expert rows.
PRICES = [1_000_000, 1_500_000, 800_000]
# Pieces of the answer after which a worker is killed.
KILL_AFTER = 6
# Figures are on the disk after this.
KEPT_WITHIN_S = 3


def explained(market):
    """What `satgrid market why` says at the lead. Nothing while listings are missing: it asks the relays anew each time."""
    asked = ["--config", market.leads[0].config, "--format", "json", "market", "why", market.name]
    done = subprocess.run([SAT, *asked], capture_output=True, text=True)
    if done.returncode:
        say(f"not yet: {done.stderr.strip()[-300:]}")
    return None if done.returncode else json.loads(done.stdout)


def placement(market, packs):
    """What the lead counted and measured, who serves for it, and packs that would be equally busy."""
    lead = market.leads[0]
    say("what the lead counted and measured: satgrid market why")
    why = until("a plan over what was counted", lambda: explained(market))
    print(subprocess.run([SAT, "--config", lead.config, "market", "why", market.name], capture_output=True, text=True).stdout, file=sys.stderr)
    if not why["counted_rows"] or not all(one["measured"] for one in why["considered"] if one["verdict"] == "serves"):
        fail(f"nothing was counted, or a worker that serves was not measured: {why}")
    split = ["--config", lead.config, "--format", "json", "models", "split", packs.model, "--experts", "--packs", len(PRICES)]
    busiest = {"even": 0, "by heat": 0, "by heat, two hot ones copied": 0}
    for name, more in zip(busiest, ([], ["--by-heat"], ["--by-heat", "--copies", 2])):
        # An even deal's load by the same figures: what was counted on the packs as they are.
        cut = json.loads(run(*split, *more, "--out", os.path.join(market.dir, "again")))
        busiest[name] = cut["busiest_permille"]
    say(f"the busiest pack of any layer has of its rows, in thousandths: {busiest}")
    return {"why": why, "busiest_permille": busiest}


def after_the_lie(market, liar, spoilt, ask):
    """What is left of a worker that lied: its name in the lead's ledger, and no work."""
    if not spoilt or not spoilt[0]:
        fail("no weights were found in the worker's memory")
    # Who buys the experts finds it out.
    buyer = (market.stages or market.leads)[0]
    ledger = os.path.join(buyer.dir, "ledger.sqlite")
    kept = lambda: json.loads(run("ledger", "misbehaviour", "--format", "json", "--db", ledger))
    for _ in range(3):
        time.sleep(1)
        if kept():
            break
        # On a busy machine an answer may be over before its pieces are read.
        ask()
    kept = until("the liar's name in the ledger", kept)
    named = [one for one in kept if one["rule"] == "wrong-rows"]
    if [one["peer"] for one in named] != [liar.status["node_key"]]:
        fail(f"others were named, or nobody: {kept}")
    say(f"the ledger names {liar.name} ({named[0]['peer'][:8]}) for wrong rows, with the question and both answers ({named[0]['bytes']} bytes)")
    time.sleep(2)
    before = market.earned()[liar.name]
    again = ask()
    time.sleep(2)
    if market.earned()[liar.name] != before:
        fail(f"{liar.name} was ordered and paid again")
    say(f"the next answer ordered nothing of {liar.name}")
    return {"peer": named[0]["peer"], "entry": named[0]["entry"], "text": again.text}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--dir", default=".demo-experts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--wire", default="f32")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of the answer")
    parser.add_argument("--then-engine", action="store_true", help="with --kill: then, under another answer, the engine of one whose experts nobody else has")
    parser.add_argument("--stage", action="store_true", help="layers and experts: the lead buys the middle layers of a stage, and the stage buys their experts")
    parser.add_argument("--lie", action="store_true", help="spoil a worker's weights in its memory in the middle of the answer; every row has a witness")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-demo-experts")
    model = args.model or os.path.join(dir, "tiny-moe.gguf")
    if not args.model:
        run("devnet", "tiny-moe", model)
    prices = PRICES[:2] if args.stage else PRICES
    packs = Packs(model, dir, len(prices), args.stage)
    # A liar needs a second holder to be seen, and somebody who knows to be told from it: the lead has all experts on its disk.
    lies = {"witness": 1_000_000, "judge": packs.all()} if args.lie else {}
    market = ExpertMarket(dir, packs, prices, spare=1 if args.kill or args.lie else None, wire=args.wire, **lies)
    market.show_map()
    market.start()
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": args.tokens, "temperature": 0.7, "seed": 42}
    victim = market.workers[1]

    def strike(pieces):
        if pieces >= KILL_AFTER and not victim.killed:
            victim.killed = True
            victim.child.send_signal(signal.SIGKILL)
            say(f"{victim.name} killed (SIGKILL) after {pieces} pieces of the answer")

    spoilt, [pid] = [], engines(victim)
    found = weights(pid, packs.files[1]["path"]) if args.lie else []

    def lie(pieces):
        if pieces >= KILL_AFTER and not spoilt:
            spoil(pid, found)
            spoilt.append(8 * len(found))
            say(f"{spoilt[0]} weights of {victim.name} changed in its memory after {pieces} pieces of the answer")

    def answer(node, heard=None):
        say(f"the answer of {node.name}:")
        stream = Stream(market, node, body, heard)
        print(f"    {stream.text!r}\n", file=sys.stderr)
        cost = stream.usage["cost_msat"]
        say(f"{stream.tokens} tokens, {stream.token_ms():.1f} ms each, longest gap {stream.longest_gap_s():.1f} s, {cost} msat")
        return stream

    alone = answer(market.solo)
    lead = market.leads[0]
    over = answer(lead, strike if args.kill else lie if args.lie else None)
    caught = {}
    if args.lie:
        caught = after_the_lie(market, victim, spoilt, lambda: answer(lead))
    if args.kill and not victim.killed:
        fail("the answer was over before the worker was killed: ask for more --tokens")
    # Workers' receipts come before the lead's own, and everything is in the ledgers a moment later.
    time.sleep(KEPT_WITHIN_S)
    placed = {} if args.stage else placement(market, packs)
    died = None
    if args.kill and args.then_engine:
        # The first worker's experts have no second holder.
        died = dies(market.workers[0], lambda heard: Stream(market, lead, body, heard), KILL_AFTER)
        time.sleep(KEPT_WITHIN_S)
    earned, clean = market.earned(), market.verify()
    same = alone.text == over.text and caught.get("text", alone.text) == alone.text
    if same:
        say("the workers together and the single machine gave the same text")
    else:
        say(f"DIFFERENT TEXTS:\n{alone.text!r}\n{over.text!r}")
    if args.wire != "f32":
        say(f"rows travelled as {args.wire}, which is not exact: texts may differ")
    print(json.dumps({"same": same, "clean": clean, "text": over.text, "usage": over.usage, "workers": earned, "caught": caught, "died": died, "placement": placed, "root": market.parts.root, "dir": dir}, indent=2))
    return 0 if clean and (same or args.wire != "f32") else 1


if __name__ == "__main__":
    run_script(main)
