// A service that tells a user something and waits until it is known what became of it:
// node dist/send.js SANDBOX TEXT
//
// Each receipt is a line. Exit code 0 only for `accepted`.

import { randomUUID } from "node:crypto";

import { connect, store } from "./bus.js";
import type { Receipt } from "./wechat-nats.d.ts";

const [sandbox, text] = process.argv.slice(2);
if (!sandbox || !text) {
  console.error("usage: send SANDBOX TEXT");
  process.exit(2);
}
const nc = await connect("_INBOX");
const receipts = nc.subscribe(`wechat.event.${sandbox}.receipt.>`);
await nc.flush(); // listen before you speak

const command = { id: `${sandbox}.send.${randomUUID()}`, sandbox, text };
await store(nc, "wechat.out", command);
for await (const msg of receipts) {
  const receipt = msg.json<Receipt>();
  if (receipt.command !== command.id) {
    continue;
  }
  console.log(receipt.outcome, receipt.reason ?? "", ...(receipt.message_ids ?? []));
  if (receipt.outcome !== "parked") {
    // which is not final: it waits for the user
    process.exitCode = receipt.outcome === "accepted" ? 0 : 1;
    break;
  }
}
await nc.close();
