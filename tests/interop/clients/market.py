"""A market of real processes on a tiny random model, for clients that were written elsewhere.

`Market` starts `satgrid devnet demo --keep` (chain, relay, two providers, a consumer's gateway) and ends it again. Knows
nothing of what is asked of it.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading

READY_WITHIN = 300
ENDS_WITHIN = 60


def free_port():
    """Free a moment ago, and none that the system gives to connections on their way out."""
    while True:
        with socket.socket() as held:
            port = random.randrange(16_384, 32_768)
            try:
                held.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Market:
    """A running market; `api` ends in `/v1`. Use it in a `with`."""

    def __init__(self, binary, model, folder, *more):
        self.folder = folder
        self.port = free_port()
        self.log = open(f"{folder}.log", "wb")
        command = [binary, "devnet", "demo", "--keep", "--format", "json", "--max-tokens", "16", "--default-acks"]
        command += ["--model", model, "--port", str(self.port), "--dir", folder, *more]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SATGRID_")}
        # A session of its own, so that a Ctrl-C at the terminal reaches it through `stop` alone.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, env=clean, start_new_session=True
        )
        late = threading.Timer(READY_WITHIN, self.process.kill)
        late.start()
        try:
            self.document = self._read_document()
        except BaseException:
            self.stop()
            raise
        finally:
            late.cancel()
        self.api = self.document["market"]["api"]
        self.model = self.document["market"]["model"]
        self.nodes = {node["name"]: node for node in self.document["market"]["nodes"]}

    def _read_document(self):
        text = b""
        for line in self.process.stdout:
            text += line
            if line.startswith(b"}"):
                return json.loads(text)
        self.process.wait()
        self.log.close()
        with open(self.log.name, encoding="utf-8", errors="replace") as log:
            sys.stderr.write(log.read())
        raise SystemExit("the market did not come up")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def main():
    """`market.py BINARY MODEL EMBEDDER FOLDER READY`: writes the gateway's address and both models into READY, and stays until
    SIGTERM."""
    binary, model, embedder, folder, ready = sys.argv[1:6]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # So cheap that a whole run fits into the demo's channels; and eight slots, as many as clients ask at once.
    prices = ["--input-price", "1000000", "--output-price", "4000000"]
    with Market(binary, model, folder, *prices, "--slots", "8", "--also", embedder) as market:
        with open(f"{ready}.new", "w", encoding="utf-8") as out:
            name = os.path.splitext(os.path.basename(embedder))[0].lower()
            out.write(f"{market.api} {market.model} {name}\n")
        os.rename(f"{ready}.new", ready)
        signal.pause()


if __name__ == "__main__":
    main()
