#!/usr/bin/env python3
"""Two leads buy the same layers of workers that hold two sequences each: every turn of a conversation takes the places of the
other lead's, whose rows have to be sent again. Each is a process of its own, started from the shipped binary.

    crowd-split.py --model FILE [--dir DIR] [--turns N] [--wire f32|bf16|q8_0]

Exit 0: with f32 every answer is the one of one machine; gaps came up; every ledger is clean.
"""

import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ring_market import Market, Parts, Stream, folder, run_script, say, together

SAID = ["Gold was heavy, so people wrote notes.", "And then the notes were trusted more.", "Who keeps the books?", "Go on."]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", default=".crowd-split")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--wire", default="f32")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-crowd-split")
    wire = f'wire = "{args.wire}"\n'
    leads = {"lead-a": wire, "lead-b": f"{wire}speculate = false\n"}
    market = Market(dir, Parts(args.model, dir, 2), [2_000_000, 1_500_000], leads=leads, slots=2)
    market.start()
    same, talks = True, {lead.name: [] for lead in market.leads}
    for turn in range(args.turns):
        for lead in market.leads:
            talk = talks[lead.name]
            talk.append({"role": "user", "content": SAID[turn % len(SAID)]})
            asked = {"messages": list(talk), "max_tokens": 16, "temperature": 0.8, "seed": turn}
            first, second = together(market, lead, [asked, asked | {"seed": turn + 50}])
            solo = Stream(market, market.solo, asked)
            fits = args.wire != "f32" or first.text == solo.text
            say(f"turn {turn + 1} of {lead.name}: {'one machine says the same' if fits else 'DIFFERENT'}")
            same &= fits and second is not None
            talk.append({"role": "assistant", "content": first.text})
    gaps = 0
    for lead in market.leads:
        with open(lead.log) as log:
            gaps += log.read().count("are missing before")
    time.sleep(2)
    clean = market.verify()
    print(json.dumps({"same": same, "clean": clean, "gaps": gaps}, indent=2))
    return 0 if same and clean and gaps else 1


if __name__ == "__main__":
    run_script(main)
