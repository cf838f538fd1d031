// A bot made with Tencent's own client, the plugin @tencent-weixin/openclaw-weixin: repeats what it is told.
//
// The plugin runs unchanged, from its login to its loop; around it stands a host that is no OpenClaw. Its address for QR
// codes is a constant of a module, so `fetch` sends what is meant for it elsewhere.
// Arguments: base URL of the API and of the CDN; NODE_PATH leads to the plugin. Knows nothing of this repository.

import fs from "node:fs";
import { register } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [url, cdnBaseUrl] = process.argv.slice(2);
register("./openclaw_hooks.mjs", import.meta.url);
const plugin = pathToFileURL(path.join(process.env.NODE_PATH, "@tencent-weixin/openclaw-weixin/dist/src/"));
const load = (module) => import(new URL(module, plugin));

const send = globalThis.fetch;
globalThis.fetch = (to, options) => send(String(to).replace("https://ilinkai.weixin.qq.com/", `${url}/`), options);

const { startWeixinLoginWithQr, waitForWeixinLogin } = await load("auth/login-qr.js");
const { notifyStart } = await load("api/api.js");
const { registerWeixinAccountId, saveWeixinAccount } = await load("auth/accounts.js");
const { monitorWeixinProvider } = await load("monitor/monitor.js");

const { sessionKey } = await startWeixinLoginWithQr({ apiBaseUrl: url });
const { connected, botToken: token, baseUrl, userId } = await waitForWeixinLogin({ sessionKey, apiBaseUrl: url });
if (!connected) process.exit(1);
const accountId = "account";
saveWeixinAccount(accountId, { token, baseUrl, userId });
registerWeixinAccountId(accountId);
await notifyStart({ baseUrl, token });

let saved = 0;
const ENDINGS = { "video/mp4": ".mp4", undefined: ".png" };

async function saveMediaBuffer(content, type, folder, limit, name) {
  const file = path.resolve(`${(saved += 1)}${name ? path.extname(name) : (ENDINGS[type] ?? ".bin")}`);
  fs.writeFileSync(file, content);
  return { path: file };
}

async function answer({ ctx, dispatcher: { typingCallbacks, deliver, onError } }) {
  const reply = ctx.MediaPath ? { mediaUrl: ctx.MediaPath } : { text: `echo: ${ctx.Body}` };
  await typingCallbacks.onReplyStart();
  await deliver(reply).catch((error) => onError(error, { kind: "final" }));
  await typingCallbacks.onIdle();
}

const channelRuntime = {
  media: { saveMediaBuffer },
  routing: { resolveAgentRoute: () => ({ agentId: "agent", sessionKey: "session", mainSessionKey: "session" }) },
  session: { resolveStorePath: () => "", recordInboundSession: async () => {} },
  reply: {
    finalizeInboundContext: (context) => context,
    resolveHumanDelayConfig: () => undefined,
    createReplyDispatcherWithTyping: (dispatcher) => ({ dispatcher, replyOptions: {}, markDispatchIdle: () => {} }),
    withReplyDispatcher: ({ run }) => run(),
    dispatchReplyFromConfig: answer,
  },
};
const runtime = { log: console.log, error: console.error };
await monitorWeixinProvider({ baseUrl, cdnBaseUrl, token, accountId, config: {}, channelRuntime, runtime });
