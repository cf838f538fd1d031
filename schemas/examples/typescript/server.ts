// Where NATS is, and who asks: NATS_URL, whose user and password, or token, the client does not read by itself.

const servers = (process.env.NATS_URL ?? "nats://127.0.0.1:4222").split(",");
const { username, password } = new URL(servers[0]!);

export const server = {
  servers: servers.map((url) => url.replace(/\/\/.*@/, "//")),
  ...(password ? { user: decodeURIComponent(username), pass: decodeURIComponent(password) } : username ? { token: username } : {}),
};
