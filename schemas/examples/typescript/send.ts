// A service that tells a user something and waits until it is known what became of it:
// node dist/send.js SANDBOX TEXT
//
// Each receipt is a line. Exit code 0 only for `accepted`.

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

import { jetstream } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

import type { Outbound, Receipt } from "../../wechat-nats.d.ts";
import { server } from "./server.js";

const [sandbox = "s1", text = "good morning"] = process.argv.slice(2);
const ident = `${sandbox}.send.${randomUUID()}`;
const nc = await connect({
  ...server,
  inboxPrefix: process.env.NATS_INBOX_PREFIX ?? "_INBOX",
  maxReconnectAttempts: -1,
});
const receipts = nc.subscribe(`wechat.event.${sandbox}.receipt.*`);
await nc.flush(); // listen before you speak

const command: Outbound = { id: ident, sandbox, text };
for (let tries = 1; ; tries += 1) {
  try {
    await jetstream(nc).publish("wechat.out", JSON.stringify(command), { msgID: ident });
    break;
  } catch (error) {
    if (tries === 10) {
      throw error;
    }
    await sleep(1000); // not confirmed: once more, with the same id
  }
}
for await (const msg of receipts) {
  const receipt = msg.json<Receipt>();
  if (receipt.command !== ident) {
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
