// An agent that answers each message with the same words: node dist/echo.js SANDBOX
//
// Bind the sandbox with the option `durable`: what its user wrote then waits in its consumer while nobody runs.

import { setTimeout as sleep } from "node:timers/promises";

import { jetstream, type Consumer } from "@nats-io/jetstream";

import { connect, store } from "./bus.js";
import type { Inbound, Outbound } from "./wechat-nats.d.ts";

const sandbox = process.argv[2] ?? "s1";
const nc = await connect(`_INBOX_${sandbox}`); // the only inboxes that a sandbox may be permitted
console.log(`echo agent of ${sandbox}: ready`);
for await (const msg of await (await consumer()).consume({ max_messages: 1 })) {
  const said = msg.json<Inbound>();
  await store(nc, `wechat.out.${sandbox}`, answer(said));
  msg.ack(); // a crash before this line brings the message again, and the id keeps its answer single
  console.log(`answered ${said.id}`);
}

/** The sandbox's durable consumer, once the sandbox is bound. */
async function consumer(): Promise<Consumer> {
  for (;;) {
    try {
      return await jetstream(nc).consumers.get("WECHAT_IN", sandbox);
    } catch (error) {
      console.error(`not bound yet: ${error}`);
      await sleep(1000);
    }
  }
}

/** The command. Its id follows from what caused it; it names the user, since another may be bound by now. */
function answer(said: Inbound): Outbound & { id: string } {
  const kinds = said.items.map((item) => item.kind).join(", ");
  const text = said.text ? `You said: ${said.text}` : `You sent: ${kinds}`;
  return { id: `${sandbox}.echo.${said.id}`, user: said.user, text, reply_to: said.id };
}
