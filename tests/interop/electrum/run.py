"""A Lightning node that we did not write: Debian's `electrum` on our regtest chain, over our server of its protocol.

It opens a channel to a satgrid node, pays its invoices, is paid, and closes. Needs `electrum` (apt-get install electrum) and
the built `satgrid` (SATGRID_BIN). Exit 0 if everything held, 77 if electrum is missing, else 1.

Electrum 4.3.4 uses 180 sat/vB on regtest whatever its server estimates. LDK limits what it may lose to dust by its own
estimate, so the chain has to answer 180 too: with 1 sat/vB LDK closes the channel at Electrum's first update_fee.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

PATIENCE = 90
SAT = 100_000_000


def free_port() -> int:
    """Free a moment ago, and none that the system gives to connections on their way out."""
    while True:
        with socket.socket() as held:
            port = random.randrange(16_384, 32_768)
            try:
                held.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class World:
    def __init__(self, root: str):
        self.root, self.started = root, []
        self.satgrid = os.environ["SATGRID_BIN"]
        self.rpc, self.electrum_port, relay = free_port(), free_port(), free_port()
        self.listen, admin, api = free_port(), free_port(), free_port()
        self.spawn("chain", "devnet", "chain", "--listen", f"127.0.0.1:{self.rpc}", "--electrum",
                   f"127.0.0.1:{self.electrum_port}", "--fee-rate", "180")  # fmt: skip
        self.spawn("relay", "devnet", "relay", "--listen", f"127.0.0.1:{relay}")
        self.config = f"{root}/node.toml"
        self.run([self.satgrid, "--config", self.config, "--dir", f"{root}/node", "init", "--consumer"])
        with open(self.config, "w") as file:
            file.write(f"""
[node]
dir = "{root}/node"
network = "regtest"
roles = ["consumer"]
[api]
listen = "127.0.0.1:{api}"
admin = "127.0.0.1:{admin}"
[wallet]
chain = "esplora:http://127.0.0.1:{self.rpc}"
listen = "127.0.0.1:{self.listen}"
max_balance_sat = 1000000000000
[market]
relays = ["ws://127.0.0.1:{relay}"]
""")
        time.sleep(1)
        self.spawn("node", "--config", self.config, "up")

    def spawn(self, name: str, *args: str):
        log = open(f"{self.root}/{name}.log", "w")
        self.started.append(subprocess.Popen([self.satgrid, *args], stdout=log, stderr=log))

    def run(self, command: list, check=True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command[-4:])}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def wallet(self, *args: str):
        return json.loads(self.run([self.satgrid, "--config", self.config, "--format", "json", "wallet", *args]))

    def electrum(self, *args: str) -> str:
        return self.run(["electrum", "--regtest", "-D", f"{self.root}/electrum", *args])

    def mine(self, blocks: int, address: str):
        body = json.dumps({"id": 1, "method": "generatetoaddress", "params": [blocks, address]}).encode()
        urllib.request.urlopen(f"http://127.0.0.1:{self.rpc}/", body).read()

    def until(self, what: str, fits):
        since = time.time()
        while True:
            try:
                found = fits()
            except (RuntimeError, ValueError):
                found = None
            if found:
                print(f"{time.time() - since:6.1f} s  {what}", flush=True)
                return found
            if time.time() - since > PATIENCE:
                raise SystemExit(f"never: {what}")
            time.sleep(0.5)

    def stop(self):
        subprocess.run(["electrum", "--regtest", "-D", f"{self.root}/electrum", "stop"], capture_output=True)
        for process in reversed(self.started):
            process.terminate()
            process.wait(30)


def usable(world):
    ours = [c for c in world.wallet("channels") if c["usable"]]
    theirs = [c for c in json.loads(world.electrum("list_channels")) if c["state"] == "OPEN" and c["peer_state"] == "GOOD"]
    return ours and theirs and (ours[0], theirs[0])


def interop(world: World):
    node = world.until("the satgrid node is up", lambda: world.wallet("balance")["node"])
    world.electrum("--offline", "create")
    # Without gossip it speaks to trampolines only.
    settings = {"rpcport": free_port(), "rpcuser": "u", "rpcpassword": "p", "use_gossip": "true", "lightning_listen": f"127.0.0.1:{free_port()}"}
    for name, value in settings.items():
        world.electrum("--offline", "setconfig", name, str(value))
    # It stays, and would keep our pipes.
    subprocess.run(["electrum", "--regtest", "-D", f"{world.root}/electrum", "daemon", "-d", "-s", f"127.0.0.1:{world.electrum_port}:t", "--oneserver"],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE)  # fmt: skip
    world.until("electrum's wallet is open", lambda: world.electrum("load_wallet") == "true")
    theirs, ours = world.electrum("createnewaddress"), world.wallet("address")["address"]
    world.mine(1, theirs)
    world.mine(1, ours)
    world.mine(101, "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080")
    world.until("electrum has its coins, over our server of its protocol", lambda: json.loads(world.electrum("getbalance")).get("confirmed") == "50")
    world.until("the satgrid node has its coins", lambda: world.wallet("balance")["balance"]["onchain_confirmed_sat"] > 0)

    world.electrum("open_channel", f"{node}@127.0.0.1:{world.listen}", "0.02", "--push_amount", "0.005")
    world.mine(6, "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080")
    world.until("a channel that electrum opened is usable on both sides", lambda: usable(world))

    for amount in (10_000, 1_234, 150_000):
        invoice = world.wallet("receive", str(amount))
        paid = json.loads(world.electrum("lnpay", invoice["invoice"]))
        if not paid["success"]:
            raise SystemExit(f"electrum did not pay {amount} sat: {paid}")
        row = world.until(f"electrum paid our invoice over {amount} sat", lambda: next(
            (p for p in world.wallet("history") if p["payment_hash"] == invoice["payment_hash"] and p["state"] == "settled"), None))  # fmt: skip
        assert row["amount_msat"] == amount * 1000, row

    for amount in (20_000, 999):
        asked = json.loads(world.electrum("add_request", f"{amount / SAT:.8f}", "--memo", "interop"))
        bolt11 = asked.get("lightning_invoice") or asked.get("invoice") or asked["URI"].split("lightning=")[1]
        paid = world.wallet("pay", bolt11)
        assert paid["amount_msat"] == amount * 1000, paid
        print(f"        we paid electrum's invoice over {amount} sat", flush=True)

    mine, channel = usable(world)
    expect = 500_000 + 161_234 - 20_999
    assert mine["ours_msat"] == expect * 1000 and channel["remote_balance"] == expect, (mine, channel)
    world.electrum("close_channel", channel["channel_point"])
    before = world.wallet("balance")["balance"]["onchain_total_sat"]
    world.mine(6, "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080")
    world.until("electrum closed the channel by agreement, and our share is on chain", lambda: not world.wallet("channels") and
                world.wallet("balance")["balance"]["onchain_total_sat"] - min(before, 50 * SAT) in range(expect - 1, expect + 1))  # fmt: skip


def main() -> int:
    if not shutil.which("electrum"):
        print("skipped: electrum is not installed (apt-get install electrum)")
        return 77
    with tempfile.TemporaryDirectory() as root:
        world = World(root)
        try:
            interop(world)
        except BaseException:
            for name in ("node", "chain"):
                with open(f"{root}/{name}.log") as file:
                    print(f"--- {name}", *file.read().splitlines()[-15:], sep="\n", file=sys.stderr)
            raise
        finally:
            world.stop()
    print("electrum and satgrid agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
