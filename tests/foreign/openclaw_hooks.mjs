// Resolves the host that Tencent's plugin expects around it to the one beside this file.

export function resolve(specifier, context, next) {
  if (!specifier.startsWith("openclaw/plugin-sdk/")) return next(specifier, context);
  return { url: new URL("openclaw_host.mjs", import.meta.url).href, shortCircuit: true };
}
