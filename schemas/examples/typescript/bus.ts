// What the programs share: a connection as the NATS tools make it, and a request until a command is stored.

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

import {
  connect as dial,
  credsAuthenticator,
  nkeyAuthenticator,
  type ConnectionOptions,
  type MsgHdrs,
  type NatsConnection,
} from "@nats-io/transport-node";

import type { Bind, Outbound } from "./wechat-nats.d.ts";

/** Connects to NATS_URL, as README.md says; answers come back below NATS_INBOX_PREFIX, else `inboxPrefix`. */
export async function connect(inboxPrefix: string): Promise<NatsConnection> {
  const { NATS_URL, NATS_INBOX_PREFIX, NATS_CA, NATS_CERT, NATS_KEY } = process.env;
  const servers = (NATS_URL ?? "nats://127.0.0.1:4222").split(",");
  return dial({
    servers: servers.map((url) => url.replace(/\/\/.*@/, "//")),
    inboxPrefix: NATS_INBOX_PREFIX ?? inboxPrefix,
    maxReconnectAttempts: -1,
    ...identity(new URL(servers[0]!)),
    ...(NATS_CA || NATS_CERT ? { tls: { caFile: NATS_CA, certFile: NATS_CERT, keyFile: NATS_KEY } } : {}),
  });
}

/** Who asks; the client does not read user and password, or a token, from the URL by itself. */
function identity({ username, password }: URL): ConnectionOptions {
  const { NATS_CREDS, NATS_NKEY, NATS_USER, NATS_PASSWORD, NATS_TOKEN } = process.env;
  if (NATS_CREDS) {
    return { authenticator: credsAuthenticator(readFileSync(NATS_CREDS)) };
  }
  if (NATS_NKEY) {
    return { authenticator: nkeyAuthenticator(new TextEncoder().encode(readFileSync(NATS_NKEY, "utf8").trim())) };
  }
  if (NATS_USER || password) {
    return { user: NATS_USER ?? decodeURIComponent(username), pass: NATS_PASSWORD ?? decodeURIComponent(password) };
  }
  return NATS_TOKEN || username ? { token: NATS_TOKEN ?? decodeURIComponent(username) } : {};
}

/** Requests until the stream has confirmed that it has the command. The id makes the repeats one. */
export async function store(
  nc: NatsConnection,
  subject: string,
  command: (Outbound | Bind) & { id: string },
  headers?: MsgHdrs,
): Promise<void> {
  for (;;) {
    try {
      const ack = (await nc.request(subject, JSON.stringify(command), { timeout: 5000, headers })).json<Ack>();
      if (!ack.error) {
        return;
      }
      console.error(`not stored yet: ${ack.error.description}`);
    } catch (error) {
      console.error(`not stored yet: ${error}`);
    }
    await sleep(1000);
  }
}

/** JetStream's answer to a command. */
interface Ack {
  seq?: number;
  error?: { code: number; err_code?: number; description: string };
}
