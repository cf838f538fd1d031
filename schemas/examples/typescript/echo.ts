// An agent that answers each message with the same words, or with what it has got: node dist/echo.js SANDBOX
//
// What its user wrote while nobody ran waits in the sandbox's inbox.

import { createHash } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

import type { Msg } from "@nats-io/transport-node";

import { connect, store } from "./bus.js";
import type { Inbound, MediaQuery, NextPage, NextQuery, Outbound } from "./wechat-nats.d.ts";

const sandbox = process.argv[2] ?? "s1";
const nc = await connect(`_INBOX_${sandbox}`); // the only inboxes that a sandbox may be permitted
let ring: () => void = () => {};
nc.subscribe(`wechat.in.${sandbox}`, { callback: () => ring() });
console.log(`echo agent of ${sandbox}: ready`);
await serve().catch((error: Error) => {
  console.error(error.message); // such as: another program reads the sandbox now
  process.exit(1);
});

async function serve(): Promise<never> {
  let request: NextQuery = {}; // the first one makes this program the sandbox's only reader
  for (;;) {
    const rung = new Promise<void>((resolve) => (ring = resolve));
    const page = (await ask("next", request)).json<NextPage>();
    request = { reader: page.reader };
    for (const { position, message } of page.messages ?? []) {
      const said = message as unknown as Inbound;
      await store(nc, `wechat.out.${sandbox}`, await answer(position, said));
      // The next request confirms it. A crash before brings the message again, and the id keeps its answer single.
      request.after = position;
      console.log(`answered ${said.id}`);
    }
    if (request.after === undefined) {
      await Promise.race([rung, sleep(30_000)]); // a ring may get lost
    }
  }
}

/** The command. Its id follows from what caused it; it names the user, since another may be bound by now. */
async function answer(position: string, said: Inbound): Promise<Outbound & { id: string }> {
  const items = said.text ? [] : await Promise.all(said.items.map((item) => described(position, item)));
  const text = said.text ? `You said: ${said.text}` : `You sent: ${items.join(", ")}`;
  return { id: `${sandbox}.echo.${said.id}`, user: said.user, text, reply_to: said.id };
}

async function described(position: string, item: Inbound["items"][number]): Promise<string> {
  if (!("media" in item) || !item.media) {
    return item.kind;
  }
  try {
    return `${item.kind} (${(await read(position, item.media.object)).length} bytes)`;
  } catch (error) {
    return `${item.kind} (${(error as Error).message})`;
  }
}

/** The bytes of an object, which may still be on their way from WeChat. Throws the sentence that says why there are none. */
async function read(position: string, object: string): Promise<Buffer> {
  const pieces: Uint8Array[] = [];
  for (let after = 0; ; ) {
    const piece = await ask("media.get", { object, position, wait_s: 10, after });
    pieces.push(piece.data);
    after = Number(piece.headers?.get("Wechat-Next"));
    if (!after) {
      const data = Buffer.concat(pieces);
      if (createHash("sha256").update(data).digest("hex") !== piece.headers?.get("Wechat-Sha256")) {
        throw new Error("The bytes are not those that were stored.");
      }
      return data;
    }
  }
}

/** Asks until an adapter answers. Throws the sentence of an error. */
async function ask(verb: string, request: NextQuery | MediaQuery): Promise<Msg> {
  for (;;) {
    const subject = `wechat.svc.${verb}.${sandbox}`;
    const msg = await nc.request(subject, JSON.stringify(request), { timeout: 15_000 }).catch(() => undefined);
    const code = msg?.headers?.get("Nats-Service-Error-Code");
    if (msg && !code) {
      return msg;
    }
    if (code && code !== "429" && code !== "503") {
      throw new Error(msg?.headers?.get("Nats-Service-Error"));
    }
    await sleep(1000); // no adapter is there, or it has no time
  }
}
