// As much of OpenClaw as Tencent's plugin needs to poll, download and answer: everybody may write, nothing is hooked in.

import os from "node:os";

export const normalizeAccountId = (id) => id.trim().toLowerCase().replace(/[^a-z0-9_-]+/g, "-");
export const resolvePreferredOpenClawTmpDir = () => os.homedir();
export const withFileLock = (path, options, work) => work();
export const loadConfig = () => ({});
export const writeConfigFile = async () => {};
export const resolveSenderCommandAuthorizationWithRuntime = async () => ({
  senderAllowedForCommands: true,
  commandAuthorized: true,
});
export const resolveDirectDmAuthorizationOutcome = () => "allowed";
export const getGlobalHookRunner = () => null;
export const fireAndForgetHook = () => {};
export const buildCanonicalSentMessageHookContext = () => ({});
export const toPluginMessageContext = () => ({});
export const toPluginMessageSentEvent = () => ({});
export const createTypingCallbacks = ({ start, stop }) => ({ onReplyStart: start, onIdle: stop });
