// An agent that answers each message with the same words: node dist/echo.js SANDBOX
//
// Bind the sandbox with the option `durable`: what its user wrote then waits in its consumer while nobody runs.

import { setTimeout as sleep } from "node:timers/promises";

import { jetstream, type JetStreamClient } from "@nats-io/jetstream";
import { connect, createInbox } from "@nats-io/transport-node";

import type { Inbound, Outbound } from "../../wechat-nats.d.ts";
import { server } from "./server.js";

const sandbox = process.argv[2] ?? "s1";
const inboxPrefix = process.env.NATS_INBOX_PREFIX ?? `_INBOX_${sandbox}`; // all that a sandbox may be permitted
const nc = await connect({
  ...server,
  inboxPrefix,
  maxReconnectAttempts: -1,
});
const js = jetstream(nc);
console.log(`echo agent of ${sandbox}: ready`);

// Asks for the next message; within 30 s there is one, or the word that there is none. In plain NATS, since a sandbox
// need not be permitted anything else of JetStream.
const inbox = createInbox(inboxPrefix);
const ask = (): void => {
  const next = JSON.stringify({ batch: 1, expires: 30_000_000_000 });
  nc.publish(`$JS.API.CONSUMER.MSG.NEXT.WECHAT_IN.${sandbox}`, next, { reply: inbox });
};
const pulled = nc.subscribe(inbox);
const again = setInterval(ask, 35_000); // where an answer got lost, as NATS was away
ask();
for await (const msg of pulled) {
  again.refresh();
  if (msg.headers?.code) {
    if (msg.headers.code === 503) {
      await sleep(1000); // not bound yet
    }
    ask();
    continue;
  }
  const said = msg.json<Inbound>();
  await store(js, `wechat.out.${sandbox}`, answer(said));
  msg.respond("+ACK"); // a crash before this line brings the message again, and the id keeps its answer single
  console.log(`answered ${said.id}`);
  ask();
}

/** The command. Its id follows from what caused it; it names the user, since another may be bound by now. */
function answer(said: Inbound): Outbound & { id: string } {
  const kinds = said.items.map((item) => item.kind).join(", ");
  const text = said.text ? `You said: ${said.text}` : `You sent: ${kinds}`;
  return { id: `${sandbox}.echo.${said.id}`, user: said.user, text, reply_to: said.id };
}

/** Publishes until the stream has confirmed. The id makes the repeats one. */
async function store(to: JetStreamClient, subject: string, command: Outbound & { id: string }): Promise<void> {
  for (;;) {
    try {
      await to.publish(subject, JSON.stringify(command), { msgID: command.id });
      return;
    } catch (error) {
      console.error(`not stored yet: ${error}`);
      await sleep(1000);
    }
  }
}
