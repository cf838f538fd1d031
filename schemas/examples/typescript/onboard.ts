// A platform that gives a sandbox its WeChat user:
//
//   node dist/onboard.js login SANDBOX       shows a QR code; digits that the phone shows are typed here
//   node dist/onboard.js bind SANDBOX BOT    a bot that you have; its token is in the environment, as BOT_TOKEN
//
// Exit code 0 once the bot is bound.

import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { createInterface } from "node:readline";

import { createInbox, headers, type NatsConnection } from "@nats-io/transport-node";

import { connect, store } from "./bus.js";
import type { Bind, Login, LoginQuery, LoginStart, LoginVerify, Receipt } from "./wechat-nats.d.ts";

const OVER = ["confirmed", "already_bound", "expired", "failed", "cancelled", "lost"];

async function login(nc: NatsConnection, sandbox: string): Promise<boolean> {
  let news: () => void = () => {};
  nc.subscribe(`wechat.event.${sandbox}.login`, { callback: () => news() });
  const start: LoginStart = { sandbox };
  let now = await ask(nc, "login.start", start);
  for (let code = 0, shown = ""; ; ) {
    if (now.qrcode_text && (now.code ?? 1) !== code && now.status === "wait") {
      code = now.code ?? 1; // a code lives for a minute or two; a new one has a higher number
      console.log(now.qrcode_text); // a secret: who scans it first gets the sandbox
    }
    const state = `${now.status} ${now.reason ?? ""}`.trim();
    if (state !== shown) {
      shown = state;
      console.log(`${state}: ${now.detail ?? ""}`);
    }
    if (OVER.includes(now.status)) {
      return now.status === "confirmed" || now.status === "already_bound";
    }
    if (now.status === "need_verify_code" && now.reason !== "checking") {
      const verify: LoginVerify = { login: now.login, code: await line() };
      now = await ask(nc, "login.verify", verify);
      continue;
    }
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, 3000); // an event may get lost; the status does not
      news = () => (clearTimeout(timer), resolve());
    });
    const query: LoginQuery = { login: now.login };
    now = await ask(nc, "login.status", query);
  }
}

async function bind(nc: NatsConnection, sandbox: string, bot: string): Promise<boolean> {
  const inbox = createInbox(process.env.NATS_INBOX_PREFIX);
  const answers = nc.subscribe(inbox, { max: 1, timeout: 60_000 });
  const command: Bind & { id: string } = { id: `bind.${randomUUID()}`, bot, bot_token: process.env.BOT_TOKEN ?? "" };
  const head = headers();
  head.set("Reply-To", inbox);
  await store(nc, `wechat.bind.${sandbox}`, command, head);
  for await (const msg of answers) {
    const receipt = msg.json<Receipt>(); // the bind is stored, also while no adapter runs
    const isBound = receipt.outcome === "applied";
    console.log(isBound ? "bound" : receipt.detail);
    return isBound;
  }
  return false;
}

/** Asks any adapter. Throws the sentence that it answers instead. */
async function ask(nc: NatsConnection, verb: string, request: LoginStart | LoginQuery | LoginVerify): Promise<Login> {
  const msg = await nc.request(`wechat.svc.${verb}`, JSON.stringify(request), { timeout: 20_000 });
  const error = msg.headers?.get("Nats-Service-Error");
  if (error) {
    throw new Error(error);
  }
  return msg.json<Login>();
}

async function line(): Promise<string> {
  const lines = createInterface({ input: process.stdin });
  const [typed] = (await once(lines, "line")) as [string];
  lines.close();
  return typed.trim();
}

const [verb, sandbox = "s1", bot = ""] = process.argv.slice(2);
const nc = await connect("_INBOX");
const done = verb === "bind" ? await bind(nc, sandbox, bot) : await login(nc, sandbox);
await nc.close();
process.exitCode = done ? 0 : 1;
