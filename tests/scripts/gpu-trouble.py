#!/usr/bin/env python3
"""What becomes of requests, money and the card when a graphics card fails its provider: memory that somebody else takes, an
engine that is killed, a card that is gone when the engine comes back. A provider on the card and a dearer one on the
processor sell the same model; every node is a process of its own, started from the shipped binary.

    gpu-trouble.py FOLDER [--device CUDA0] [--backend cuda] [--shape llama-1b]

FOLDER is what `make build-gpu` made; its backend's library is moved aside for a while, which is how a card that is gone
looks to an engine that starts. Memory is taken by a process of its own through the CUDA runtime (`libcudart`). Exit 0: every
stream came to its end, what was lost is what the rules allow, the card's memory was free again, every ledger is clean.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
if len(sys.argv) > 1:
    # The market's module looks for the program when it is loaded.
    os.environ["SATGRID_BIN"] = os.path.join(os.path.abspath(sys.argv[1]), "satgrid")

from ring_market import NOBODY, Market, Node, folder, run, run_script, say, serve, together, until  # noqa: E402

TOKENS = 160
WORDS = "The history of money is a history of trust. " * 10
# Takes all memory that the card has free, in ever smaller pieces, and holds it until it is ended.
HOG = """
import ctypes, glob, sys, time
names = ["libcudart.so", *sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"))]
for name in names:
    try:
        cuda = ctypes.CDLL(name)
        break
    except OSError:
        continue
else:
    sys.exit("no libcudart")
held, size = 0, 1 << 30
while size >= 1 << 20:
    pointer = ctypes.c_void_p()
    if cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0:
        held += size
    else:
        size //= 2
print(held >> 20, flush=True)
time.sleep(1e6)
"""


def on_card():
    """MiB that are taken on the first card, by the driver's own account."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0])


class Two(Market):
    """The same model on the card and, dearer, on the processor; one customer."""

    def __init__(self, dir, model, device):
        self.dir = dir
        self.name = os.path.splitext(os.path.basename(model))[0].lower()
        world = {"models": os.path.join(dir, "models"), "chain": serve(dir, "chain", "devnet", "chain"), "relay": serve(dir, "relay", "devnet", "relay")}
        self.chain = world["chain"]
        self.rpc("generatetoaddress", 1, NOBODY)

        def seller(name, device, price):
            return Node(dir, name, world, ["provider"], tables=(
                f'[[provider.models]]\npath = "{model}"\nalias = "{self.name}"\nprofile = "fast"\ndevice = "{device}"\n'
                f"price_in_msat_per_mtok = {price}\nprice_out_msat_per_mtok = {4 * price}\nslots = 8\ncontext = 2048\nthreads = 8\n"))

        self.workers = []
        self.solo, self.leads = seller("card", device, 1_000_000), [seller("processor", "cpu", 3_000_000)]
        shown = json.loads(run("--format", "json", "models", "show", model))
        catalogue = os.path.join(dir, "catalogue.toml")
        with open(catalogue, "w") as out:
            out.write("[[model]]\n" + "".join(f'{key} = "{value}"\n' for key, value in [
                ("name", self.name), *((key, shown[key]) for key in ("quantisation", "root", "tokenizer"))]))
        self.consumer = Node(dir, "consumer", world, ["consumer"], extra=f'catalogue = "{catalogue}"')

    def only(self, node, body):
        """Whoever is cheapest and there."""
        return {"model": self.name} | body


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--device", default="CUDA0")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--dir", default=".gpu-trouble")
    args = parser.parse_args()
    dir = folder(args.dir, "satgrid-gpu-trouble")
    model = os.path.join(dir, f"{args.shape}.gguf")
    run("models", "random", args.shape, "--out", model)
    free_before = on_card()
    market = Two(dir, model, args.device)
    market.start()
    card = market.solo
    engine = lambda: card.ask("status")["engines"][0]["process"]
    log = lambda: open(card.log).read()
    count = iter(range(10**6))

    def body(words):
        text = f"{next(count):06d} {words}"
        return {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0, "logit_bias": {"0": -100, "1": -100, "2": -100}}

    def crowd(streams, strike=None, words=WORDS):
        """So many at once; `strike` is called once, when the first of them has spoken for a while."""
        struck = threading.Lock()

        def heard(pieces):
            if strike and pieces >= 8 and struck.acquire(blocking=False):
                strike()

        done = together(market, None, [body(words) for _ in range(streams)], heard)
        legs = [len(one.usage["cost_details"]["providers"]) for one in done]
        say(f"{len(done)} of {streams} streams whole, {sum(one.tokens for one in done)} tokens, legs {legs}")

    say("1. as it should be")
    crowd(2)
    say(f"card: {on_card()} MiB taken")

    say("2. the engine is killed while two streams run")
    first = engine()
    crowd(2, lambda: os.kill(first, signal.SIGKILL))
    until("the engine again", lambda: engine() not in (None, first))
    say(f"the engine is back as process {engine()}; card: {on_card()} MiB taken")

    say("3. somebody else takes all of the card's memory while streams run, and longer prompts come")
    hogs = []

    def hog():
        child = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE, text=True)
        hogs.append(child)
        say(f"taken by somebody else: {child.stdout.readline().strip()} MiB; card: {on_card()} MiB taken")

    second = engine()
    crowd(2, hog)
    crowd(8, words=WORDS * 2)
    died = "the engine process ended" in log().split("engine is back", 1)[-1] and engine() != second
    say(f"the engine {'died for want of memory' if died else 'had all that it needed and went on'}; process {engine()}")
    if engine() is not None:
        # The memory that it would need again is taken too, once it is gone.
        os.kill(engine(), signal.SIGKILL)
        time.sleep(0.3)
    for child in hogs[:]:
        hog()
    until("a start that finds no memory", lambda: "the engine does not start again" in log(), 60)
    say("its own words: " + [line for line in log().splitlines() if "does not start again" in line][-1][-260:])
    crowd(2)
    for child in hogs:
        child.kill()
        child.wait()
    until("the engine with its memory", lambda: engine() is not None, 120)
    say(f"memory is free again and the engine is back; card: {on_card()} MiB taken")
    crowd(2)

    say("4. the card is gone when the engine comes back")
    library = os.path.join(os.path.abspath(args.folder), f"libggml-{args.backend}.so")
    os.rename(library, library + ".gone")
    try:
        os.kill(engine(), signal.SIGKILL)
        until("a start that finds no card", lambda: "there is no device" in log(), 60)
        say("its own words: " + [line for line in log().splitlines() if "there is no device" in line][-1][-260:])
        until("the listing's end", lambda: "the listing is withdrawn" in log(), 60)
        crowd(2)
    finally:
        os.rename(library + ".gone", library)
    until("the card's return", lambda: "listed again" in log(), 120)
    crowd(2)

    time.sleep(2)
    clean = market.verify()
    for seller in (card, market.leads[0]):
        seller.killed = True
        seller.child.terminate()
        seller.child.wait(30)
    until("the card's memory", lambda: on_card() <= free_before + 64, 30)
    say(f"the providers are stopped; card: {on_card()} MiB taken, {free_before} before all this")
    print(f"every stream whole, every ledger {'clean' if clean else 'NOT CLEAN'}")
    return 0 if clean else 1


if __name__ == "__main__":
    run_script(main)
