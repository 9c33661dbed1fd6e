// A Nostr Wallet Connect client that is not ours (@getalby/sdk) against our wallet service. Exits 1 at the first thing
// that is not as NIP-47 says. Needs: the playground's line of JSON as the only argument.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
const require = createRequire(process.env.NWC_MODULES + "/");
if (!globalThis.WebSocket) globalThis.WebSocket = require("ws").WebSocket;
const { NWCClient } = require("@getalby/sdk");

const world = JSON.parse(process.argv[2]);
const [small, dear, third] = world.invoices;
const refused = async (code, promise) => {
  const error = await promise.then(() => assert.fail(`wanted ${code}`), (error) => error);
  assert.equal(error.code, code, String(error));
};

const spender = new NWCClient({ nostrWalletConnectUrl: world.spender });
const info = await spender.getInfo();
assert.equal(info.pubkey, world.node);
assert.equal(info.network, "regtest");
assert.ok(info.methods.includes("pay_invoice"));
const before = (await spender.getBalance()).balance;
assert.ok(before > 0);

const paid = await spender.payInvoice({ invoice: small });
assert.match(paid.preimage, /^[0-9a-f]{64}$/);
const again = await spender.payInvoice({ invoice: small });
assert.equal(again.preimage, paid.preimage, "the same invoice is paid once");
assert.equal((await spender.getBalance()).balance, before - 21_000);
const found = await spender.lookupInvoice({ invoice: small });
assert.deepEqual([found.state, found.type, found.amount], ["settled", "outgoing", 21_000]);

await refused("QUOTA_EXCEEDED", spender.payInvoice({ invoice: dear }));
const made = await spender.makeInvoice({ amount: 7_000, description: "tea" });
assert.equal(made.amount, 7_000);
assert.equal((await spender.lookupInvoice({ payment_hash: made.payment_hash })).state, "pending");
const list = await spender.listTransactions({ unpaid: false });
assert.equal(list.transactions.length, 1);
await refused("NOT_FOUND", spender.lookupInvoice({ payment_hash: "00".repeat(32) }));

// Another app: it may look and be paid, not pay; and it sees nothing of the first one's.
const watcher = new NWCClient({ nostrWalletConnectUrl: world.watcher });
await refused("RESTRICTED", watcher.payInvoice({ invoice: third }));
await refused("NOT_FOUND", watcher.lookupInvoice({ invoice: small }));
assert.equal((await watcher.listTransactions({ unpaid: true })).transactions.length, 0);
console.log("@getalby/sdk: info, balance, pay, pay again, lookup, quota, make, list, restricted, isolation: as they should be");
process.exit(0);
