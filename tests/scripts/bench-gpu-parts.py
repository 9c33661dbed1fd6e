#!/usr/bin/env python3
"""Parts of models on graphics cards, paid: stages on one card or on several of one host, experts on a card, beside the whole
model on the same card in the same run. Every node is a process of its own, started from the shipped binary.

    bench-gpu-parts.py FOLDER [--devices CUDA0[,CUDA1]] [--shape llama-8b] [--moe moe-4b] [--streams 1,8] [--rounds N] [--only stages,experts]

FOLDER is what `make build-gpu` made. Needs no network, no Rust and nothing but Python's own library: the models have random
weights and are written on the spot. The lead and the whole model are on the first device; the workers take the devices in
turn, from the second on where there are several. Prints a table in Markdown.
"""

import argparse
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

TOKENS = 128
# Of the prompt; the random vocabulary has a token for each byte.
WORDS = "The history of money is a history of trust. " * 3
# In msat per million: a hundredth of what the demo asks, so that slices fall due as seldom as at a real card's prices.
LAYERS, ROWS, ASKS = 10_000, 10_000, (1_000_000, 4_000_000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--devices", default="CUDA0")
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--moe", default="moe-4b")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="stages,experts")
    parser.add_argument("--dir", default=".bench-gpu-parts")
    args = parser.parse_args()
    # The market's module looks for the program when it is loaded.
    os.environ["SATGRID_BIN"] = os.path.join(os.path.abspath(args.folder), "satgrid")
    import expert_market
    import ring_market

    devices = args.devices.split(",")
    others = devices[1:] or devices

    def place(worker):
        device = devices[0] if worker is None else others[worker % len(others)]
        return f'profile = "fast"\ndevice = "{device}"\n'

    def body(nth):
        text = f"{nth:06d} {WORDS}"
        return {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"0": -100, "1": -100, "2": -100}}

    count = iter(range(10**6))

    def crowd(market, node, streams):
        """So many answers at once: tokens per second in all, from the first request to the last piece."""
        bodies = [body(next(count)) for _ in range(streams)]
        began = time.perf_counter()
        done = ring_market.together(market, node, bodies)
        return sum(one.tokens for one in done) / (time.perf_counter() - began)

    def compare(market, what):
        """Turn and turn about, after a round that is not counted and brings the slices to size."""
        lead, solo = market.leads[0], market.solo
        for node in (solo, lead):
            for _ in range(2):
                crowd(market, node, 1)
        asked = body(next(count))
        same = ring_market.Stream(market, solo, asked).text == ring_market.Stream(market, lead, asked).text
        for streams in map(int, args.streams.split(",")):
            rates = {node.name: [] for node in (solo, lead)}
            for _ in range(args.rounds):
                for node in (solo, lead):
                    rates[node.name].append(crowd(market, node, streams))
            whole, split = (statistics.median(rates[node.name]) for node in (solo, lead))
            shown = ", ".join(f"{rate:.0f}" for rate in rates[lead.name])
            say(f"| {what} | {streams} | {whole:.0f} | {split:.0f} ({shown}) | {split / whole:.2f} | {'yes' if same else 'no'} |")

    rows = []

    def say(row):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    def over(market, what):
        market.start()
        compare(market, what)
        time.sleep(2)
        clean = market.verify()
        ring_market.stop_all()
        return clean

    def random(shape):
        path = os.path.abspath(os.path.join(args.dir, f"{shape}.gguf"))
        if not os.path.exists(path):
            ring_market.run("models", "random", shape, "--out", path)
        return path

    ring_market.folder(args.dir, "satgrid-bench-gpu-parts")
    clean, shape = True, {"slots": 16, "context": 2048, "threads": min(8, os.cpu_count() or 1)}
    if "stages" in args.only:
        model = random(args.shape)
        for workers in map(int, args.workers.split(",")):
            dir = ring_market.folder(os.path.join(args.dir, f"ring-{workers}"), "satgrid-bench-gpu-parts")
            market = ring_market.Market(dir, ring_market.Parts(model, dir, workers), [LAYERS] * workers, asks=ASKS, place=place, **shape)
            clean &= over(market, f"{args.shape}, a lead and {workers} stage{'s' * (workers > 1)}, {args.devices}")
    if "experts" in args.only:
        model = random(args.moe)
        dir = ring_market.folder(os.path.join(args.dir, "experts"), "satgrid-bench-gpu-parts")
        asks = f"price_in_msat_per_mtok = {ASKS[0]}\nprice_out_msat_per_mtok = {ASKS[1]}\n"
        market = expert_market.ExpertMarket(dir, expert_market.Packs(model, dir, 2), [ROWS] * 2, asks=asks, place=place, **shape)
        clean &= over(market, f"{args.moe}, a lead and 2 packs of experts, {args.devices}")
    print("| what | streams | whole on the first card, tokens/s | in parts (each round) | ratio | same text |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"every ledger clean: {'yes' if clean else 'NO'}")
    return 0 if clean else 1


def run():
    import ring_market

    ring_market.run_script(main)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        os.environ["SATGRID_BIN"] = os.path.join(os.path.abspath(sys.argv[1]), "satgrid")
    run()
